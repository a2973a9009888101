"""The sandbox: run a model's SQL on a SQLite database and get a value back, whatever the SQL is.

Every query runs in a worker process (worker.py, worker_pool.py). A query ends after a number of
virtual-machine steps, so its verdict is the same on every machine. If it takes no steps but much
time or memory, the operating system or a `kill` ends it. Results are cached, and no query runs
twice (cache.py).

What is covered. tests/test_sandbox.py and test_sandbox_bounds.py attack each line:

- Writes: INSERT, UPDATE, DELETE, REPLACE, CREATE, DROP, ALTER, REINDEX, ANALYZE, VACUUM (INTO),
  BEGIN, SAVEPOINT. The file is opened read-only and immutable. An authorizer allows four things
  only: select, read, call a function, recurse. The worker cannot write a byte into any file. Sorts
  stay in memory.
- Other files and settings: ATTACH, DETACH, PRAGMA (so also writable_schema), load_extension().
- Virtual tables and table-valued functions: pragma_...(), json_each(), dbstat, FTS and R-Tree
  tables, and sqlite_stmt, which shows the SQL of its connection. They are denied by name, also if a
  view of the file opens them.
- Work: endless recursions, cross joins, expensive functions in a loop, an expensive call whose
  alias is used often (SQLite evaluates it again at each use), the planning of 64 joined tables,
  printf() of two billion characters, functions in the file's own generated columns and views. Loops
  end at the budget of steps, everything else at the deadline.
- Memory: values, sorts and compilations that grow without end. The worker runs out of memory, this
  process does not.
- Results: too many rows, cells or bytes (`QueryConfig`). The worker fetches rows one by one and
  counts them.
- Text: NUL bytes, lone surrogates, invalid UTF-8 in the file (dropped, as the official evaluator
  does), several statements in one string, none at all, unbound parameters.
- Files: missing, empty, corrupt, a folder, a pipe: each is an ERROR. A database that another
  process has locked is read without a lock. A `-wal` or `-journal` file beside it is not read: rows
  are those of the last checkpoint. A file that was replaced or changed between two queries gives
  fresh rows.
- Load: any number of threads. At most as many queries run as there are workers; the others wait,
  and their time starts when a worker takes them.
- Ends: a worker ends with its parent, however the parent ends: at the next tick of the running
  query, or one second after its deadline. A forked child starts workers of its own.

random() and randomblob() return the same numbers for the same text, so that a run can be repeated.

What is not covered:

- The date. date('now') and similar calls return different results from day to day.
- A file that changes *while* a query reads it, or that changes and keeps its size and times.
- Long values. A stored value longer than `max_value_bytes` cannot be returned; the other columns of
  its row can.
- Bugs of SQLite itself. Code that exploits one has the rights of the user, in a process without the
  model. For databases from strangers, run the whole training in a container.
"""

import hashlib
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtsql.files import KIND_BYTES, kind_of
from mtsql.sql.cache import SharedCache
from mtsql.sql.meter import WorkMeter
from mtsql.sql.query import QueryConfig, QueryResult, QueryStatus
from mtsql.sql.runnable import runnable
from mtsql.sql.worker_pool import the_pool
from mtsql.sql.worker_process import DeadlinePassed, WorkerDied

MAX_CACHED_BYTES = 256 * 2**20
"""Limit of all cached results together, counted as Python objects."""
MAX_HASHED_BYTES = 256 * 2**20
"""A larger database file is identified by its path, size and times instead of its content."""
READ_SECS = 20.0
"""Time limit for reading the schema or the tables of a database."""
_DEFAULT = QueryConfig()
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryCopy:
    """A small database that a worker builds in its memory from the request. It needs no file.

    packed: a marshalled list of (statement, rows), as `tables.written` makes it. digest: of
    `packed`. is_reversed: the rows of each table are stored in the opposite order.
    """

    digest: bytes
    packed: bytes = field(compare=False, repr=False)
    is_reversed: bool = False


@dataclass(frozen=True)
class Mirror:
    """The database of a file with the rows of each table stored in the opposite order.

    A worker builds it in its memory. If it does not fit, each query on it is TOO_LARGE.
    """

    db_path: Path


