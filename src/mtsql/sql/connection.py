"""A SQLite connection that allows reading only, and the clock that ends its queries. Runs in a SQL
worker.

What bounds a query here: an authorizer, SQLite's limits on sizes, counted rows, a budget of
virtual-machine steps, which gives the same verdict on every machine, and a deadline that is looked
at every so many steps.
"""

import sqlite3
import time
import zlib
from collections.abc import Callable
from functools import cache

TICK_VM_STEPS = 1_000_000
"""At most so many steps of SQLite's virtual machine pass between two ticks: 5 to 30 ms."""
OK, ERROR, TIMEOUT, TOO_LARGE, DENIED = "ok", "error", "timeout", "too_large", "denied"
STATUS_OF_CODE = {
    sqlite3.SQLITE_READONLY: DENIED,
    sqlite3.SQLITE_AUTH: DENIED,
    sqlite3.SQLITE_INTERRUPT: TIMEOUT,
    sqlite3.SQLITE_TOOBIG: TOO_LARGE,
    sqlite3.SQLITE_NOMEM: TOO_LARGE,
    sqlite3.SQLITE_FULL: TOO_LARGE,
}
UNREADABLE = (sqlite3.Error, UnicodeError)  # names of columns must be UTF-8 for Python's module
_ALLOWED = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)
_DENIED_FUNCTIONS = frozenset(("load_extension", "fts3_tokenizer"))


