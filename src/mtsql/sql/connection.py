"""A SQLite connection that allows reading only, and the clock that ends its queries. Both run in a
SQL worker.

Five things bound a query: an authorizer, SQLite's limits on sizes, a count of its rows, a budget of
virtual-machine steps, and a deadline that is checked at each tick of the clock. The budget gives
the same verdict on every machine; the deadline does not.
"""

import sqlite3
import time
import zlib
from collections.abc import Callable
from functools import cache

TICK_VM_STEPS = 1_000_000
"""Steps of SQLite's virtual machine between two ticks, or fewer if the budget is smaller. A million
steps take 5 to 30 ms."""

# The values of `query.QueryStatus`.
OK = "ok"
ERROR = "error"
TIMEOUT = "timeout"
TOO_LARGE = "too_large"
DENIED = "denied"
STATUS_OF_CODE = {
    sqlite3.SQLITE_READONLY: DENIED,
    sqlite3.SQLITE_AUTH: DENIED,
    sqlite3.SQLITE_INTERRUPT: TIMEOUT,
    sqlite3.SQLITE_TOOBIG: TOO_LARGE,
    sqlite3.SQLITE_NOMEM: TOO_LARGE,
    sqlite3.SQLITE_FULL: TOO_LARGE,
}
UNREADABLE = (sqlite3.Error, UnicodeError)
"""What Python's sqlite3 raises for a file or a query that it cannot read. UnicodeError: the name of
a column is not UTF-8."""
_ALWAYS_ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE))
"""Besides these, `authorize` allows some reads and function calls, and nothing else."""
_DENIED_FUNCTIONS = frozenset(("load_extension", "fts3_tokenizer"))
_KNOWN_MODULES = frozenset(
    (
        "sqlite_stmt",
        "dbstat",
        "sqlite_dbpage",
        "json_each",
        "json_tree",
        "bytecode",
        "tables_used",
    )
)
"""Virtual table modules that are denied whether or not `PRAGMA module_list` shows them."""