Source = Path | MemoryCopy | Mirror
"""What a query can run on."""
TableSchema = tuple[str, list[tuple], list[tuple], bool]
"""What `read_schema` returns for a table or view."""


class DatabaseFileError(Exception):
    """The database is missing, empty, not a file or not readable. The text names it."""


def run_query(
    source: Source, sql: str, config: QueryConfig = _DEFAULT, meter: WorkMeter | None = None
) -> QueryResult:
    """Run one query as `runnable` writes it, or return its cached result. Faulty SQL or a damaged
    file does not raise an exception: the status says what happened.

    `meter` counts the query's ticks while it runs, or all of them at once if its result was cached.
    """
    try:
        if len(sql.encode()) > config.max_sql_bytes:
            message = f"the query is longer than {config.max_sql_bytes} bytes"
            return QueryResult(QueryStatus.TOO_LARGE, message=message)
        if "\0" in sql:
            return QueryResult(QueryStatus.ERROR, message="the query contains a null character")
        sql = runnable(sql)
        content, request = _source(source)
        is_urgent = meter is not None  # a row of a rollout waits for it

        def run(tick: Callable[[], None]) -> QueryResult:
            return _run(request, sql, config, is_urgent, tick)

        return _RESULTS.get((content, sql, config), run, meter)
    except (UnicodeError, DatabaseFileError) as error:  # UnicodeError: a lone surrogate in the SQL
        return QueryResult(QueryStatus.ERROR, message=str(error))


def read_schema(db_path: Path) -> list[TableSchema]:
    """(name, columns, foreign keys, whether it is virtual) of each table and view, as SQLite's
    pragmas give them (`tables.read_schema`).

    Raises DatabaseFileError.
    """
    schema: list[TableSchema] = _read("schema", db_path)
    return schema


def read_tables(
    db_path: Path, max_rows: int, max_value_bytes: int, max_bytes: int
) -> tuple[list[tuple], list[str]]:
    """(name, CREATE statement, columns, rows) of each table that can be read, within bounds, and
    the CREATE statements of indexes and views (`tables.read_tables`).

    Raises DatabaseFileError.
    """
    tables: tuple[list[tuple], list[str]] = _read(
        "tables", db_path, max_rows, max_value_bytes, max_bytes
    )
    return tables


def clear_result_cache() -> None:
    """Remove all cached results, so that a test or a benchmark can run every query again."""
    _RESULTS.clear()


def sandbox_counts() -> dict[str, int]:
    """How many queries ended at their deadline and how many workers died in this process."""
    return {"deadline": _COUNTS["deadline"], "died": the_pool().counts["died"]}


def _source(source: Source) -> tuple[tuple, tuple]:
    """-> (the key of the content, the source as the worker expects it)."""
    if isinstance(source, MemoryCopy):
        kind = "reversed copy" if source.is_reversed else "copy"
        return (kind, source.digest), (kind, source.digest, source.packed)
    if isinstance(source, Mirror):
        kind = "reversed file"
        path, version = file_version(source.db_path)
    else:
        kind = "file"
        path, version = file_version(source)
    return (kind, content_hash(path, version)), (kind, (path, version), Path(path).as_uri())


def _run(
    request: tuple, sql: str, config: QueryConfig, is_urgent: bool, tick: Callable[[], None]
) -> QueryResult:
    """Let a worker run the query, and call `tick` for each tick of it."""
    num_ticks = 0  # also known if the worker dies before it answers

    def count() -> None:
        nonlocal num_ticks
        num_ticks += 1
        tick()

    start = time.monotonic()
    # A worker that dies or is killed sends no answer, so this process writes one.
    try:
        answer: dict[str, Any] = the_pool().call(
            "query",
            request,
            sql,
            vars(config),
            timeout_secs=config.timeout_secs,
            memory_bytes=config.max_memory_bytes,
            topic=request[:2],
            is_urgent=is_urgent,
            tick=count,
            is_out_of_memory=lambda answer: answer["ending"] == "memory",
        )
    except DeadlinePassed:
        message = f"no result within {config.timeout_secs:g} seconds"
        answer = {"status": "timeout", "message": message, "ending": "deadline"}
    except WorkerDied as error:
        message = "the query was stopped: it crashed or needed too much memory"
        ending = "killed" if error.is_killed else "died"
        answer = {"status": "too_large", "message": message, "ending": ending}
    ending = answer.pop("ending")
    if ending == "open":
        raise DatabaseFileError(answer["message"])
    if ending == "deadline":
        _COUNTS["deadline"] += 1
        _LOGGER.warning(
            "a query on %s was stopped after %g s, before it had used its budget of steps: %.200r",
            "a copy" if request[0].endswith("copy") else request[2],
            config.timeout_secs,
            sql,
        )
    message = answer["message"]
    # A result is cached with the text of its query: up to 4 bytes a character, and the objects.
    num_other_bytes = 4 * len(sql) + 4 * len(message) + 1000
    return QueryResult(
        QueryStatus(answer["status"]),
        answer.get("rows", ()),
        answer.get("columns", ()),
        message,
        num_ticks=max(num_ticks, answer.get("num_ticks", 0)),
        num_bytes=answer.get("num_bytes", 0) + num_other_bytes,
        is_repeatable=ending not in ("deadline", "killed") and not _has_changed(request),
        secs=answer.get("secs", time.monotonic() - start),
    )


