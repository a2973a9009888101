"""One SQL worker as its parent sees it: a process, two pipes, and a deadline for each request."""

import marshal
import os
import select
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path

GRACE_SECS = 0.1
"""Seconds from the deadline until the parent kills a worker. Meanwhile the worker may still end the
query itself at its next tick."""
START_SECS = 120.0
"""Seconds that a new worker may take until it is ready. It takes 0.03 s on an idle machine."""
MAX_POLL_MS = 1_000_000
PIPE_BYTES = 4096
"""Number of bytes that a pipe accepts without waiting once it is ready (PIPE_BUF)."""
_SOURCES = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append(sys.argv.pop(1)); from mtsql.sql.worker import main; main()"


class WorkerDied(Exception):
    """The worker ended in the middle of a request. The text says how.

    is_killed: whether it ended by a signal that nothing in a worker sends. The sender may be the
    system's out-of-memory killer or a person, so the signal says nothing about the request.
    """

    def __init__(self, how: str, is_killed: bool = False) -> None:
        super().__init__(how)
        self.is_killed = is_killed


class DeadlinePassed(Exception):
    """The worker did not answer in time, and was killed."""


class WorkerProcess:
    """One worker process and its two pipes. Only the thread that took it from the pool may use
    it.

    served: the topics of its latest requests, the latest last.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.is_fresh = True
        self.served: OrderedDict[Hashable, None] = OrderedDict()
        self._buffer = bytearray()
        # -I -S: nothing from the environment, the working folder or site-packages is imported.
        self.command = [sys.executable, "-I", "-S", "-c", _START, _SOURCES, str(memory_bytes)]
        # start_new_session: Ctrl-C in a terminal reaches the parent only.
        # No stderr: a program that reads the parent's stderr to its end would also wait for the
        # worker.
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            cwd=os.sep,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self._requests = self.process.stdin
        self._replies = self.process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._readable = select.poll()
        self._readable.register(self._replies, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._requests, select.POLLOUT)

    def wait_until_ready(self) -> None:
        """Wait for the first message. RuntimeError if the process does not start, WorkerDied if
        something kills it meanwhile."""
        try:
            self._receive(time.monotonic() + START_SECS, lambda: None)
        except (WorkerDied, DeadlinePassed) as error:
            if getattr(error, "is_killed", False):
                raise
            why = str(error) or f"it was not ready after {START_SECS:g} seconds"
            command = " ".join(self.command)
            raise RuntimeError(f"a SQL worker could not be started ({command}): {why}") from error

    def ask(self, message: bytes, timeout_secs: float, tick: Callable[[], None]) -> tuple | str:
        """Send a packed request and wait for its answer. `tick` is called for each tick. The time
        limit starts here."""
        deadline = time.monotonic() + max(0.0, timeout_secs) + GRACE_SECS
        try:
            rest = memoryview(message)
            while rest:
                self._wait(self._writable, deadline)
                num_written = os.write(self._requests.fileno(), rest[:PIPE_BYTES])
                rest = rest[num_written:]
        except OSError:  # it died while it was idle
            raise self._died() from None
        return self._receive(deadline, tick)

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.close_pipes()

    def close_pipes(self) -> None:
        """Close the pipes. An idle worker then ends by itself."""
        self._requests.close()
        self._replies.close()

    def _receive(self, deadline: float, tick: Callable[[], None]) -> tuple | str:
        """Read ticks until a value is complete. One message is read at a time, so nothing follows
        the value in the buffer."""
        buffer = self._buffer
        output = self._replies.fileno()
        while True:
            if len(buffer) >= 8:
                size = int.from_bytes(buffer[:8], "little")
                if size == 0:
                    del buffer[:8]
                    tick()
                    continue
                if len(buffer) >= 8 + size:
                    value: tuple | str = marshal.loads(memoryview(buffer)[8 : 8 + size])
                    self._buffer = bytearray()
                    return value
            self._wait(self._readable, deadline)
            piece = os.read(output, 1 << 20)
            if not piece:
                raise self._died()
            buffer += piece

    def _wait(self, pipe: select.poll, deadline: float) -> None:
        """Wait until the pipe is ready. Writing needs a deadline, too: a worker that has been
        stopped by a signal does not read."""
        while True:
            ms_left = 1000 * (deadline - time.monotonic()) + 1
            if pipe.poll(max(0, min(ms_left, MAX_POLL_MS))):
                return
            if time.monotonic() > deadline:
                self.kill()
                raise DeadlinePassed

    def _died(self) -> WorkerDied:
        code = self.process.wait()  # its pipes are closed: it has ended, or is about to
        self.close_pipes()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerDied(how, code in (-signal.SIGKILL, -signal.SIGTERM))
