"""A pool of SQL worker processes, each of which may be killed at any time: the parent's side.

A worker is started when a request comes and no worker is idle, up to the size of the pool. It
serves one request at a time. A worker that does not answer by the request's deadline is killed. A
worker that died is replaced. Neither disturbs other requests. This module does not depend on SQL.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mtsql.sql.meter import WAKE_SECS
from mtsql.sql.worker import MAX_CONNECTIONS, packed_message
from mtsql.sql.worker_process import DeadlinePassed, WorkerDied, WorkerProcess

LOCK_SECS = 2.0
"""Longest wait for the pool's lock at the end of the process."""
NUM_TRIES = 3
"""How many workers are tried for one request if something outside kills them, and how often the
start of a worker is tried."""


class QueriesStopped(Exception):
    """All queries of this process were stopped: at Ctrl-C, or because of a bug in another
    thread."""


class WorkerPool:
    """At most `size` workers. Further requests wait; their time starts when a worker takes them.

    counts: how often a worker was killed at a deadline ("killed"), died by itself ("died") or ran
    out of memory ("memory").
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a pool of SQL workers needs at least 1 worker, found {size}")
        self.size = size
        self.counts: Counter[str] = Counter()
        # A plain lock, entered in C: Ctrl-C cannot come between taking it and its `with` block.
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._idle: list[WorkerProcess] = []  # the most recently used last
        self._all: set[WorkerProcess] = set()
        self._num_urgent = 0  # urgent requests that wait for a worker
        self._num_stops = 0
        self._is_stopped = False

    def call(
        self,
        name: str,
        *arguments: object,
        timeout_secs: float,
        memory_bytes: int,
        topic: Hashable = None,
        is_urgent: bool = False,
        tick: Callable[[], None] = lambda: None,
        is_out_of_memory: Callable[[Any], bool] = lambda _: False,
    ) -> Any:
        """Let a worker call its method `name(*arguments)` and return the result.

        topic: an idle worker that has served this topic before is preferred.
        is_urgent: this request is served before waiting requests that are not urgent.
        tick: is called for each tick of the worker.
        is_out_of_memory: whether a result shows that the worker ran out of memory.

        A worker that dies, or runs out of memory, is replaced. If it had served other requests
        before, or was killed from outside, this request is tried again on a new worker, in the time
        that is left, so that no verdict depends on earlier requests. The second try reports only
        those ticks that the first did not. Raises DeadlinePassed, WorkerDied, QueriesStopped, and
        RuntimeError with the worker's traceback for a bug.
        """
        message = packed_message((timeout_secs, name, *arguments))
        num_stops = self._num_stops
        num_told = 0  # ticks that were reported to the caller, by all tries together
        secs_left = timeout_secs
        for number in range(NUM_TRIES):
            num_ticks = 0

            def count() -> None:
                nonlocal num_ticks, num_told
                num_ticks += 1
                if num_ticks > num_told:
                    num_told = num_ticks
                    tick()

            worker = None
            was_fresh = True
            is_sound = False
            start = time.monotonic()
            try:
                worker = self._take(memory_bytes, topic, is_urgent, number > 0, num_stops)
                was_fresh = worker.is_fresh
                worker.is_fresh = False
                start = time.monotonic()
                reply = worker.ask(message, secs_left, count)
                if isinstance(reply, str):
                    raise RuntimeError(f"a SQL worker failed: {reply}")
                is_sound = bool(reply) and not is_out_of_memory(*reply)
            except WorkerDied as error:
                if self._num_stops > num_stops:
                    raise QueriesStopped from None
                self._count("died")
                if number + 1 == NUM_TRIES or (was_fresh and not error.is_killed):
                    raise
                continue
            except DeadlinePassed:
                self._count("killed")
                raise
            finally:
                secs_left -= time.monotonic() - start
                if worker is not None:
                    self._give(worker, is_sound, topic)
            if is_sound:
                return reply[0]
            self._count("memory")
            if was_fresh and reply:
                return reply[0]
            if was_fresh:
                raise WorkerDied("no memory for the result")
            # Memory that earlier requests took may be the cause, so a fresh worker tries again.
        raise AssertionError("the last try returns or raises")

    def stop(self) -> None:
        """Kill every worker. Requests that run, wait or come later raise QueriesStopped, until
        `resume`."""
        self._num_stops += 1
        self._is_stopped = True
        # The workers are ended even without the lock, so that the process cannot hang at its end.
        is_locked = self._lock.acquire(timeout=LOCK_SECS)
        idle = self._idle
        self._idle = []
        busy = self._all.difference(idle)
        self._all.difference_update(idle)
        if is_locked:
            self._condition.notify_all()
            self._lock.release()
        for worker in busy:
            worker.process.kill()
        for worker in idle:
            worker.kill()

    def resume(self) -> None:
        """Accept requests again after `stop`."""
        with self._lock:
            self._is_stopped = False

    def resize(self, size: int) -> None:
        """Have at most `size` workers from now on. Surplus ones end when they are idle."""
        with self._lock:
            self.size = size
            surplus = self._idle[: max(0, len(self._all) - size)]
            self._idle = self._idle[len(surplus) :]
            self._all.difference_update(surplus)
            self._condition.notify_all()
        for worker in surplus:
            worker.kill()

    def abandon(self) -> None:
        """In a forked child: close this process's copies of the pipes. The workers still serve the
        parent."""
        for worker in self._all:
            worker.close_pipes()
            worker.process.returncode = 0  # not a child of this process: Popen must not wait for it

    def _take(
        self,
        memory_bytes: int,
        topic: Hashable,
        is_urgent: bool,
        must_be_fresh: bool,
        num_stops: int,
    ) -> WorkerProcess:
        """A worker for one request: an idle one, or a new one as soon as the pool has room.

        num_stops: how often the pool had been stopped when the request was made. If it was stopped
        since then, the request ends.
        """
        replaced = None
        with self._lock:
            self._num_urgent += is_urgent
            try:
                while True:
                    if self._is_stopped or self._num_stops > num_stops:
                        raise QueriesStopped
                    if is_urgent or not self._num_urgent:
                        worker = None if must_be_fresh else self._idle_worker(memory_bytes, topic)
                        if worker is not None:
                            self._idle.remove(worker)
                            return worker
                        if len(self._all) < self.size:
                            break
                        if self._idle:  # none of them fits, so the new worker takes a place
                            replaced = self._idle.pop(0)
                            self._all.discard(replaced)
                            break
                    self._condition.wait(WAKE_SECS)
            finally:
                self._num_urgent -= is_urgent
                if is_urgent:
                    self._condition.notify_all()
            worker = self._new_worker(memory_bytes)
        if replaced is not None:
            replaced.kill()
        return self._started(worker, memory_bytes, num_stops)

    def _idle_worker(self, memory_bytes: int, topic: Hashable) -> WorkerProcess | None:
        """The most recently used idle worker of this size that has served the topic, or else the
        most recently used one. The lock must be held."""
        fitting = [worker for worker in self._idle if worker.memory_bytes == memory_bytes]
        for worker in reversed(fitting):
            if topic in worker.served:
                return worker
        return fitting[-1] if fitting else None

    def _started(self, worker: WorkerProcess, memory_bytes: int, num_stops: int) -> WorkerProcess:
        """The worker when it is ready, or another one if something outside kills it before."""
        for number in range(NUM_TRIES):
            is_ready = False
            try:
                worker.wait_until_ready()
                is_ready = True
                return worker
            except (RuntimeError, WorkerDied):
                if self._num_stops > num_stops:
                    raise QueriesStopped from None
                if number + 1 == NUM_TRIES:
                    raise
            finally:
                if not is_ready:
                    self._give(worker, False, None)
            with self._lock:
                worker = self._new_worker(memory_bytes)
        raise AssertionError("the last try returns or raises")

    def _new_worker(self, memory_bytes: int) -> WorkerProcess:
        """A worker that `stop` and a forked child find from its start. The lock must be held."""
        worker = WorkerProcess(memory_bytes)
        self._all.add(worker)
        return worker

    def _give(self, worker: WorkerProcess, is_sound: bool, topic: Hashable) -> None:
        """Return a worker to the pool after a request, or end it if it must not serve again."""
        is_sound = is_sound and len(self._all) <= self.size and not self._is_stopped
        if not is_sound and worker.process.returncode is None:
            worker.kill()
        with self._lock:
            if is_sound:
                worker.served[topic] = None
                worker.served.move_to_end(topic)
                if len(worker.served) > MAX_CONNECTIONS:
                    worker.served.popitem(last=False)
                self._idle.append(worker)
            else:
                self._all.discard(worker)
            # Waking one waiting thread is enough, unless that thread has to let an urgent one pass.
            if self._num_urgent:
                self._condition.notify_all()
            else:
                self._condition.notify()

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


def default_size() -> int:
    """As many workers as this process has processors, or its share of them if several ranks use
    this machine."""
    if hasattr(os, "sched_getaffinity"):
        num_processors = len(os.sched_getaffinity(0))
    else:
        num_processors = os.cpu_count() or 1
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, num_processors // num_ranks)


_POOLS: list[WorkerPool] = []
"""The pool of this process; empty until the first query."""
_POOL_LOCK = threading.Lock()


def the_pool() -> WorkerPool:
    """The pool that all queries of this process share."""
    if not _POOLS:
        with _POOL_LOCK:
            if not _POOLS:
                _POOLS.append(WorkerPool(default_size()))
    return _POOLS[0]


def set_num_workers(size: int) -> None:
    """Set how many workers this process may have at a time; 0: as many as it has processors.
    ValueError if negative."""
    if size < 0:
        raise ValueError(f"the number of SQL workers must not be negative, found {size}")
    the_pool().resize(size or default_size())


def stop_queries() -> None:
    """End all queries, also those that wait, because the process ends."""
    if _POOLS:
        _POOLS[0].stop()


@contextmanager
def query_threads(num_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for work that runs queries. If the block raises, also at Ctrl-C, running queries are
    stopped and further work is cancelled, so that nothing waits for it."""
    threads = ThreadPoolExecutor(num_threads, name)
    is_complete = False
    try:
        yield threads
        is_complete = True
    finally:
        if not is_complete:
            the_pool().stop()
            threads.shutdown(cancel_futures=True)
            the_pool().resume()
        threads.shutdown()


def _forget() -> None:
    """Start without workers in a forked child, because the parent's workers serve the parent."""
    global _POOL_LOCK
    _POOL_LOCK = threading.Lock()
    for pool in _POOLS:
        pool.abandon()
    _POOLS.clear()


# Queries must end before the process waits for its threads, which may wait for a query. Handlers of
# the public atexit run after that wait; concurrent.futures uses this private one for its threads.
threading._register_atexit(stop_queries)  # type: ignore[attr-defined]  # private, see above
os.register_at_fork(after_in_child=_forget)
