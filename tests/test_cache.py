"""Values made once, shared while they are made, kept within their bytes; and the meters of those who wait."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtsql.sql.cache import SharedCache
from mtsql.sql.meter import WorkMeter


def test_who_asks_at_the_same_time_shares_one_making():
    kept, made = SharedCache(1000, lambda _: 1), []

    def make(_):
        time.sleep(0.2)
        made.append(1)
        return object()

    with ThreadPoolExecutor(16) as threads:
        values = [
            future.result() for future in [threads.submit(kept.get, "key", make) for _ in range(16)]
        ]
    assert len(made) == 1 and len(set(map(id, values))) == 1
    assert kept.get("key", make) is values[0] and len(made) == 1


def test_other_keys_do_not_wait():
    kept, gate = SharedCache(1000, lambda _: 1), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(kept.get, "slow", lambda _: gate.wait(10))
        assert threads.submit(kept.get, "quick", lambda _: 1).result(timeout=5) == 1
        gate.set()
        assert slow.result() is True


def test_the_last_used_are_kept_within_the_bytes():
    kept = SharedCache(100, len)
    for key in "abcde":
        kept.get(key, lambda _: "x" * 20)
    assert kept.bytes_stored == 100
    kept.get("a", lambda _: pytest.fail("a was kept"))
    kept.get("f", lambda _: "x" * 25)  # b and c have to go
    assert kept.bytes_stored == 85 and kept.get("a", lambda _: "new") == "x" * 20
    assert kept.get("b", lambda _: "new") == "new"
    assert kept.get("large", lambda _: "x" * 26) == "x" * 26  # more than a quarter: not kept
    assert kept.get("large", lambda _: "again") == "again"
    kept.clear()
    assert kept.bytes_stored == 0 and kept.get("a", lambda _: "new") == "new"


def test_a_failure_is_raised_and_not_kept():
    kept, started, gate = SharedCache(100, lambda _: 1), threading.Event(), threading.Event()

    def fail(tick):
        tick()
        started.set()
        gate.wait(10)
        raise LookupError("a fault")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(kept.get, "key", fail)
        started.wait(10)
        meter = WorkMeter()
        second = threads.submit(kept.get, "key", lambda _: "made by the one who waited", meter)
        while not kept._pending["key"].meters:
            time.sleep(0.001)
        gate.set()
        with pytest.raises(LookupError):
            first.result()
        assert second.result() == "made by the one who waited"
    meter.finish()
    assert meter.is_done_within(0)  # the ticks of the failed try belong to no result


def test_what_does_not_last_is_shared_and_not_stored():
    kept = SharedCache(100, lambda _: 1, is_lasting=lambda value: value != "late")
    gate, made = threading.Event(), []

    def make(_):
        gate.wait(10)
        made.append(1)
        return "late"

    with ThreadPoolExecutor(4) as threads:
        values = [threads.submit(kept.get, "key", make) for _ in range(4)]
        while "key" not in kept._pending:
            time.sleep(0.001)
        time.sleep(0.1)
        gate.set()
        assert [value.result() for value in values] == ["late"] * 4
    assert len(made) == 1
    kept.get("key", make)
    assert len(made) == 2


def test_every_meter_gets_the_same_ticks():
    """Of who makes a value, of who joins in the middle, and of who finds it kept."""
    kept = SharedCache(100, lambda _: 1, num_ticks=lambda value: value)
    joined, meters = threading.Event(), [WorkMeter() for _ in range(3)]

    def make(tick):
        for number in range(7):
            tick()
            if number == 3:
                joined.wait(10)
        return 7

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(kept.get, "key", make, meters[0])
        assert not meters[0].is_done_within(3)  # four ticks have passed
        second = threads.submit(kept.get, "key", make, meters[1])
        assert not meters[1].is_done_within(3)
        joined.set()
        assert first.result() == second.result() == 7
    kept.get("key", make, meters[2])
    for meter in meters:
        meter.finish()
        assert not meter.is_done_within(6) and meter.is_done_within(7) and meter.is_done_within(8)


def test_a_meter_waits_until_it_knows():
    meter = WorkMeter()
    with ThreadPoolExecutor(1) as threads:
        known = threads.submit(meter.is_done_within, 2)
        meter.add(2)
        time.sleep(0.1)
        assert not known.done()
        meter.finish()
        assert known.result(timeout=5) is True
