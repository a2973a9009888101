"""Values that are made once: whoever asks while one is being made waits for it, and the last used ones are kept."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Meter:
    """Counts the ticks (`connection.TICK_VM_STEPS`) of the queries that one piece of work runs, also of those whose result
    was kept: the same number whatever ran before. Whoever waits for the work may go on after so many ticks."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_ticks = 0
        self._is_done = False

    def add(self, num_ticks: int = 1) -> None:
        """A query of the work has taken so many more ticks."""
        with self._condition:
            self._num_ticks += num_ticks
            self._condition.notify_all()

    def finish(self) -> None:
        """The work is done: no tick follows."""
        with self._condition:
            self._is_done = True
            self._condition.notify_all()

    def is_done_within(self, num_ticks: int) -> bool:
        """Whether the work takes at most so many ticks in all. Waits until that is known."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_done or self._num_ticks > num_ticks)
            return self._num_ticks <= num_ticks


class _Making(Generic[V]):
    """A value in the making, and the meters of those who wait for it."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.value: V | None = None
        self.is_made = False
        self.meters: list[Meter] = []
        self.num_ticks = 0


class Kept(Generic[V]):
    """A cache by key, safe for threads, bounded by the bytes of its values.

    max_bytes: of all values together; one that takes more than a quarter of them is not kept.
    num_bytes: of a value. num_ticks: what the making of a value took, for the meters of those who find it kept.
    """

    def __init__(
        self, max_bytes: int, num_bytes: Callable[[V], int], num_ticks: Callable[[V], int] = lambda _: 0
    ) -> None:
        self.max_bytes, self._num_bytes, self._num_ticks = max_bytes, num_bytes, num_ticks
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._making: dict[Hashable, _Making[V]] = {}
        self.bytes_kept = 0
        _ALL.add(self)

    def get(self, key: Hashable, make: Callable[[Callable[[], None]], V], meter: Meter | None = None) -> V:
        """The value of a key, from `make(tick)` if nobody has it. Where `make` raises, those who wait try themselves."""
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    value = self._values[key]
                    break
                making = self._making.get(key)
                is_mine = making is None
                if is_mine:
                    making = self._making[key] = _Making()
                if meter is not None:
                    meter.add(making.num_ticks)
                    making.meters.append(meter)
            if is_mine:
                return self._make(key, making, make)
            making.ended.wait()
            if making.is_made:
                return making.value
        if meter is not None:
            meter.add(self._num_ticks(value))
        return value

    def clear(self) -> None:
        """Forget what is kept."""
        with self._lock:
            self._values.clear()
            self.bytes_kept = 0

    def start_afresh(self) -> None:
        """In a forked child: whoever made a value there stayed behind."""
        self._lock = threading.Lock()
        self._values, self._making, self.bytes_kept = OrderedDict(), {}, 0

    def _make(self, key: Hashable, making: _Making[V], make: Callable[[Callable[[], None]], V]) -> V:
        def tick() -> None:
            with self._lock:
                making.num_ticks += 1
                meters = list(making.meters)
            for meter in meters:
                meter.add()

        is_made = False
        try:
            value = make(tick)
            is_made = True
        finally:
            with self._lock:
                del self._making[key]
                if is_made:
                    self._keep(key, value)
            if is_made:
                making.value, making.is_made = value, True
            making.ended.set()
        return value

    def _keep(self, key: Hashable, value: V) -> None:
        size = self._num_bytes(value)
        if size * 4 > self.max_bytes:
            return
        self._values[key] = value
        self.bytes_kept += size
        while self.bytes_kept > self.max_bytes:
            self.bytes_kept -= self._num_bytes(self._values.popitem(last=False)[1])



_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()


def _start_afresh() -> None:
    for kept in _ALL:
        kept.start_afresh()


os.register_at_fork(after_in_child=_start_afresh)