def _has_changed(request: tuple) -> bool:
    """Whether the file has changed since the request was made. If so, the rows may be those of
    either version."""
    if request[0].endswith("copy"):
        return False
    asked: tuple[str, tuple[int, ...]] = request[1]  # path and version
    try:
        return file_version(asked[0]) != asked
    except DatabaseFileError:
        return True


def _read(name: str, db_path: Path, *arguments: object) -> Any:
    """What a worker reads from a file with its method `name`. Raises DatabaseFileError."""
    path, _ = file_version(db_path)
    try:
        found = the_pool().call(
            name,
            Path(path).as_uri(),
            *arguments,
            timeout_secs=READ_SECS,
            memory_bytes=_DEFAULT.max_memory_bytes,
        )
    except DeadlinePassed as error:
        raise DatabaseFileError(
            f"{db_path}: cannot be read within {READ_SECS:g} seconds"
        ) from error
    except WorkerDied as error:
        raise DatabaseFileError(f"{db_path}: cannot be read: {error}") from error
    if isinstance(found, str):
        reason = _other_kind(db_path) or found
        raise DatabaseFileError(f"{db_path}: not a readable SQLite database: {reason}")
    return found


def _other_kind(db_path: Path) -> str:
    """Say what the file is, if it is a kind of file that is often found in place of a database."""
    with open(db_path, "rb") as file:
        start = file.read(KIND_BYTES)
    return "" if start.startswith(b"SQLite format 3\0") else kind_of(start)


def file_version(db_path: Path | str) -> tuple[str, tuple[int, ...]]:
    """-> (absolute path, numbers that change when the file is replaced or written to).

    Raises DatabaseFileError.
    """
    try:
        path = os.path.abspath(os.fsdecode(db_path))
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DatabaseFileError(f"{db_path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(info.st_mode):
        raise DatabaseFileError(f"{db_path}: not a file")
    if info.st_size == 0:
        raise DatabaseFileError(f"{db_path}: an empty file, no database")
    return path, (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def content_hash(path: str, version: tuple[int, ...]) -> bytes:
    """A hash of the file's bytes, which are read once for each version. Raises DatabaseFileError.

    A file of more than MAX_HASHED_BYTES is not read: its path and version stand for its content.
    """
    if version[2] > MAX_HASHED_BYTES:
        return repr((path, version)).encode("utf-8", "surrogateescape")
    return _HASHES.get((path, version), lambda _: _hash_file(path))


def _hash_file(path: str) -> bytes:
    try:
        # O_NONBLOCK: the file may have been replaced by a pipe, which would wait for a writer.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(opened, "rb") as file:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise DatabaseFileError(f"{path}: not a file")
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise DatabaseFileError(f"{path}: {error.strerror}") from error


_COUNTS: Counter[str] = Counter()
_HASHES: SharedCache[bytes] = SharedCache(2**20, lambda _: 200)
_RESULTS: SharedCache[QueryResult] = SharedCache(
    MAX_CACHED_BYTES,
    num_bytes=lambda result: result.num_bytes,
    num_ticks=lambda result: result.num_ticks,
    is_lasting=lambda result: result.is_repeatable,
)
