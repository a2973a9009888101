"""A cache that threads share: a value is computed once, even when several threads ask for it at
the same time."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, TypeVar

from mtsql.sql.meter import WAKE_SECS, WorkMeter

V = TypeVar("V")


class _Pending(Generic[V]):
    """A value that is being computed, and the meters of the threads that wait for it.

    value: exists once `is_made` is True.
    """

    value: V

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.is_made = False
        self.meters: list[WorkMeter] = []
        self.num_ticks = 0


class SharedCache(Generic[V]):
    """A least-recently-used cache, safe for threads, bounded by the bytes of its values.

    max_bytes: of all values together. A value of more than a quarter of it is returned but not
    stored.
    num_bytes: a function that gives the size of a value.
    num_ticks: a function that gives what a value cost to compute. A cache hit adds this cost to the
    meter of the thread that asked.
    is_lasting: a function that says whether a value may be stored. If not, only the threads that
    ask while it is computed share it.
    """

    def __init__(
        self,
        max_bytes: int,
        num_bytes: Callable[[V], int],
        num_ticks: Callable[[V], int] = lambda _: 0,
        is_lasting: Callable[[V], bool] = lambda _: True,
    ) -> None:
        self.max_bytes = max_bytes
        self.bytes_stored = 0
        self._num_bytes = num_bytes
        self._num_ticks = num_ticks
        self._is_lasting = is_lasting
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._pending: dict[Hashable, _Pending[V]] = {}
        _ALL.add(self)

    def get(
        self, key: Hashable, make: Callable[[Callable[[], None]], V], meter: WorkMeter | None = None
    ) -> V:
        """The value of `key`: stored, or being computed by another thread, or computed here by
        `make(tick)`.

        `make` calls `tick()` while it works. If it raises, each waiting thread calls its own
        `make`.
        """
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    if meter is not None:
                        meter.add(self._num_ticks(self._values[key]))
                    return self._values[key]
            mine: _Pending[V] = _Pending()
            try:
                with self._lock:
                    if key in self._values:  # another thread has stored it meanwhile
                        continue
                    pending = self._pending.setdefault(key, mine)
                    if meter is not None:
                        meter.add(pending.num_ticks)
                        pending.meters.append(meter)
                if pending is mine:
                    mine.value = make(partial(self._tick, mine))
                    mine.is_made = True
            finally:
                self._end(key, mine)
            if pending is mine:
                return mine.value
            while not pending.ended.wait(WAKE_SECS):
                pass
            if pending.is_made:
                return pending.value

    def clear(self) -> None:
        """Remove every stored value."""
        with self._lock:
            self._values.clear()
            self.bytes_stored = 0

    def start_afresh(self) -> None:
        """Start empty in a forked child, because the threads that compute values exist in the
        parent only."""
        self._lock = threading.Lock()
        self._values = OrderedDict()
        self._pending = {}
        self.bytes_stored = 0

    def _tick(self, pending: _Pending[V]) -> None:
        with self._lock:
            pending.num_ticks += 1
            meters = list(pending.meters)
        for meter in meters:
            meter.add()

    def _end(self, key: Hashable, mine: _Pending[V]) -> None:
        """If this thread was computing the value, store it or discard the attempt, and wake the
        threads that wait for it."""
        with self._lock:
            if self._pending.get(key) is not mine:
                return
            del self._pending[key]
            try:
                if mine.is_made:
                    self._store(key, mine.value)
                else:
                    # The ticks of a failed attempt belong to no result, so no meter keeps them.
                    for meter in mine.meters:
                        meter.add(-mine.num_ticks)
            finally:
                mine.ended.set()

    def _store(self, key: Hashable, value: V) -> None:
        size = self._num_bytes(value)
        if size * 4 > self.max_bytes or not self._is_lasting(value):
            return
        self._values[key] = value
        self.bytes_stored += size
        while self.bytes_stored > self.max_bytes:
            _, oldest = self._values.popitem(last=False)
            self.bytes_stored -= self._num_bytes(oldest)


_ALL: weakref.WeakSet[SharedCache] = weakref.WeakSet()


def _start_afresh() -> None:
    for cache in _ALL:
        cache.start_afresh()


os.register_at_fork(after_in_child=_start_afresh)
