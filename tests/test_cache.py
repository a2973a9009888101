"""The shared cache: a value is computed once, shared meanwhile and stored within a limit of bytes.
Meters count its cost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtsql.sql.cache import SharedCache
from mtsql.sql.meter import WorkMeter


def test_threads_that_ask_at_the_same_time_share_one_computation():
    cache = SharedCache(1000, lambda _: 1)
    made = []

    def make(_):
        time.sleep(0.2)
        made.append(1)
        return object()

    with ThreadPoolExecutor(16) as threads:
        futures = [threads.submit(cache.get, "key", make) for _ in range(16)]
        values = [future.result() for future in futures]
    assert len(made) == 1 and len(set(map(id, values))) == 1
    assert cache.get("key", make) is values[0] and len(made) == 1


def test_other_keys_do_not_wait():
    cache = SharedCache(1000, lambda _: 1)
    gate = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(cache.get, "slow", lambda _: gate.wait(10))
        assert threads.submit(cache.get, "quick", lambda _: 1).result(timeout=5) == 1
        gate.set()
        assert slow.result() is True


def test_the_least_recently_used_values_are_removed_beyond_the_limit_of_bytes():
    cache = SharedCache(100, len)
    for key in "abcde":
        cache.get(key, lambda _: "x" * 20)
    assert cache.bytes_stored == 100
    cache.get("a", lambda _: pytest.fail("a is stored"))
    cache.get("f", lambda _: "x" * 25)  # removes b and c
    assert cache.bytes_stored == 85 and cache.get("a", lambda _: "new") == "x" * 20
    assert cache.get("b", lambda _: "new") == "new"
    assert cache.get("large", lambda _: "x" * 26) == "x" * 26  # more than a quarter: not stored
    assert cache.get("large", lambda _: "again") == "again"
    cache.clear()
    assert cache.bytes_stored == 0 and cache.get("a", lambda _: "new") == "new"


def test_a_failure_is_raised_and_not_stored():
    cache = SharedCache(100, lambda _: 1)
    started = threading.Event()
    gate = threading.Event()

    def fail(tick):
        tick()
        started.set()
        gate.wait(10)
        raise LookupError("a fault")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get, "key", fail)
        started.wait(10)
        meter = WorkMeter()
        second = threads.submit(cache.get, "key", lambda _: "made by the second thread", meter)
        while not cache._pending["key"].meters:
            time.sleep(0.001)
        gate.set()
        with pytest.raises(LookupError):
            first.result()
        assert second.result() == "made by the second thread"
    meter.finish()
    assert meter.is_done_within(0)  # the ticks of the failed try belong to no result


def test_a_value_that_must_not_be_stored_is_shared_while_it_is_computed():
    cache = SharedCache(100, lambda _: 1, is_lasting=lambda value: value != "late")
    gate = threading.Event()
    made = []

    def make(_):
        gate.wait(10)
        made.append(1)
        return "late"

    with ThreadPoolExecutor(4) as threads:
        values = [threads.submit(cache.get, "key", make) for _ in range(4)]
        while "key" not in cache._pending:
            time.sleep(0.001)
        time.sleep(0.1)
        gate.set()
        assert [value.result() for value in values] == ["late"] * 4
    assert len(made) == 1
    cache.get("key", make)
    assert len(made) == 2


def test_every_meter_gets_the_same_ticks():
    """The meters of a thread that computes a value, of one that joins it, and of a cache hit."""
    cache = SharedCache(100, lambda _: 1, num_ticks=lambda value: value)
    joined = threading.Event()
    meters = [WorkMeter() for _ in range(3)]

    def make(tick):
        for number in range(7):
            tick()
            if number == 3:
                joined.wait(10)
        return 7

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get, "key", make, meters[0])
        assert not meters[0].is_done_within(3)  # four ticks have passed
        second = threads.submit(cache.get, "key", make, meters[1])
        assert not meters[1].is_done_within(3)
        joined.set()
        assert first.result() == second.result() == 7
    cache.get("key", make, meters[2])
    for meter in meters:
        meter.finish()
        assert not meter.is_done_within(6) and meter.is_done_within(7) and meter.is_done_within(8)


def test_a_meter_waits_until_the_answer_is_known():
    meter = WorkMeter()
    with ThreadPoolExecutor(1) as threads:
        known = threads.submit(meter.is_done_within, 2)
        meter.add(2)
        time.sleep(0.1)
        assert not known.done()
        meter.finish()
        assert known.result(timeout=5) is True
