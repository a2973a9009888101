"""One SQL worker: a process that runs queries for the sandbox and that the parent may kill at any
time.

It imports the standard library and two small modules, so it starts in about 30 ms and does not load
torch. It reads requests from stdin and writes replies to stdout, each as a length and a marshalled
value. A length of 0 is a tick: the running query has taken another `TICK_VM_STEPS` steps. The
process ends when stdin is closed, which also happens when the parent dies. In the middle of a query
it ends at the next tick, or by its alarm if no tick comes.

Four limits hold for the process: the operating system bounds its memory, SQLite's own limit lies
below that, it cannot write a byte into any file, and the parent kills it at the query's deadline.
Further limits belong to each connection (connection.py).
"""

import marshal
import os
import resource
import signal
import sqlite3
import sys
import time
from collections import OrderedDict

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
"""How many connections a worker keeps open. It closes the least recently used first."""
ALARM_SECS = 1.0
"""This process ends itself so many seconds after a query's deadline. Usually the parent has killed
it before; the alarm is for a parent that is gone."""
MAX_MESSAGE_CHARS = 1000
"""A longer error message is cut."""
MARSHAL_VERSION = 2


class Worker:
    """Handles requests one after the other. The parent names one of the public methods and its
    arguments."""

    def __init__(self, replies: int) -> None:
        self.clock = Clock(lambda: _tick(replies))
        self.max_connections = max(
            1, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        )
        self.kept: OrderedDict[tuple, SandboxConnection] = OrderedDict()

    def query(self, source: tuple, sql: str, config: dict) -> dict:
        """-> status, rows, columns, message, secs, num_ticks, num_bytes (of the rows) and ending.

        ending: "open" if the database cannot be opened, "memory" if memory ran out, "deadline" if
        the clock ended the query, else "".
        """
        max_ticks, _ = tick_steps(config["max_vm_steps"])
        self.clock.start(max_ticks, config["timeout_secs"])
        sandbox, rows, columns, num_bytes, ending = None, [], (), 0, ""
        status, message = OK, ""
        try:
            sandbox = self._sandbox(source)
            sandbox.configure(config)
            rows, columns, num_bytes = sandbox.run(sql, config)
        except Refusal as error:
            status, message = error.status, str(error)
        except MemoryError:
            status, message, ending = TOO_LARGE, "out of memory", "memory"
        except (*UNREADABLE, sqlite3.Warning) as error:
            code = getattr(error, "sqlite_errorcode", None)
            # The low byte is the kind of the error, the rest its detail.
            status, message = (
                ERROR if code is None else STATUS_OF_CODE.get(code & 0xFF, ERROR),
                str(error),
            )
            if is_out_of_memory(error):
                ending = "memory"
            elif sandbox is None:
                ending = "open"
            elif sandbox.is_denied:
                status, message = DENIED, f"only SELECT is allowed here: {error}"
        secs = time.monotonic() - self.clock.started
        if status == TIMEOUT and self.clock.is_late:
            message, ending = f"no result within {config['timeout_secs']:g} seconds", "deadline"
        elif status == TIMEOUT:
            message = f"no result within {config['max_vm_steps']} steps of SQLite's virtual machine"
        return {
            "status": status,
            "rows": tuple(rows),
            "columns": columns,
            "message": message[:MAX_MESSAGE_CHARS],
            "secs": secs,
            "num_ticks": self.clock.num_ticks,
            "num_bytes": num_bytes,
            "ending": ending,
        }

    def schema(self, uri: str) -> list | str:
        """What `read_schema` finds in a file, or SQLite's words where it cannot be read."""
        return self._read(uri, read_schema)

    def tables(self, uri: str, max_rows: int, max_value_bytes: int, max_bytes: int) -> tuple | str:
        """What `read_tables` finds in a file, or SQLite's words where it cannot be read."""
        return self._read(
            uri, lambda connection: read_tables(connection, max_rows, max_value_bytes, max_bytes)
        )

    def _read(self, uri: str, read) -> list | tuple | str:
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
        kind, key, content = source
        sandbox = self.kept.get((kind, key))
        if sandbox is None:
            while len(self.kept) >= self.max_connections:
                self.kept.popitem(last=False)[1].connection.close()
            if kind.endswith("file"):
                connection = open_file(content)
            else:
                connection = open_memory(marshal.loads(content))
            if kind.startswith("reversed"):
                original = connection
                tables, others = read_tables(original)
                original.close()
                connection = open_memory(written(tables, others, is_reversed=True))
            sandbox = self.kept[kind, key] = SandboxConnection(connection, self.clock)
        self.kept.move_to_end((kind, key))
        return sandbox


def _limit(memory_bytes: int) -> None:
    """From here on: no more memory than that (on Linux), no byte into any file, no core dump."""
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as statm:
            limits[resource.RLIMIT_AS] = (
                int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory_bytes
            )
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    connection = sqlite3.connect(":memory:")
    connection.execute(f"PRAGMA hard_heap_limit = {memory_bytes // 2}").close()
    connection.close()


def _read_exactly(file: int, size: int) -> bytes:
    """Fewer bytes at the end of the file."""
    pieces = []
    while size > 0 and (piece := os.read(file, min(size, 1 << 20))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def write_message(file: int, value: object) -> None:
    """Length and value; OSError (a broken pipe) where the other side is gone."""
    body = marshal.dumps(value, MARSHAL_VERSION)
    rest = memoryview(len(body).to_bytes(8, "little") + body)
    while rest:
        rest = rest[os.write(file, rest) :]


def _tick(replies: int) -> None:
    try:
        os.write(replies, b"\0" * 8)
    except OSError:  # the parent is gone
        os._exit(0)


def _tell_fault(replies: int, kind: type, error: BaseException, trace: object) -> None:
    """Send the traceback of a bug to the parent, which raises it. (stderr may be a file, and
    files cannot be written.)"""
    import traceback

    write_message(replies, "".join(traceback.format_exception(kind, error, trace)))


def main() -> None:
    """Serve until stdin ends. The only argument is the memory it may take, in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the parent does with it
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
            timeout_secs, name, *arguments = marshal.loads(
                _read_exactly(requests, int.from_bytes(head, "little"))
            )
            # SIGALRM ends the process.
            signal.setitimer(signal.ITIMER_REAL, timeout_secs + ALARM_SECS)
            write_message(replies, (getattr(worker, name)(*arguments),))
        except MemoryError:  # while a request was read or a result was packed
            write_message(replies, ())
        except OSError:  # the parent is gone
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
