"""What a program shows while it runs: lines of at most 80 columns and, on a terminal, one live bar
below them for what is going on right now, below which a training run has more (live.py). In a pipe
or a file there is no bar and no control character.
"""

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from mtsql.files import print_line
from mtsql.run.live import bar_columns, current, is_terminal

WIDTH = 80
HEADER_EVERY = 20
"""Lines of a table between two headers. A terminal of 24 lines always shows one."""
LINE_SECS = 10.0
"""Seconds between two lines of an activity without a bar."""
SLOWER = 0.2
"""An activity that has gone on for longer is reported each time that this fraction of its duration
has passed."""
MAX_LINE_SECS = 60.0
"""But it is reported once a minute at least: a log of a cluster shows that the run is alive."""


@contextmanager
def activity(
    title: str, is_shown: bool = True, unit: str = "episodes", has_lines: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show what goes on inside the `with`: a bar on a terminal, otherwise a line now and then.

    Yields a function to be called with the number of finished units and of all units. Until it is
    called, the bar only shows the time, and there is no line. A call with 0 finished units says
    that the work begins now; otherwise it began with the `with`.

    Only the main rank has `is_shown`, so the numbers are those of its own share. Without
    `has_lines` there are no lines, because others have their numbers.
    """
    live = current()
    if is_shown and live is not None:
        with live.activity(title, unit) as show:
            yield show
    elif is_shown and is_terminal():
        with _bar(title, unit) as show:
            yield show
    elif is_shown and has_lines:
        yield _lines(title, unit)
    else:
        yield lambda num_done, num_all: None


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    console = Console()
    columns = bar_columns(console.width)
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=None, count="")

        def show(num_done: int, num_all: int) -> None:
            count = f"{num_done}/{num_all} {unit}"
            bar.update(task, completed=num_done, total=num_all, count=count)

        yield show


def _lines(title: str, unit: str) -> Callable[[int, int], None]:
    start = time.monotonic()
    next_line = start + LINE_SECS

    def show(num_done: int, num_all: int) -> None:
        nonlocal start, next_line
        now = time.monotonic()
        if not num_done:
            start = now
        if now < next_line or num_done >= num_all:
            return
        next_line = now + min(max(LINE_SECS, SLOWER * (now - start)), MAX_LINE_SECS)
        left = ""
        if num_done:
            left = f", {duration((now - start) / num_done * (num_all - num_done))} left"
        print_line(f"{title}: {num_done} of {num_all} {unit}{left}")

    return show


class Table:
    """Aligned lines under a header that comes again every `HEADER_EVERY` lines."""

    def __init__(self, columns: dict[str, int]) -> None:
        """`columns` is the name of each column and the width of its cells. A name that is longer
        than its cells makes the column wider."""
        self.names = list(columns)
        self.widths = [max(width, len(name)) for name, width in columns.items()]
        self.num_lines = 0

    def line(self, *cells: str) -> str:
        """The next line with these cells, after the header if it is due."""
        rows = [list(cells)]
        if self.num_lines % HEADER_EVERY == 0:
            rows.insert(0, self.names)
        self.num_lines += 1
        return "\n".join(self._aligned(row) for row in rows)

    def _aligned(self, row: list[str]) -> str:
        return " ".join(cell.rjust(width) for cell, width in zip(row, self.widths, strict=True))


def wrapped(text: str, indent: str = "  ") -> str:
    """A text in lines of at most 80 columns, broken between words. The lines after the first are
    indented. A word that is longer stays whole."""
    if len(text) <= WIDTH:
        return text
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def short(value: float | None) -> str:
    """A number with at most five characters, such as 0.065, 12.35, -0.01 or 2e-5; - for None."""
    if value is None:
        return "-"
    size = abs(value)
    if size != 0 and (size < 0.001 or size >= 9999.5):
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{value:.3f}"
        while len(text) > 5 and text[-1] != ".":
            text = f"{value:.{len(text.partition('.')[2]) - 1}f}"
    return text.rstrip(".")


def percent(fraction: float | None) -> str:
    """A fraction in percent with at most four characters, such as 8.6, 56.2 or 100; - for None."""
    if fraction is None:
        return "-"
    return "100" if fraction >= 0.9995 else f"{100 * fraction:.1f}"


def rate(per_second: float | None) -> str:
    """A rate with at most five characters, such as 1912, 125k or 2e7; - for None."""
    if per_second is None or per_second >= 9_999_500:
        return short(per_second)
    return f"{per_second:.0f}" if per_second < 99_999.5 else f"{per_second / 1e3:.0f}k"


def duration(secs: float) -> str:
    """A time with at most five characters, up to 27 years: 0:07, 12:34 (minutes and seconds),
    3h05m, 23h, 2d04h or 12d. - for what is not finite."""
    if not math.isfinite(secs):
        return "-"
    if secs < 3600:
        return f"{int(secs) // 60}:{int(secs) % 60:02}"
    minutes = int(secs) // 60
    hours = minutes // 60
    if hours < 24:
        return f"{hours}h{minutes % 60:02}m" if hours < 10 else f"{hours}h"
    days = hours // 24
    return f"{days}d{hours % 24:02}h" if days < 10 else f"{days}d"