class Refusal(Exception):
    """Raised when this module, and not SQLite, ends a query."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def row_bytes(row: tuple) -> int:
    """Estimate the memory that a row takes as Python objects.

    The estimate depends on the values only. `sys.getsizeof` is not used, because it returns more
    for a short text once SQLite has seen it.
    """
    num_bytes = 56 + 40 * len(row)
    for cell in row:
        if isinstance(cell, (str, bytes)):
            is_narrow = isinstance(cell, bytes) or cell.isascii()
            bytes_per_char = 1 if is_narrow else 4
            num_bytes += 24 + bytes_per_char * len(cell)
    return num_bytes


class SeededRandom:
    """The numbers of random() and randomblob(). They depend on the query's text only, so that a run
    can be repeated (splitmix64)."""

    def __init__(self) -> None:
        self.state = 0
        self.max_bytes = 0

    def start(self, sql: str) -> None:
        """Begin the sequence of numbers of a query."""
        self.state = zlib.crc32(sql.encode())

    def number(self) -> int:
        """A signed 64-bit number, like those that random() returns."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return (mixed ^ (mixed >> 31)) - 2**63

    def blob(self, size: float | str | bytes | None) -> bytes:
        """The value of randomblob(size), at least one byte long. A blob of more than 4,096 bytes
        repeats its first 4,096. SQLite refuses a blob that is longer than its limit."""
        if isinstance(size, (int, float)) or (isinstance(size, str) and size.isdecimal()):
            num_bytes = min(max(1, int(size)), self.max_bytes + 1)
        else:
            num_bytes = 1
        num_words = min(512, -(-num_bytes // 8))
        words = [(self.number() + 2**63).to_bytes(8, "little") for _ in range(num_words)]
        piece = b"".join(words)
        num_pieces = -(-num_bytes // len(piece))
        return (piece * num_pieces)[:num_bytes]


class SandboxConnection:
    """A connection to a file, or to tables held in memory, that refuses everything but reading."""

    def __init__(self, connection: sqlite3.Connection, clock: "Clock") -> None:
        self.connection = connection
        self.clock = clock
        self.config: dict | None = None
        self.is_denied = False
        self.sql = ""
        self.random = SeededRandom()
        self.plain_tables: set[str] = set()
        self.virtual_tables: set[str] = set()
        # The schema is loaded here, before limits on values apply to it.
        rows = connection.execute("SELECT name, type, rootpage FROM sqlite_master").fetchall()
        for name, kind, root_page in rows:
            name = str(name).lower()  # a damaged file may hold a value of any type
            if kind == "view" or (kind == "table" and root_page):
                self.plain_tables.add(name)
            if kind == "table" and not root_page:
                self.virtual_tables.add(name)
        self.modules = _modules() - self.plain_tables
        connection.create_function("random", 0, self.random.number)
        connection.create_function("randomblob", 1, self.random.blob)
        connection.set_authorizer(self.authorize)

    def configure(self, config: dict) -> None:
        """Apply the limits of a query; `config` is a QueryConfig as a dictionary."""
        if config == self.config:
            return
        limits = {
            sqlite3.SQLITE_LIMIT_LENGTH: config["max_value_bytes"],
            sqlite3.SQLITE_LIMIT_EXPR_DEPTH: config["max_expr_depth"],
            sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: config["max_compound_selects"],
            sqlite3.SQLITE_LIMIT_ATTACHED: 0,
        }
        for category, value in limits.items():
            self.connection.setlimit(category, value)
        self.random.max_bytes = config["max_value_bytes"]
        _, steps_between_ticks = tick_steps(config["max_vm_steps"])
        self.connection.set_progress_handler(self.clock.tick, steps_between_ticks)
        self.config = config

    def authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SQLite calls this while it compiles a statement, for each table read and for each
        function.

        first: the table that is read. second: its column, or the function that is called.
        """
        if action == sqlite3.SQLITE_READ:
            is_allowed = first is not None and self._may_read(first.lower(), second)
        elif action == sqlite3.SQLITE_FUNCTION:
            is_allowed = second is not None and second.lower() not in _DENIED_FUNCTIONS
        else:
            is_allowed = action in _ALWAYS_ALLOWED
        if is_allowed:
            return sqlite3.SQLITE_OK
        # SQLite's own error code does not always show a denial: a denied table function is a plain
        # error.
        self.is_denied = True
        return sqlite3.SQLITE_DENY

    def _may_read(self, name: str, column: str | None) -> bool:
        if name in self.virtual_tables:
            return False
        is_pragma = name.startswith("pragma_") and name not in self.plain_tables
        if name not in self.modules and not is_pragma:
            return True
        return column == "" and self._is_cte(name)

    def _is_cte(self, name: str) -> bool:
        """Whether the query defines a CTE of this name, and never writes the name after a dot.

        If a FROM uses no column of a CTE, SQLite asks for the CTE as for a table without columns.
        """
        import re  # rarely needed, and importing it would delay the start of each worker

        own = rf"[\"`\[]?{re.escape(name)}[\"`\]]?"
        definition = rf"(?:\bwith|\brecursive|,)\s*{own}\s*(?:\([^()]*\)\s*)?as\b"
        is_defined = bool(re.search(definition, self.sql, re.I))
        is_after_dot = bool(re.search(rf"\.\s*{own}", self.sql, re.I))
        return is_defined and not is_after_dot

    def run(self, sql: str, config: dict) -> tuple[list[tuple], tuple[str, ...], int]:
        """-> (rows, columns, `row_bytes` of the rows and of the columns' names)."""
        self.is_denied = False
        self.sql = sql
        self.random.start(sql)
        cursor = self.connection.execute(sql)
        try:
            if cursor.description is None:
                raise sqlite3.ProgrammingError("the text holds no query")
            columns = tuple(entry[0] for entry in cursor.description)
            num_bytes = row_bytes(columns)
            max_bytes = config["max_bytes"]
            max_cells = config["max_cells"]
            max_rows = min(config["max_rows"], max_cells // len(columns))
            if num_bytes > max_bytes:
                raise Refusal(TOO_LARGE, f"more than {max_bytes} bytes of column names")
            rows: list[tuple] = []
            for row in cursor:
                rows.append(row)
                num_bytes += row_bytes(row)
                if len(rows) > max_rows:
                    if len(rows) > config["max_rows"]:
                        raise Refusal(TOO_LARGE, f"more than {config['max_rows']} rows")
                    raise Refusal(TOO_LARGE, f"more than {max_cells} cells")
                if num_bytes > max_bytes:
                    raise Refusal(TOO_LARGE, f"more than {max_bytes} bytes of rows")
            return rows, columns, num_bytes
        finally:
            cursor.close()  # an unfinished statement would keep its memory


class Clock:
    """Counts the ticks of a running query, reports each, and ends the query at its budget or its
    deadline."""

    def __init__(self, on_tick: Callable[[], None]) -> None:
        self.on_tick = on_tick
        self.start(1, 0.0)

    def start(self, max_ticks: int, timeout_secs: float) -> None:
        """Begin to count for a query."""
        self.num_ticks = 0
        self.max_ticks = max_ticks
        self.is_late = False
        self.started = time.monotonic()
        self.deadline = self.started + timeout_secs

    def tick(self) -> bool:
        """SQLite calls this after each interval of steps; the result True ends the query."""
        self.num_ticks += 1
        self.on_tick()
        self.is_late = time.monotonic() > self.deadline
        return self.is_late or self.num_ticks >= self.max_ticks


def tick_steps(max_vm_steps: int) -> tuple[int, int]:
    """-> (number of ticks in the budget, steps between two ticks). Their product is the budget,
    rounded down."""
    num_ticks = -(-max_vm_steps // TICK_VM_STEPS)
    return num_ticks, max(1, max_vm_steps // num_ticks)


def decode(raw: bytes) -> str:
    """Text of a file, without the bytes that are not UTF-8."""
    return raw.decode("utf-8", "ignore")


def open_file(uri: str) -> sqlite3.Connection:
    """Open a file read-only, without a lock, and without leaving other files beside it. The caller
    sets the authorizer."""
    uri += "?mode=ro&immutable=1"
    return _prepared(sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0))


def open_memory(steps: list[tuple[str, list[tuple] | None]]) -> sqlite3.Connection:
    """Build a database in memory from statements, each with the rows it inserts or None.

    A statement or a row that SQLite rejects is left out. It may need a module that is not loaded,
    or hold a value that a STRICT table or a constraint does not allow.
    """
    connection = _prepared(sqlite3.connect(":memory:", isolation_level=None, cached_statements=0))
    for sql, rows in steps:
        try:
            if rows is None:
                connection.execute(sql)
            else:
                _insert(connection, sql, rows)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
    return connection


def _insert(connection: sqlite3.Connection, sql: str, rows: list[tuple]) -> None:
    connection.execute("BEGIN")
    try:
        connection.executemany(sql, rows)
        connection.execute("COMMIT")
    except UNREADABLE as error:
        connection.execute("ROLLBACK")
        if is_out_of_memory(error):
            raise
        # At least one row is rejected, so they are inserted one by one.
        connection.execute("BEGIN")
        for row in rows:
            try:
                connection.execute(sql, row)
            except UNREADABLE as single:
                if is_out_of_memory(single):
                    raise
        connection.execute("COMMIT")


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.text_factory = decode
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or SQLite had no memory left."""
    # The low byte of SQLite's code is the kind of the error.
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, MemoryError) or kind == sqlite3.SQLITE_NOMEM


@cache
def _modules() -> frozenset[str]:
    """Lower-cased names of the virtual table modules of this SQLite. Several can be read without
    being created first, and sqlite_stmt shows the text of other queries."""
    connection = sqlite3.connect(":memory:")
    names = {name.lower() for (name,) in connection.execute("PRAGMA module_list")}
    connection.close()
    return frozenset(names | _KNOWN_MODULES)
