"""The live display of a run on a terminal: a bar for what is going on right now, and below it a few
named lines with the newest numbers. Lines that the program prints stand above it. It takes no more
room than the terminal has, and it is gone when the run ends, however it ends.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

Lines = Sequence[tuple[str, Sequence[str]]]
"""Name and parts of each line, the most important line first. A line is broken between parts."""
MAX_WIDTH = 78
"""Columns of the display in a wider terminal."""
LEFT_FREE = 4
"""Lines of the terminal that the display leaves to what is printed."""
NAME_WIDTH = 9
BAR_FROM = 68
"""Columns of a terminal from which there is room for a bar beside the numbers of what goes on."""
ELAPSED_FROM = 52
"""Columns from which the time that has passed stands beside the time that is left."""
BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_current: "LiveScreen | None" = None


def is_terminal() -> bool:
    """Whether the standard output is a terminal that can draw a line again, and that has the
    characters of bars and ellipses."""
    return sys.stdout.isatty() and can_draw(Console())


def can_draw(console: Console) -> bool:
    """Whether the console is interactive and shows all characters. One that lacks some would get
    escapes in their place, which are wider than they count for."""
    return console.is_interactive and console.encoding.startswith("utf")


def current() -> "LiveScreen | None":
    """The live display of this process, None without one."""
    return _current


@contextmanager
def live_screen() -> Iterator[None]:
    """Show a live display inside the `with` if the standard output is a terminal. Otherwise, and on
    ranks other than the main one, nothing changes."""
    global _current
    if os.environ.get("RANK", "0") != "0" or _current is not None or not is_terminal():
        yield
        return
    screen = LiveScreen(Console())
    try:
        with screen.live:
            _current = screen
            yield
    finally:
        _current = None


class LiveScreen:
    """What is drawn: `activity` adds a bar for a while, `show` replaces the lines."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(*bar_columns(console.width), console=console)
        self.lines: Lines = ()
        self.live = _FittingLive(
            self, console=console, transient=True, vertical_overflow="crop", refresh_per_second=4
        )

    def show(self, lines: Lines) -> None:
        """Replace the named lines."""
        self.lines = lines
        self.live.refresh()

    def replace(self, name: str, parts: Sequence[str]) -> None:
        """Replace the line of this name, if there is one."""
        self.show([(one, parts if one == name else old) for one, old in self.lines])

    @contextmanager
    def activity(self, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A bar inside the `with`. Yields a function to be called with the number of finished
        units and of all units."""
        task = self.bars.add_task(title, total=None, count="")

        def show(num_done: int, num_all: int) -> None:
            count = f"{num_done}/{num_all} {unit}"
            self.bars.update(task, completed=num_done, total=num_all, count=count)

        try:
            yield show
        finally:
            self.bars.remove_task(task)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(MAX_WIDTH, options.max_width - 1)
        room = console.height - LEFT_FREE
        shown: list[list[Segment]] = []
        if self.bars.tasks:
            shown += console.render_lines(self.bars, options.update_width(width), pad=False)
        elif self.lines:
            shown.append([Segment("")])  # the lines below do not jump between two bars
        for name, text in laid_out(self.lines, width)[: max(0, room - len(shown))]:
            line = Text.assemble((name, "dim"), text, no_wrap=True, overflow="ellipsis")
            shown += console.render_lines(line, options.update_width(width), pad=False)
        self.live.drawn = [Segment.get_line_length(line) for line in shown]
        for segments in shown:
            yield from segments
            yield Segment.line()


class _FittingLive(Live):
    """A Live that also finds its beginning when the terminal has become narrower. The terminal then
    breaks lines that are already there, and Rich, which goes up by as many lines as it has drawn,
    would leave a part of them on the screen."""

    drawn: Sequence[int] = ()
    """Columns of each line of the display."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by the console for each output: what to write, the display at its end."""
        width = self.console.width
        if any(columns > width for columns in self.drawn):
            num_lines = sum(max(1, math.ceil(columns / width)) for columns in self.drawn)
            self._live_render._shape = (width, num_lines)
        return super().process_renderables(renderables)


def bar_columns(width: int) -> list[ProgressColumn]:
    """The columns of a bar in a terminal of this width: what, how far, how much, the time that has
    passed and is left. A narrow terminal has what fits."""
    text = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}", markup=False)
    bar = [BarColumn(15)] if width >= BAR_FROM else []
    elapsed = [TimeElapsedColumn()] if width >= ELAPSED_FROM else []
    return [text, *bar, count, *elapsed, TimeRemainingColumn(compact=True)]


def laid_out(lines: Lines, width: int) -> list[tuple[str, str]]:
    """-> (name or blanks, text) of each line of the screen, in at most `width` columns if no part
    is longer."""
    found = []
    for name, parts in lines:
        rest = [part for part in parts if part]
        head = name.ljust(NAME_WIDTH)
        while rest:
            text = rest.pop(0)
            while rest and NAME_WIDTH + cell_len(text) + 2 + cell_len(rest[0]) <= width:
                text += f"  {rest.pop(0)}"
            found.append((head, text))
            head = " " * NAME_WIDTH
    return found


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A row of small bars, at most `width`, each a mean of neighbours; empty for fewer than two
    values."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    ends = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:], strict=False)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[3] * count
    return "".join(BARS[round((len(BARS) - 1) * (one - low) / (high - low))] for one in means)
