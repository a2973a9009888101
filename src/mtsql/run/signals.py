"""Ctrl-C and SIGTERM: how a process is asked to stop, and when it may not be stopped.

SIGTERM is the warning of a scheduler (scancel, preemption, docker stop) before it kills. It becomes
an exception, as Ctrl-C does, so that a run first writes a checkpoint. This fails in two cases that
no process can change: `accelerate launch` with one process does not wait for its child when it gets
the signal, and as the first process of a container it does not get the signal at all. There, start
one process with plain python.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

STOPS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECS = 2.0
"""A further signal within this time is the same request. Launchers send a signal again that their
whole process group has got, and people press Ctrl-C twice."""
AGAIN_SECS = 0.05
"""A signal whose exception was dropped is sent again after this time, until it raises elsewhere."""
PEER_SECS = 2.0
"""The signal that ended other ranks reaches this one within this time."""
LAUNCHERS = ("launch", "accelerate-launch", "launch.py", "accelerate.commands.launch")
PR_SET_PDEATHSIG = 1
Handler = Callable[[int, FrameType | None], object] | int | None
"""What signal.signal takes and returns."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. It is a KeyboardInterrupt because it ends everything that Ctrl-C ends."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal has stopped, by the rule of shells: 130 or 143."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def name_of(stop: KeyboardInterrupt) -> str:
    """The beginning of the line on the screen that says why the process stopped."""
    return "terminated (SIGTERM)" if isinstance(stop, Terminated) else "interrupted"


@contextmanager
def stoppable(on_sigterm: bool = True) -> Iterator[None]:
    """Inside the `with`, SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated.

    An ignored signal stays ignored. After a signal the former handlers are not restored, because
    the process is about to end. Without `on_sigterm`, SIGTERM ends the process at once.

    While a stop is carried out, a signal of the other kind is part of it: when a launcher ends
    after Ctrl-C, its process gets SIGTERM, and that may be seconds later. It must not tear the
    clean-up, nor say that SIGTERM was the reason. The same signal again, after REPEAT_SECS, does
    end a clean-up.

    Python drops an exception that is raised in a finalizer (`__del__`), where a signal may arrive,
    too. Then the signal is sent again until its exception is raised elsewhere.
    """
    raised_at: list[float] = []
    is_lost = False
    former_hook = sys.unraisablehook

    def send_again(dropped: "sys.UnraisableHookArgs") -> None:
        nonlocal is_lost
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            former_hook(dropped)
            return
        raised_at.clear()
        number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
        is_lost = True
        threading.Thread(target=insist, args=(number,), daemon=True).start()

    def insist(number: int) -> None:
        time.sleep(AGAIN_SECS)
        while is_lost:
            os.kill(os.getpid(), number)
            time.sleep(AGAIN_SECS)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_lost
        while frame is not None:
            if frame.f_code is send_again.__code__:
                return  # what is raised here is dropped, too
            frame = frame.f_back
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        carried_out = _stop_carried_out()
        if carried_out is not None and isinstance(carried_out, Terminated) != (kind is Terminated):
            return
        now = time.monotonic()
        is_repeat = bool(raised_at) and now - raised_at[-1] < REPEAT_SECS
        if not is_repeat:
            raised_at.append(now)
            is_lost = False
            raise kind

    handled = STOPS if on_sigterm else (signal.SIGINT,)
    before = _handle(handled, stop)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        is_lost = False
        if not raised_at:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the `with`, so that its statements are run to
    the end."""
    waiting: list[int] = []
    before = _handle(STOPS, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def ignore_stops() -> None:
    """Ignore Ctrl-C and SIGTERM from now on, while the process writes its last files."""
    _handle(STOPS, signal.SIG_IGN)


@contextmanager
def peers_may_stop() -> Iterator[None]:
    """A context for work with collectives. If it fails because a signal has ended other ranks, this
    rank stops because of the signal too, instead of reporting a lost connection."""
    try:
        yield
    except RuntimeError:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(PEER_SECS)  # the signal's exception is raised from here
        raise


def follow_launcher() -> None:
    """Have the system send SIGTERM when the launcher of this process ends, however it ends (Linux
    only). A launcher that gets a signal does not always pass it on to its processes."""
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launched(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)  # the launcher has ended in between


def _is_launched(parent: int) -> bool:
    """Whether the parent process is torchrun's agent or Accelerate's launcher, and not a shell."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return False
    return any(os.path.basename(word) in LAUNCHERS for word in words)


def _stop_carried_out() -> KeyboardInterrupt | None:
    """The stop whose `except` or `finally` block is being run, if there is one."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__  # what failed in the clean-up of a stop
    return error


def _handle(numbers: tuple[int, ...], handler: Handler) -> dict[int, Handler]:
    """Set the handler of these signals, except for ignored ones. Returns the former handlers.

    Nothing happens outside the main thread, because only the main thread gets signals.
    """
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before
