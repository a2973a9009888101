"""The sandbox: run a model's SQL on a SQLite file and get a value back, whatever the SQL is."""

import os
import sqlite3
import stat
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from sys import getsizeof


class QueryStatus(Enum):
    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    DENIED = "denied"


@dataclass(frozen=True)
class QueryLimits:
    """What one query may use.

    timeout_secs: from the call to the last row, waiting for a free connection included.
    max_rows, max_cells, max_bytes: of the result; bytes as Python objects (a short text is ~60).
    max_value_bytes: of any text, blob or table row, stored or computed.
    max_sql_bytes: of the query itself, in UTF-8.
    max_expr_depth, max_compound_selects: nesting of expressions, arms of UNION and the like.
    """

    timeout_secs: float = 5.0
    max_rows: int = 100_000
    max_cells: int = 500_000
    max_bytes: int = 64_000_000
    max_value_bytes: int = 100_000
    max_sql_bytes: int = 20_000
    max_expr_depth: int = 200
    max_compound_selects: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value!r}")


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


def open_read_only(db_path: Path) -> sqlite3.Connection:
    """A connection that cannot write, takes no lock and leaves no file beside the database."""
    _file_version(db_path)
    uri = Path(db_path).absolute().as_uri() + "?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=16
        )
    except sqlite3.Error as error:
        raise DatabaseFileError(f"{db_path}: {error}") from error
    connection.text_factory = lambda raw: raw.decode("utf-8", "ignore")
    return connection


def _file_version(db_path: Path) -> tuple:
    try:
        info = os.stat(db_path)
    except (OSError, ValueError) as error:
        raise DatabaseFileError(f"{db_path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
        raise DatabaseFileError(f"{db_path}: not a database file, or an empty one")
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def run_query(db_path: Path, sql: str, limits: QueryLimits = QueryLimits()) -> QueryResult:
    start = time.monotonic()
    deadline = start + limits.timeout_secs
    try:
        connection = open_read_only(db_path)
    except DatabaseFileError as error:
        return QueryResult(QueryStatus.ERROR, message=str(error), secs=time.monotonic() - start)
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.max_value_bytes)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    rows, columns, status, message = [], (), QueryStatus.OK, ""
    try:
        cursor = connection.execute(sql)
        columns = tuple(d[0] for d in cursor.description or ())
        for row in cursor:
            rows.append(row)
            if len(rows) > limits.max_rows:
                status, message = QueryStatus.TOO_LARGE, f"more than {limits.max_rows} rows"
                break
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, ValueError, MemoryError) as error:
        code = getattr(error, "sqlite_errorcode", None)
        status = {sqlite3.SQLITE_AUTH: QueryStatus.DENIED, sqlite3.SQLITE_INTERRUPT: QueryStatus.TIMEOUT,
                  sqlite3.SQLITE_TOOBIG: QueryStatus.TOO_LARGE}.get(code, QueryStatus.ERROR)
        message = str(error)
    finally:
        connection.close()
    secs = time.monotonic() - start
    if status is not QueryStatus.OK:
        return QueryResult(status, message=message, secs=secs)
    return QueryResult(status, tuple(rows), columns, "", secs)
