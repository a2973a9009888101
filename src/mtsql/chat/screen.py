"""How a conversation looks in a terminal or a pipe: steps, answers and tables as text.

Everything that comes from a database or a model is shown without control characters, since those
could move the cursor or change what stands on the screen. In a pipe there are no colours and
nothing that is erased again.
"""

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.syntax import Syntax
from rich.text import Text

from mtsql.chat.conversation import ChatTurn
from mtsql.chat.events import Did, Ended, Event, Reading, Sampled
from mtsql.chat.session import progress
from mtsql.chat.steps import Step, counted, describe
from mtsql.files import printing
from mtsql.run.live import can_draw
from mtsql.sql.sandbox import QueryResult

PIPE_WIDTH = 120
"""Columns of a line in a pipe, where no terminal says how wide it is."""
MAX_CELL = 60
"""Columns of a cell."""
STREAM_LINES = 6
"""Lines in which a reply is shown while it is sampled."""
NAME_WIDTH = 10
"""Columns of a step's name."""
GAP = "  "
STYLES = {True: "green", False: "yellow", None: ""}
SQL_STEPS = ("propose", "correct", "recall", "answer")


def harmless(text: str, keep: str = "") -> str:
    """A text without control characters, which are written as escapes. Those in `keep` stay, and so
    does the joiner of emoji."""
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for char in text:
        kind = unicodedata.category(char)
        is_hidden = kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and char != "\u200d")
        shown.append(
            char.encode("unicode_escape").decode() if is_hidden and char not in keep else char
        )
    return "".join(shown)


