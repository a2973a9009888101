"""The sandbox: run a model's SQL on a SQLite file and get a value back, whatever the SQL is.

Covered; an attack for each line is in tests/test_database.py and test_database_bounds.py:

- Writes: INSERT, UPDATE, DELETE, REPLACE, CREATE, DROP, ALTER, REINDEX, ANALYZE, VACUUM (INTO), BEGIN,
  SAVEPOINT. The file is opened read-only and immutable, and an authorizer lets a statement do four
  things only: select, read, call a function, recurse. File and folder stay as they are, byte for byte.
- Other files and settings: ATTACH, DETACH, PRAGMA (so writable_schema), load_extension().
- printf() and format(): denied, since one call can hold SQLite for seconds. round() and || remain.
- Table functions and virtual tables: pragma_...(), json_each(), dbstat, sqlite_stmt, FTS and R-Tree
  tables. All denied: sqlite_stmt would show a policy the gold SQL that ran on its connection before.
- Time: an endless recursion, a cross join of millions of rows, a dear function in a loop.
- Results: too many rows, cells or bytes (`QueryLimits`); rows are fetched one by one and counted.
- Values: randomblob, zeroblob, replace, hex, quote and group_concat that grow without end.
- Compile time: deep nesting, hundreds of UNION arms, CTEs that double each other.
- Single calls no clock can stop: instr, replace, trim, LIKE and GLOB are quadratic, so value length,
  pattern length (100) and the number of such calls in a statement (50; trim 2) are bounded.
- Text: NUL bytes, lone surrogates, invalid UTF-8 in the file (dropped, as the official evaluator
  does), several statements in one string, none at all, unbound parameters.
- Files: missing, empty, corrupt, a folder, a pipe: an ERROR. A database another process has locked
  is read without a lock; a `-wal` or `-journal` file beside it is not: rows as of the last checkpoint.
  A file replaced or changed between two queries gives fresh rows.
- Load: any number of threads; at most `MAX_RUNNING` queries run at once, others wait without losing
  time of their own. Open connections never exceed `MAX_RUNNING + MAX_IDLE`.

Bounds, measured by tests/test_database_bounds.py. Memory: SQLite's heap stays under `MAX_HEAP_BYTES` for the
whole process (set once, for every user of sqlite3 in it), plus `max_bytes` and one row for each running
query. Resident memory can pass that, as malloc keeps what one query frees while the next grows: 350 MB
with one CTE bomb, 800 MB with 32 at once. Time: loops end 0.02 s after their deadline, the worst single
statements we could make (`trim` chains, CTE bombs) 2 s after.

Not covered. Disk: a sort or DISTINCT that outgrows its cache spills to SQLite's temporary folder until its
deadline (350 MB/s measured). A file changed *while* a query reads it, or changed with size and times kept. A
bug in SQLite itself: the query runs in this process. While a CTE bomb fills the shared heap, another query
may be TOO_LARGE. random() and date('now') run as they are: results that use them differ from run to run.
A stored value longer than `max_value_bytes` cannot be returned; the other columns of its row can.
"""

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from sys import getsizeof

MAX_RUNNING = 32
MAX_IDLE = 32
MAX_HEAP_BYTES = 256 * 2**20
_TICK_SECS = 0.01
_MAX_IDLE_TICKS = 500

_ALLOWED = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)
# printf('%.2147483647c', 'x') holds SQLite 3.40 for 7 s whatever the length limit; format is its other name.
_DENIED_FUNCTIONS = frozenset(("load_extension", "fts3_tokenizer", "printf", "format"))
# Functions whose one call may cost the product of two value lengths, in units of 5 to 30 ms at the default
# max_value_bytes (one trim 0.4 to 0.7 s). Nothing stops a statement without a loop, so it may hold this many
# units in all.
_CALL_UNITS = {"instr": 1, "replace": 1, "like": 1, "glob": 1, "trim": 25, "ltrim": 25, "rtrim": 25}
_MAX_CALL_UNITS = 50
_FIXED_LIMITS = (
    (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    (sqlite3.SQLITE_LIMIT_COLUMN, 1000),
    (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100),
)


class QueryStatus(Enum):
    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    DENIED = "denied"


_STATUS_OF_CODE = {
    sqlite3.SQLITE_READONLY: QueryStatus.DENIED,
    sqlite3.SQLITE_INTERRUPT: QueryStatus.TIMEOUT,
    sqlite3.SQLITE_TOOBIG: QueryStatus.TOO_LARGE,
    sqlite3.SQLITE_NOMEM: QueryStatus.TOO_LARGE,
    sqlite3.SQLITE_FULL: QueryStatus.TOO_LARGE,
}


@dataclass(frozen=True)
class QueryLimits:
    """What one query may use. ValueError, naming the field, for a limit that is not positive.

    timeout_secs: from its start to its last row.
    max_rows, max_cells, max_bytes: of the result; bytes as Python objects take (a short text is ~60).
    max_value_bytes: of any text, blob or table row, stored or computed.
    max_sql_bytes: of the query itself, in UTF-8.
    max_expr_depth, max_compound_selects: nesting of expressions; arms of UNION and the like.
    """

    timeout_secs: float = 5.0
    max_rows: int = 100_000
    max_cells: int = 2_000_000
    max_bytes: int = 128_000_000
    max_value_bytes: int = 40_000
    max_sql_bytes: int = 20_000
    max_expr_depth: int = 200
    max_compound_selects: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value!r}")
        if self.max_value_bytes > 10**9:
            raise ValueError(f"max_value_bytes: SQLite allows 10**9 at most, found {self.max_value_bytes}")


