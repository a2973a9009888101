"""A separate program that waits until a script's launcher has ended and then prints a line.

    python last_line.py LAUNCHER_PID LINE EXIT_CODE

`accelerate launch` prints a traceback after a script that ends with an error. So `end_with` of
launch.py starts this program, which makes the line that says what is wrong the last one. Several
ranks may start it, and only the first one prints. The line of a mistake (exit code 1) is printed
rather than that of a rank which was stopped because of it.
"""

import os
import sys
import tempfile
import time

import psutil

MAX_WAIT_SECS = 60
POLL_SECS = 0.01
MISTAKE_FIRST_SECS = 0.3
"""Delay of a line that is not a mistake, in case another rank has a mistake to print."""
OTHERS_SECS = 2
"""After this time all ranks have ended, and no other line can come."""


def main(launcher: int, line: str, code: int) -> None:
    """Wait for the launcher and print the line, unless another rank has printed one."""
    until = time.monotonic() + MAX_WAIT_SECS
    while is_running(launcher) and time.monotonic() < until:
        time.sleep(POLL_SECS)
    if code != 1:
        time.sleep(MISTAKE_FIRST_SECS)
    mark = os.path.join(tempfile.gettempdir(), f"mtsql-{os.getuid()}-{launcher}.said")
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(line, file=sys.stderr, flush=True)
    os.close(2)  # a program that reads our output to its end need not wait longer
    time.sleep(OTHERS_SECS)
    os.unlink(mark)


def is_running(pid: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
