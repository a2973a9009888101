"""Ranks that are threads of one process, for what runs on several ranks without a model."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mtsql.run.ranks import Ranks

T = TypeVar("T")
WAIT_SECS = 20.0


@dataclass
class Meeting:
    """Where the ranks exchange what they have."""

    barrier: threading.Barrier
    values: list[Any]


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Exchanges values in memory."""

    meeting: Meeting = field(default_factory=lambda: Meeting(threading.Barrier(1), [None]))

    def _to_all(self, value: Any) -> Any:
        return self._from_all(value)[0]

    def _from_all(self, value: Any) -> list[Any]:
        self.meeting.values[self.index] = value
        self.meeting.barrier.wait(WAIT_SECS)
        values = list(self.meeting.values)
        self.meeting.barrier.wait(WAIT_SECS)
        return values


def on_ranks(count: int, function: Callable[[Ranks], T]) -> list[T]:
    """Call a function on `count` ranks at the same time. Returns their results; raises what the
    first rank that failed has raised."""
    meeting = Meeting(threading.Barrier(count), [None] * count)
    with ThreadPoolExecutor(count) as threads:
        ranks = [ThreadRanks(index, count, meeting) for index in range(count)]
        futures = [threads.submit(function, one) for one in ranks]
        return [future.result() for future in futures]