@dataclass(frozen=True)
class QueryResult:
    """Rows in SQLite's order, duplicates kept. Where the status is not OK: no rows, and a message."""

    status: QueryStatus
    rows: tuple[tuple, ...] = ()
    columns: tuple[str, ...] = ()
    message: str = ""
    secs: float = 0.0

    @property
    def is_ok(self) -> bool:
        return self.status is QueryStatus.OK

    @property
    def is_empty(self) -> bool:
        """It ran and says nothing: no rows, or nothing but NULL."""
        return self.is_ok and all(cell is None for row in self.rows for cell in row)


class DatabaseFileError(Exception):
    """The file is missing, empty or not a file; the text names it."""


class _Refusal(Exception):
    """We, not SQLite, end the query."""

    def __init__(self, status: QueryStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def run_query(db_path: Path, sql: str, limits: QueryLimits = QueryLimits()) -> QueryResult:
    """Run one query. Nothing the SQL or the file does raises: the status says what happened."""
    start = time.monotonic()
    rows: tuple[tuple, ...] = ()
    columns: tuple[str, ...] = ()
    try:
        _check_text(sql, limits)
        with _POOL.connection(db_path, limits) as connection:
            start = time.monotonic()  # waiting for a free connection costs the query nothing
            rows, columns = _fetch(connection, sql, limits)
        status, message = QueryStatus.OK, ""
    except _Refusal as error:
        status, message = error.status, str(error)
    except MemoryError:
        status, message = QueryStatus.TOO_LARGE, "out of memory"
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, DatabaseFileError) as error:
        status, message = _status_of(error), str(error)
    secs = time.monotonic() - start
    if status is QueryStatus.TIMEOUT or (status is QueryStatus.OK and secs > limits.timeout_secs):
        status, message = QueryStatus.TIMEOUT, f"no result within {limits.timeout_secs:g} seconds"
    if status is not QueryStatus.OK:
        return QueryResult(status, message=message, secs=secs)
    return QueryResult(status, rows, columns, secs=secs)


def open_read_only(db_path: Path) -> sqlite3.Connection:
    """A connection that cannot write the file, takes no lock and leaves nothing beside it.

    It is no sandbox yet: ATTACH works. Raises DatabaseFileError for a missing, empty or odd file.
    """
    _file_version(db_path)
    uri = Path(os.fsdecode(db_path)).absolute().as_uri() + "?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=16
        )
    except sqlite3.Error as error:
        raise DatabaseFileError(f"{db_path}: {error}") from error
    connection.text_factory = _decode
    return connection


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "ignore")


def _file_version(db_path: Path) -> tuple[int, ...]:
    """Numbers that differ once the file was replaced or written to."""
    try:
        info = os.stat(db_path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DatabaseFileError(f"{db_path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(info.st_mode):
        raise DatabaseFileError(f"{db_path}: not a file")
    if info.st_size == 0:
        raise DatabaseFileError(f"{db_path}: an empty file, no database")
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _check_text(sql: str, limits: QueryLimits) -> None:
    # Encoding raises UnicodeError for lone surrogates. A NUL would end the text for SQLite.
    if len(sql.encode("utf-8")) > limits.max_sql_bytes:
        raise _Refusal(QueryStatus.TOO_LARGE, f"the query is longer than {limits.max_sql_bytes} bytes")
    if "\0" in sql:
        raise sqlite3.ProgrammingError("the query contains a null character")


def _fetch(
    connection: sqlite3.Connection, sql: str, limits: QueryLimits
) -> tuple[tuple[tuple, ...], tuple[str, ...]]:
    cursor = connection.execute(sql)
    try:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("the text holds no query")
        columns = tuple(entry[0] for entry in cursor.description)
        rows: list[tuple] = []
        num_bytes = 0
        for row in cursor:
            rows.append(row)
            num_bytes += getsizeof(row) + sum(map(getsizeof, row))
            if len(rows) > limits.max_rows:
                raise _Refusal(QueryStatus.TOO_LARGE, f"more than {limits.max_rows} rows")
            if len(rows) * len(columns) > limits.max_cells:
                raise _Refusal(QueryStatus.TOO_LARGE, f"more than {limits.max_cells} cells")
            if num_bytes > limits.max_bytes:
                raise _Refusal(QueryStatus.TOO_LARGE, f"more than {limits.max_bytes} bytes of rows")
        return tuple(rows), columns
    finally:
        cursor.close()  # an unfinished statement would keep its memory and its temporary files


def _status_of(error: Exception) -> QueryStatus:
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the kind of the error, the rest its detail.
    return QueryStatus.ERROR if code is None else _STATUS_OF_CODE.get(code & 0xFF, QueryStatus.ERROR)


class _Sandbox:
    """One connection, set up to refuse all but reading, for one version of one file."""

    def __init__(self, key: tuple, db_path: Path, limits: QueryLimits) -> None:
        self.key = key
        self.call_units = 0
        self.is_denied = False
        self.connection = open_read_only(db_path)
        self.connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP_BYTES}").close()
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.max_value_bytes)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_EXPR_DEPTH, limits.max_expr_depth)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, limits.max_compound_selects)
        for category, value in _FIXED_LIMITS:
            self.connection.setlimit(category, value)
        self.connection.set_authorizer(self.authorize)

    def authorize(self, action: int, _: str | None, name: str | None, *__: str | None) -> int:
        """SQLite asks while it compiles a statement; for a function, `name` is the function's."""
        if action == sqlite3.SQLITE_FUNCTION:
            self.call_units += _CALL_UNITS.get(name, 0)
        if action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and name in _DENIED_FUNCTIONS):
            # SQLite's own error code does not always say so: a denied table function is a plain error.
            self.is_denied = True
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_DENY if self.call_units > _MAX_CALL_UNITS else sqlite3.SQLITE_OK