def cell_text(cell: object) -> str:
    """A cell of a result in one short line."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bytes):
        text = f"X'{cell[:MAX_CELL].hex().upper()}'"
    else:
        text = harmless(str(cell)[: 4 * MAX_CELL])
    return text if cell_len(text) <= MAX_CELL else set_cell_size(text, MAX_CELL - 3) + "..."


def table_lines(result: QueryResult, width: int, max_rows: int) -> list[str]:
    """A result as aligned lines of at most `width` columns, numbers on the right.

    What does not fit is left out, whole columns and rows, and the last line says how many.
    """
    if not result.columns:
        return []
    rows = [[cell_text(cell) for cell in row] for row in result.rows[:max_rows]]
    names = [cell_text(name) for name in result.columns]
    widths: list[int] = []
    for place, name in enumerate(names):
        size = max([cell_len(name), *(cell_len(row[place]) for row in rows)])
        used = sum(widths) + len(GAP) * len(widths)
        if widths and used + size > width:
            break
        widths.append(min(size, width))
    are_numbers = [
        all(isinstance(row[place], (int, float, type(None))) for row in result.rows[:max_rows])
        for place in range(len(widths))
    ]

    def line(cells: Sequence[str]) -> str:
        parts = []
        for cell, size, is_number in zip(cells, widths, are_numbers):
            fitted = set_cell_size(cell, size)
            space = size - cell_len(cell)
            parts.append(" " * space + cell if is_number and space > 0 else fitted)
        return GAP.join(parts).rstrip()

    lines = [line(names), GAP.join("-" * size for size in widths), *map(line, rows)]
    left_out = []
    if len(result.rows) > max_rows:
        left_out.append(counted(len(result.rows) - max_rows, "more row"))
    if len(names) > len(widths):
        left_out.append(counted(len(names) - len(widths), "more column"))
    return [*lines, f"... {' and '.join(left_out)}"] if left_out else lines


class Screen:
    """Prints to the standard output. is_folded: whether steps are shown in one line each.

    Errors as in `printing`: WriteError if the standard output cannot be written.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.is_folded = True
        is_terminal = sys.stdout.isatty()
        self.console = Console(
            width=None if is_terminal else PIPE_WIDTH,
            force_terminal=None if is_terminal else False,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self.is_live = is_terminal and self.console.is_interactive
        self._live: Live | None = None
        self._stream = ""

    @property
    def width(self) -> int:
        """Columns of the screen."""
        return max(20, self.console.width)

    def print(self, text: str | Text = "", style: str = "") -> None:
        """Print lines. Long ones are folded by the terminal, or stay whole in a pipe."""
        shown = text if isinstance(text, Text) else Text(harmless(text, "\n"), style)
        with printing():
            self.console.print(shown, soft_wrap=not self.is_live)

    def question(self, text: str) -> None:
        """A question that was not typed on this screen."""
        self.print(f"? {text}", "bold")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Inside, the reply is shown while it is sampled, and erased when its steps are known."""
        if not self.is_live or not can_draw(self.console):
            yield
            return
        with Live(console=self.console, transient=True, refresh_per_second=10) as self._live:
            try:
                yield
            finally:
                self._stream = ""
                self._live = None

    @contextmanager
    def unfolded(self) -> Iterator[None]:
        """Inside, steps are shown whole."""
        before = self.is_folded
        self.is_folded = False
        try:
            yield
        finally:
            self.is_folded = before

    def show(self, event: Event) -> None:
        """Show what happens."""
        match event:
            case Reading():
                self._erasable(progress(event))
            case Sampled(text):
                self._stream += text
                self._erasable(self._stream)
            case Did(step):
                self._stream = ""
                self._erasable("")
                self.step(step)
            case Ended(turn):
                self.answer(turn)

    def _erasable(self, text: str) -> None:
        if self._live is None:
            return
        room = max(1, min(STREAM_LINES, self.console.height - 2))
        lines = Text(harmless(text, "\n"), "dim").wrap(self.console, self.width)
        self._live.update(Text("\n").join(lines[-room:]))

    def step(self, step: Step) -> None:
        """A step: in one line, and what it hides below it, if steps are not folded."""
        room = max(10, self.width - NAME_WIDTH)
        name = Text(f"{step.name:<{NAME_WIDTH}}", "dim")
        if self.is_folded and step.name in ("think", "answer"):  # the answer stands below
            return
        has_sql = step.name in SQL_STEPS and step.sql is not None
        summary = harmless(step.summary)
        if self.is_folded or not has_sql:
            summary = cut(summary, room)
        shown = self.sql(summary) if has_sql else Text(summary, STYLES[step.is_good])
        self.print(name + shown)
        if not self.is_folded and step.text:
            for line in harmless(step.text, "\n").splitlines():
                self.print(Text(" " * NAME_WIDTH + line, "dim"))

    def answer(self, turn: ChatTurn) -> None:
        """The answer of a turn: its SQL, its result and what it has cost."""
        self.print()
        if turn.result is None:
            self.print(f"no answer: {turn.ending}", "yellow")
        else:
            self.print(self.sql(harmless(turn.sql)))
            self.print()
            self.table(turn.result)
        who = "edited by you" if turn.is_edited else counted(turn.num_sampled, "token")
        self.print(f"({who}, {turn.secs:.1f} s)" if not turn.is_edited else f"({who})", "dim")

    def table(self, result: QueryResult) -> None:
        """A result as a table, and how many rows it has."""
        if not result.is_ok:
            self.print(describe(result), "yellow")
            return
        for line in table_lines(result, self.width, self.max_rows):
            self.print(line)
        self.print(describe(result), "dim")

    def sql(self, text: str) -> Text:
        """SQL in colours, if the screen has some."""
        if not self.is_live:
            return Text(text)
        coloured = Syntax("", "sql", theme="ansi_dark", background_color="default").highlight(text)
        coloured.rstrip()
        return coloured

    def lines(self, lines: Iterable[str]) -> None:
        """Several lines."""
        for line in lines:
            self.print(line)


def cut(text: str, width: int) -> str:
    """The beginning of a text that is wider than `width` columns."""
    return text if cell_len(text) <= width else set_cell_size(text, max(1, width - 3)) + "..."