class Refusal(Exception):
    """The query is ended by us, not by SQLite."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def row_bytes(row: tuple) -> int:
    """About what a row takes as Python objects. It depends on the values only: `sys.getsizeof` of a
    short text grows once SQLite has seen it."""
    num_bytes = 56 + 40 * len(row)
    for cell in row:
        if isinstance(cell, (str, bytes)):
            is_narrow = isinstance(cell, bytes) or cell.isascii()
            num_bytes += 24 + (len(cell) if is_narrow else 4 * len(cell))
    return num_bytes


class SeededRandom:
    """random() and randomblob(): numbers that depend on the query's text only, so that a run can
    be repeated (splitmix64)."""

    def __init__(self) -> None:
        self.state, self.max_bytes = 0, 0

    def start(self, sql: str) -> None:
        self.state = zlib.crc32(sql.encode())

    def number(self) -> int:
        """A signed 64-bit number, as random() returns."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return (mixed ^ (mixed >> 31)) - 2**63

    def blob(self, size: object) -> bytes:
        """As randomblob(size): at least one byte. SQLite refuses one that is over its limit."""
        size = int(size) if isinstance(size, (int, float)) or str(size).isdecimal() else 1
        size = min(max(1, size), self.max_bytes + 1)
        piece = b"".join(
            (self.number() + 2**63).to_bytes(8, "little") for _ in range(min(512, -(-size // 8)))
        )
        return (piece * -(-size // len(piece)))[:size]


class SandboxConnection:
    """A connection to a file, or to tables held in memory, that refuses everything but reading."""

    def __init__(self, connection: sqlite3.Connection, clock: "Clock") -> None:
        self.connection, self.clock = connection, clock
        self.config: dict | None = None
        self.is_denied, self.sql = False, ""
        self.random = SeededRandom()
        # The schema is loaded here, before limits on values apply to it.
        rows = connection.execute("SELECT name, type, rootpage FROM sqlite_master").fetchall()
        rows = [
            (str(name).lower(), kind, root) for name, kind, root in rows
        ]  # a file may hold any type
        plain = {name for name, kind, root in rows if kind == "view" or (kind == "table" and root)}
        virtual = {name for name, kind, root in rows if kind == "table" and not root}
        self.modules, self.virtual_tables, self.plain_tables = _modules() - plain, virtual, plain
        connection.create_function("random", 0, self.random.number)
        connection.create_function("randomblob", 1, self.random.blob)
        connection.set_authorizer(self.authorize)

    def configure(self, config: dict) -> None:
        """Apply the limits of a query; `config` is a QueryConfig as a dictionary."""
        if config == self.config:
            return
        for category, value in (
            (sqlite3.SQLITE_LIMIT_LENGTH, config["max_value_bytes"]),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, config["max_expr_depth"]),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, config["max_compound_selects"]),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        ):
            self.connection.setlimit(category, value)
        self.random.max_bytes = config["max_value_bytes"]
        self.connection.set_progress_handler(self.clock.tick, tick_steps(config["max_vm_steps"])[1])
        self.config = config

    def authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SQLite calls this while it compiles a statement, for each table read and for each
        function."""
        if action == sqlite3.SQLITE_READ:
            name = first.lower()
            is_module = name in self.modules or (
                name.startswith("pragma_") and name not in self.plain_tables
            )
            is_allowed = name not in self.virtual_tables and (
                not is_module or (second == "" and self._is_cte(name))
            )
        else:
            is_allowed = action in _ALLOWED and not (
                action == sqlite3.SQLITE_FUNCTION and second.lower() in _DENIED_FUNCTIONS
            )
        if is_allowed:
            return sqlite3.SQLITE_OK
        # SQLite's own error code does not always say so: a denied table function is a plain error.
        self.is_denied = True
        return sqlite3.SQLITE_DENY

    def _is_cte(self, name: str) -> bool:
        """Whether the query defines a CTE of this name, and never writes it after a dot. If a FROM
        uses no column of a CTE, SQLite asks for it as for a table without columns."""
        import re  # takes some of the worker's start, and is hardly ever needed

        own = rf"[\"`\[]?{re.escape(name)}[\"`\]]?"
        defines = rf"(?:\bwith|\brecursive|,)\s*{own}\s*(?:\([^()]*\)\s*)?as\b"
        return bool(re.search(defines, self.sql, re.I)) and not re.search(
            rf"\.\s*{own}", self.sql, re.I
        )

    def run(self, sql: str, config: dict) -> tuple[list[tuple], tuple[str, ...], int]:
        """-> (rows, columns, `row_bytes` of all of them)."""
        self.is_denied, self.sql = False, sql
        self.random.start(sql)
        cursor = self.connection.execute(sql)
        try:
            if cursor.description is None:
                raise sqlite3.ProgrammingError("the text holds no query")
            columns = tuple(entry[0] for entry in cursor.description)
            num_bytes = row_bytes(columns)
            max_rows, max_cells, max_bytes = (
                config["max_rows"],
                config["max_cells"],
                config["max_bytes"],
            )
            max_rows = min(max_rows, max_cells // len(columns))
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

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self.start(1, 0.0)

    def start(self, max_ticks: int, timeout_secs: float) -> None:
        self.num_ticks, self.max_ticks, self.is_late = 0, max_ticks, False
        self.started = time.monotonic()
        self.deadline = self.started + timeout_secs

    def tick(self) -> bool:
        """Called by SQLite every so many steps; True ends the query."""
        self.num_ticks += 1
        self.tell()
        self.is_late = time.monotonic() > self.deadline
        return self.is_late or self.num_ticks >= self.max_ticks


def tick_steps(max_vm_steps: int) -> tuple[int, int]:
    """-> (number of ticks in the budget, steps between two ticks). Their product is the budget,
    rounded down."""
    num_ticks = -(-max_vm_steps // TICK_VM_STEPS)
    return num_ticks, max(1, max_vm_steps // num_ticks)


def decode(raw: bytes) -> str:
    return raw.decode("utf-8", "ignore")


def open_file(uri: str) -> sqlite3.Connection:
    """Open a file read-only, without a lock, and without leaving other files beside it. No
    authorizer is set yet."""
    uri += "?mode=ro&immutable=1"
    return _prepared(sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0))


def open_memory(steps: list[tuple[str, list[tuple] | None]]) -> sqlite3.Connection:
    """Build a database in memory from statements, each with the rows it inserts or None.

    A statement or a row that SQLite rejects is left out: a module that is not loaded, a value that
    a STRICT table or a constraint does not allow.
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
    return (
        isinstance(error, MemoryError)
        or (getattr(error, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_NOMEM
    )


@cache
def _modules() -> frozenset[str]:
    """Lower-cased names of the virtual table modules of this SQLite. Several can be read without
    being created first, and sqlite_stmt shows the text of other queries."""
    connection = sqlite3.connect(":memory:")
    names = {name.lower() for (name,) in connection.execute("PRAGMA module_list")}
    connection.close()
    return frozenset(
        names
        | {
            "sqlite_stmt",
            "dbstat",
            "sqlite_dbpage",
            "json_each",
            "json_tree",
            "bytecode",
            "tables_used",
        }
    )