class _Pool:
    """Connections at rest and at work, and a thread that interrupts those past their deadline.

    The thread is there because a progress handler runs Python, thus waits for the GIL, every so many
    instructions: under a busy interpreter that slows queries a hundredfold, and a statement of dear
    calls overshoots by the whole interval. SQLite looks at an interrupt on every turn of a loop.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slots = threading.BoundedSemaphore(MAX_RUNNING)
        self.idle: list[_Sandbox] = []  # the most recently used last
        self.deadlines: dict[_Sandbox, float] = {}
        self.has_watcher = False

    @contextmanager
    def connection(self, db_path: Path, limits: QueryLimits) -> Iterator[sqlite3.Connection]:
        """Lend a connection, with the clock running. It is kept unless its query was cut off."""
        key = (os.fspath(db_path), _file_version(db_path), limits)
        with self.slots:
            sandbox = self._take(key) or _Sandbox(key, db_path, limits)
            sandbox.call_units, sandbox.is_denied = 0, False
            self._start(sandbox, limits.timeout_secs)
            is_sound = False
            try:
                yield sandbox.connection
                is_sound = True
            except sqlite3.Error as error:
                is_sound = _status_of(error) is QueryStatus.ERROR
                if sandbox.call_units > _MAX_CALL_UNITS:
                    raise _Refusal(
                        QueryStatus.TOO_LARGE, "too many LIKE, GLOB, instr, replace or trim"
                    ) from error
                if sandbox.is_denied:
                    raise _Refusal(QueryStatus.DENIED, f"only SELECT is allowed here: {error}") from error
                raise
            finally:
                with self.lock:
                    del self.deadlines[sandbox]
                self._give(sandbox, is_sound)

    def _take(self, key: tuple) -> _Sandbox | None:
        path, version, _ = key
        stale, found = [], None
        with self.lock:
            for sandbox in reversed(self.idle):
                if found is None and sandbox.key == key:
                    found = sandbox
                elif sandbox.key[0] == path and sandbox.key[1] != version:
                    stale.append(sandbox)
            for sandbox in stale + ([found] if found else []):
                self.idle.remove(sandbox)
        for sandbox in stale:
            sandbox.connection.close()
        return found

    def _give(self, sandbox: _Sandbox, is_sound: bool) -> None:
        closing = sandbox
        with self.lock:
            if is_sound:
                self.idle.append(sandbox)
                closing = self.idle.pop(0) if len(self.idle) > MAX_IDLE else None
        if closing is not None:
            closing.connection.close()

    def _start(self, sandbox: _Sandbox, timeout_secs: float) -> None:
        with self.lock:
            self.deadlines[sandbox] = time.monotonic() + timeout_secs
            if not self.has_watcher:
                self.has_watcher = True
                threading.Thread(target=self._watch, name="mtsql-sql-deadlines", daemon=True).start()

    def _watch(self) -> None:
        num_idle_ticks = 0
        while True:
            time.sleep(_TICK_SECS)
            now = time.monotonic()
            with self.lock:  # so that no connection is interrupted after it was given back
                num_idle_ticks = 0 if self.deadlines else num_idle_ticks + 1
                if num_idle_ticks > _MAX_IDLE_TICKS:
                    self.has_watcher = False
                    return
                for sandbox, deadline in self.deadlines.items():
                    if now > deadline:
                        sandbox.connection.interrupt()


_POOL = _Pool()


def _forget_connections() -> None:
    """A forked child has neither the thread nor a right to its parent's connections, which stay unclosed."""
    global _POOL
    _ABANDONED.append(_POOL)
    _POOL = _Pool()


_ABANDONED: list[_Pool] = []
os.register_at_fork(after_in_child=_forget_connections)
