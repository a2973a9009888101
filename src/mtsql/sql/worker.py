"""One SQL worker: a process that runs queries for the sandbox and that the parent may kill at any
time.

It imports the standard library and two small modules, so it starts in about 30 ms and does not load
torch. It reads requests from stdin and writes replies to stdout, each as a length and a marshalled
value. A length of 0 is a tick: the running query has taken another `TICK_VM_STEPS` steps.

    request   length in 8 bytes, (timeout_secs, name of a method of Worker, argument, ...)
    reply     length in 8 bytes, (result,); () if memory ran out; a text with the traceback of a bug
    tick      0 in 8 bytes, any number of times before a reply

The process ends when stdin is closed, which also happens when the parent dies. In the middle of a
query it ends at the next tick, or by its alarm if no tick comes.

Four limits hold for the process:

- The operating system bounds its memory.
- SQLite has a memory limit of its own, which is lower.
- The process cannot write a byte into any file.
- The parent kills it at the query's deadline.

Each connection has further limits (connection.py).
"""

import marshal
import os
import resource
import signal
import sqlite3
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

from mtsql.sql.connection import (
    DENIED,
    ERROR,
    OK,
    STATUS_OF_CODE,
    TIMEOUT,
    TOO_LARGE,
    UNREADABLE,
    Clock,
    Refusal,
    SandboxConnection,
    is_out_of_memory,
    open_file,
    open_memory,
    tick_steps,
)
from mtsql.sql.tables import read_schema, read_tables, written

MAX_CONNECTIONS = 64
"""How many connections a worker keeps open. It closes the least recently used one first."""
ALARM_SECS = 1.0
"""Seconds from a query's deadline to the end of this process. Usually the parent has killed it
before; the alarm is needed if the parent has ended."""
MAX_MESSAGE_CHARS = 1000
"""A longer error message is shortened."""
MARSHAL_VERSION = 2


