"""How the figures of `mtsql plots` look, and the three files that each of them leaves: PNG, SVG and
the data as CSV.

A run or a checkpoint is told from the others by its colour and, for those who see no colours or
print in grey, by its marker, line and hatch.
"""

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtsql.files import WriteError, write_text
from mtsql.run.plots import COLOURS, save_figure

ALL_COLOURS = (*COLOURS, "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito, without the yellow, which is too light on white."""
ALL_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "ooo")
WIDTH = 7.2
"""Inches: the text width of a page."""
DPI = 200
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",  # text stays text: it can be searched and edited
    "svg.hashsalt": "mtsql",  # the same data give the same file
}


@dataclass(frozen=True)
class Drawn:
    """A figure with its data. name: that of its files. header, rows: the table of the CSV file."""

    name: str
    figure: Figure
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def new_figure(height: float, title: str) -> Figure:
    """An empty figure of the usual width. height: in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10.5, parse_math=False)
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and line of the run with this number."""
    return {
        "color": ALL_COLOURS[number % len(ALL_COLOURS)],
        "marker": ALL_MARKERS[number % len(ALL_MARKERS)],
        "linestyle": LINES[(number + number // len(ALL_COLOURS)) % len(LINES)],
    }


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of the checkpoint with this number."""
    return {
        "facecolor": ALL_COLOURS[number % len(ALL_COLOURS)],
        "hatch": HATCHES[(number + number // len(ALL_COLOURS)) % len(HATCHES)],
        "edgecolor": "white",
        "linewidth": 0.5,
    }


def finish(axes: Axes, title: str, y_label: str) -> None:
    """Title, label and horizontal lines of axes."""
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend below the axes. The names are plain text, whatever characters they have."""
    columns = max(1, min(len(names), 110 // (max(map(len, names)) + 8)))
    places = [str(number) for number in range(len(names))]  # a name that begins with _ has none
    made = figure.legend(
        handles, places, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5
    )
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def save(drawn: Drawn, folder: Path) -> None:
    """Write NAME.csv, NAME.png and NAME.svg, each completely or not at all. WriteError that names
    the file if one cannot be written."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(drawn.header)
    writer.writerows([_cell(value) for value in row] for row in drawn.rows)
    write_text(folder / f"{drawn.name}.csv", table.getvalue())
    files: dict[Path, dict[str, Any]] = {
        folder / f"{drawn.name}.png": {"dpi": DPI, "metadata": {"Software": None}},
        folder / f"{drawn.name}.svg": {"metadata": {"Date": None}},
    }
    with warnings.catch_warnings(), rc_context(STYLE):
        # A name may have characters that the font lacks. The CSV file has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for file, options in files.items():
            try:
                save_figure(drawn.figure, file, **options)
            except OSError as error:
                raise WriteError(f"{file}: cannot be written: {error.strerror}") from error


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return round(value, 4) if isinstance(value, float) else value
