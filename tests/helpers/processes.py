"""Whether processes that a test does not own have ended."""

import time
from collections.abc import Iterable
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether the process runs. One that has ended may still wait for init to notice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state = stat.rsplit(")", 1)[1].split()[0]
    return state != "Z"


def have_ended(pids: Iterable[int], secs: float) -> bool:
    """Whether all processes end within `secs` seconds."""
    pids = list(pids)
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.02)
    return not any(map(is_alive, pids))