class Worker:
    """Handles requests one after the other. The parent names one of the public methods and its
    arguments."""

    def __init__(self, replies: int) -> None:
        self.clock = Clock(lambda: _tick(replies))
        max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(1, min(MAX_CONNECTIONS, max_files // 2))
        self.kept: OrderedDict[tuple, SandboxConnection] = OrderedDict()

    def query(self, source: tuple, sql: str, config: dict) -> dict:
        """-> status, rows, columns, message, secs, num_ticks, num_bytes (of the rows) and ending.

        ending: "open" if the database cannot be opened, "memory" if memory ran out, "deadline" if
        the clock ended the query, else "".
        """
        max_ticks, _ = tick_steps(config["max_vm_steps"])
        self.clock.start(max_ticks, config["timeout_secs"])
        answer: dict = {
            "status": OK,
            "columns": (),
            "message": "",
            "num_bytes": 0,
            "ending": "",
        }
        rows: list[tuple] = []
        sandbox = None
        try:
            sandbox = self._sandbox(source)
            sandbox.configure(config)
            rows, columns, num_bytes = sandbox.run(sql, config)
            answer |= {"columns": columns, "num_bytes": num_bytes}
        except Refusal as error:
            answer |= {"status": error.status, "message": str(error)}
        except MemoryError:
            answer |= {"status": TOO_LARGE, "message": "out of memory", "ending": "memory"}
        except (*UNREADABLE, sqlite3.Warning) as error:
            answer |= {"status": _status_of(error), "message": str(error)}
            if is_out_of_memory(error):
                answer["ending"] = "memory"
            elif sandbox is None:
                answer["ending"] = "open"
            elif sandbox.is_denied:
                answer["status"] = DENIED
                answer["message"] = f"only SELECT is allowed here: {error}"
        answer["secs"] = time.monotonic() - self.clock.started
        answer["num_ticks"] = self.clock.num_ticks
        if answer["status"] == TIMEOUT and self.clock.is_late:
            answer["message"] = f"no result within {config['timeout_secs']:g} seconds"
            answer["ending"] = "deadline"
        elif answer["status"] == TIMEOUT:
            max_steps = config["max_vm_steps"]
            answer["message"] = f"no result within {max_steps} steps of SQLite's virtual machine"
        answer["message"] = answer["message"][:MAX_MESSAGE_CHARS]
        answer["rows"] = tuple(rows)
        return answer

    def schema(self, uri: str) -> list | tuple | str:
        """What `read_schema` finds in a file, or SQLite's message if the file cannot be read."""
        return self._read(uri, read_schema)

    def tables(
        self, uri: str, max_rows: int, max_value_bytes: int, max_bytes: int
    ) -> list | tuple | str:
        """What `read_tables` finds in a file, or SQLite's message if the file cannot be read."""

        def read(connection: sqlite3.Connection) -> tuple:
            return read_tables(connection, max_rows, max_value_bytes, max_bytes)

        return self._read(uri, read)

    def _read(
        self, uri: str, read: Callable[[sqlite3.Connection], list | tuple]
    ) -> list | tuple | str:
        connection = None
        try:
            connection = open_file(uri)
            return read(connection)
        except UNREADABLE as error:
            return str(error)
        except MemoryError:
            return "out of memory"
        finally:
            if connection is not None:
                connection.close()

    def _sandbox(self, source: tuple) -> SandboxConnection:
        """The connection to a source, kept from an earlier query or opened now.

        source: ("file", key, URI), ("copy", key, packed tables), or either with "reversed " before
        its kind, for the rows of each table in the opposite order.
        """
        kind, key, content = source
        sandbox = self.kept.get((kind, key))
        if sandbox is None:
            while len(self.kept) >= self.max_connections:
                _, oldest = self.kept.popitem(last=False)
                oldest.connection.close()
            if kind.endswith("file"):
                connection = open_file(content)
            else:
                connection = open_memory(marshal.loads(content))
            if kind.startswith("reversed"):
                tables, others = read_tables(connection)
                connection.close()
                connection = open_memory(written(tables, others, is_reversed=True))
            sandbox = SandboxConnection(connection, self.clock)
            self.kept[kind, key] = sandbox
        self.kept.move_to_end((kind, key))
        return sandbox


def _status_of(error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return ERROR
    # The low byte is the kind of the error, the rest its detail.
    return STATUS_OF_CODE.get(code & 0xFF, ERROR)


def _limit(memory_bytes: int) -> None:
    """Limit this process from now on: `memory_bytes` more memory than it has (on Linux), no byte
    into any file, no core dump."""
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as statm:
            num_pages = int(statm.read().split()[0])
        limits[resource.RLIMIT_AS] = num_pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    connection = sqlite3.connect(":memory:")
    connection.execute(f"PRAGMA hard_heap_limit = {memory_bytes // 2}").close()
    connection.close()


def _read_exactly(file: int, size: int) -> bytes:
    """`size` bytes, or fewer if the file ends before."""
    pieces = []
    while size > 0:
        piece = os.read(file, min(size, 1 << 20))
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def write_message(file: int, value: tuple | str) -> None:
    """Write a value after its length. OSError (a broken pipe) if the reader has ended."""
    rest = memoryview(packed_message(value))
    while rest:
        num_written = os.write(file, rest)
        rest = rest[num_written:]


def packed_message(value: tuple | str) -> bytes:
    """A marshalled value after its length."""
    body = marshal.dumps(value, MARSHAL_VERSION)
    return len(body).to_bytes(8, "little") + body


def _tick(replies: int) -> None:
    try:
        os.write(replies, b"\0" * 8)
    except OSError:  # the parent is gone
        os._exit(0)


def _tell_fault(
    replies: int, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Send the traceback of a bug to the parent, which raises it. stderr is not used, because it
    may be a file, and this process cannot write files."""
    import traceback

    write_message(replies, "".join(traceback.format_exception(kind, error, trace)))


def main() -> None:
    """Serve until stdin ends. The only argument is the memory it may take, in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have set it to be ignored
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    requests, replies = os.dup(0), os.dup(1)
    sys.excepthook = lambda *error: _tell_fault(replies, *error)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    worker = Worker(replies)
    _limit(int(sys.argv[1]))
    write_message(replies, "ready")
    while head := _read_exactly(requests, 8):
        try:
            body = _read_exactly(requests, int.from_bytes(head, "little"))
            timeout_secs, name, *arguments = marshal.loads(body)
            # SIGALRM ends the process.
            signal.setitimer(signal.ITIMER_REAL, timeout_secs + ALARM_SECS)
            write_message(replies, (getattr(worker, name)(*arguments),))
        except MemoryError:  # while a request was read or a result was packed
            write_message(replies, ())
        except OSError:  # the parent is gone
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
