"""Ctrl-C and SIGTERM raise, wait where nothing may be torn, and are one request if repeated."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mtsql.run.signals import (
    Terminated,
    exit_code,
    no_interrupt,
    peers_may_stop,
    stoppable,
)

BOTH = pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_a_signal_raises_once_and_only_after_no_interrupt_has_ended(number, kind):
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        with no_interrupt():
            os.kill(os.getpid(), number)
            signal.raise_signal(signal.SIGINT)  # a second one, of the other kind or the same
            inside = "was not torn"
        raise AssertionError("it waited too long")
    assert type(stop.value) is kind and inside == "was not torn"
    assert exit_code(stop.value) == 128 + number
    for again in (signal.SIGINT, signal.SIGTERM):  # while the last checkpoint is written
        signal.raise_signal(again)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (signal.SIGINT, signal.SIGTERM, KeyboardInterrupt),  # the launcher has ended meanwhile
        (signal.SIGTERM, signal.SIGINT, Terminated),
    ],
)
def test_a_late_second_signal_neither_renames_nor_tears_a_stop(first, second, kind, monkeypatch):
    monkeypatch.setattr("mtsql.run.signals.REPEAT_SECS", 0.0)
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        try:
            signal.raise_signal(first)
        except KeyboardInterrupt as arrived:
            try:
                raise type(arrived)("how to continue") from None
            finally:
                signal.raise_signal(second)
                cleaned.append(first)
    assert type(stop.value) is kind and cleaned == [first]


@BOTH
def test_the_same_signal_ends_a_clean_up_and_another_counts_after_the_stop(
    number, kind, monkeypatch
):
    monkeypatch.setattr("mtsql.run.signals.REPEAT_SECS", 0.0)
    with stoppable():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            with pytest.raises(kind):
                signal.raise_signal(number)
        for later, kind_of_later in (
            (signal.SIGINT, KeyboardInterrupt),
            (signal.SIGTERM, Terminated),
        ):
            with pytest.raises(KeyboardInterrupt) as stop:  # such as in `mtsql chat`, which goes on
                signal.raise_signal(later)
            assert type(stop.value) is kind_of_later


@BOTH
def test_an_ignored_signal_stays_ignored(number, kind):
    signal.signal(number, signal.SIG_IGN)
    with stoppable(), no_interrupt():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_handlers_are_restored_if_no_signal_came():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stoppable(), no_interrupt():
        pass
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_lost_connection_is_a_stop_if_a_signal_follows(is_stopped, monkeypatch):
    """The ranks get a signal one after another; who waits for one that is gone gets an error."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mtsql.run.signals.PEER_SECS", 0.5)
    expected = Terminated if is_stopped else RuntimeError
    with pytest.raises(expected), stoppable(), peers_may_stop():
        if is_stopped:
            kill = f"import os, time; time.sleep(0.1); os.kill({os.getpid()}, 15)"
            subprocess.Popen([sys.executable, "-c", kill])
        raise RuntimeError("Connection closed by peer")


CHILD = """
import os, sys, time
from mtsql.run.signals import follow_launcher, stoppable
with stoppable():
    try:
        follow_launcher()
        open(sys.argv[1], "w").close()
        time.sleep(60)
    except KeyboardInterrupt as stop:
        with open(sys.argv[1], "w") as file:
            file.write(type(stop).__name__)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[2:]]).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_launched_process_ends_with_its_launcher(tmp_path):
    file = tmp_path / "said"
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", PARENT, "accelerate-launch", CHILD, str(file)], env=env
    )
    wait_until(file.exists)
    launcher.kill()
    wait_until(lambda: file.read_text() == "Terminated")


def wait_until(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@BOTH
@pytest.mark.parametrize("secs", [0.0, 0.2], ids=["fast", "slow"])
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(number, kind, secs, monkeypatch):
    """On a slow machine it comes again while the thread that sends it is still being started."""
    arrived = []
    start = threading.Thread.start

    def slow_start(thread):
        start(thread)
        time.sleep(secs)

    monkeypatch.setattr(threading.Thread, "start", slow_start)

    class Stopped:
        def __del__(self) -> None:
            arrived.append(number)
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        Stopped()
        time.sleep(5)
    assert arrived == [number] and type(stop.value) is kind
