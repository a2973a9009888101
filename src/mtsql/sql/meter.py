"""A count of what a piece of work costs in steps of SQLite's virtual machine, while it runs."""

import threading

WAKE_SECS = 1.0
"""A waiting thread wakes up after this time at the latest, because Python handles a signal that
arrives just before a wait only when the wait ends."""


class WorkMeter:
    """Counts what the queries of one piece of work cost, in ticks of `connection.TICK_VM_STEPS`.

    A cached result adds the same count as its first run, so the total does not depend on earlier
    queries. A waiting thread continues as soon as the count exceeds the number that it asked for.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_ticks = 0
        self._is_done = False

    def add(self, num_ticks: int = 1) -> None:
        """Count `num_ticks` more ticks of a query."""
        with self._condition:
            self._num_ticks += num_ticks
            self._condition.notify_all()

    def finish(self) -> None:
        """Say that the work is done and no tick follows."""
        with self._condition:
            self._is_done = True
            self._condition.notify_all()

    def is_done_within(self, num_ticks: int) -> bool:
        """Whether the work takes at most `num_ticks` ticks in all. Waits until that is known."""
        with self._condition:
            while not (self._is_done or self._num_ticks > num_ticks):
                self._condition.wait(WAKE_SECS)
            return self._num_ticks <= num_ticks
