"""List the runs in a folder: how far they are, their scores, what differs.

    mtsql runs runs
    mtsql runs runs --by dev_em
    mtsql runs runs --by loss --lowest
    mtsql runs runs --csv runs.csv

Runs are looked for in FOLDER and below it. `done` counts finished updates of
train_rl.py or optimizer steps of train_sft.py; for eval.py it says whether
all parts are there. `time` is the time on the clock of all work that is kept.
Scores of a training run are those of its model. Below each run stand the keys
of its configuration that have another value in another run of the same kind.

The runs are ranked by --by, the highest first: a score such as dev_ex, or a
key of metrics.jsonl, of which the mean of the newest five rows counts. Without
--by it is held_out_ex, dev_ex or dev_seen_ex, whichever is there first.
"""

import csv
import io
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line, write_text
from mtsql.run.config import parse_config
from mtsql.run.listing import Run, find_runs, ranked
from mtsql.run.screen import duration, short, wrapped

USUAL = ("held_out_ex", "dev_ex", "dev_seen_ex")
"""Scores that rank runs if the user names none."""
MAX_VALUE = 40
"""Characters of a value of the configuration."""


@dataclass(frozen=True)
class Config:
    """Flags of mtsql runs."""

    folder: tuple[str, ...] = ()
    """The folder. It may also be given without the name of the flag."""
    by: str | None = None
    """The score that ranks the runs."""
    lowest: bool = False
    """Whether the lowest score is the best one."""
    csv: str | None = None
    """File NAME.csv for the table with all scores and all keys that differ."""


def main(words: Sequence[str]) -> None:
    """Print the runs of the folder that the words name."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if len(config.folder) != 1:
        raise ValueError(f"runs needs one folder, found {len(config.folder)}: mtsql runs runs")
    if config.csv is not None and not config.csv.lower().endswith(".csv"):
        raise ValueError(
            f"--csv {config.csv}: the table replaces this file, so its name ends with .csv"
        )
    folder = Path(config.folder[0])
    runs, faults = find_runs(folder)
    for fault in faults:
        print_line(wrapped(_one_line(f"left out: {fault}")))
    if faults and not runs:
        raise ValueError(f"{folder}: none of its runs can be read")
    if not runs:
        raise ValueError(f"{folder}: no run in it, which would have a metrics.jsonl")
    by = config.by or next((key for key in USUAL if any(key in run.scores for run in runs)), None)
    known = sorted({key for run in runs for key in run.scores})
    if by is not None and by not in known:
        close = get_close_matches(by, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"found {', '.join(known) or 'none'}"
        raise ValueError(f"by: no run has the score {by}; {hint}")
    runs = ranked(runs, by, config.lowest)
    if config.csv:
        write_text(config.csv, as_csv(runs))
    for line in as_lines(runs, by, shutil.get_terminal_size().columns):
        print_line(line)


def as_lines(runs: Sequence[Run], by: str | None, width: int) -> list[str]:
    """The table, in lines of at most `width` columns, except for long names of runs."""
    held_out = {key: 0 for run in runs for key in run.scores if "_ex" in key or "_em" in key}
    names = list(dict.fromkeys([*([by] if by else []), *sorted(held_out, key=_place)]))
    longest = min(30, max(len(run.name) for run in runs))
    fixed = ["", "kind", "done", "time"]
    while len(names) > 1 and _width([*fixed, *names], runs) + longest + 2 > width:
        names.pop()
    header = [*fixed, *names, "run"]
    table = [header]
    for place, run in enumerate(runs, 1):
        number = str(place) if by in run.scores else "-"
        scores = [_score(name, run.scores.get(name)) for name in names]
        table.append([number, run.kind, run.done, duration(run.secs), *scores, _one_line(run.name)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row, found in zip(table, [None, *runs], strict=True):
        cells = [cell.rjust(size) for cell, size in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
        if found is not None and found.differs:
            text = ", ".join(f"{key}={_value(value)}" for key, value in found.differs.items())
            indent = " " * 6
            lines += textwrap.wrap(
                text,
                max(30, width),
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
    return lines


def _score(name: str, value: float | None) -> str:
    """A score with one digit if it is in percent."""
    if value is not None and name.partition("_predicted")[0].endswith(("_ex", "_em")):
        return f"{value:.1f}"
    return short(value)


def _place(key: str) -> tuple[bool, int, str]:
    """EX of the usual splits first, then their EM, then the others."""
    usual = [*USUAL, *(name[:-2] + "em" for name in USUAL)]
    return key not in usual, usual.index(key) if key in usual else 0, key


def _width(header: Sequence[str], runs: Sequence[Run]) -> int:
    done = max(len(run.done) for run in runs)
    sizes = {"": len(str(len(runs))), "kind": 4, "done": max(4, done), "time": 5}
    return sum(sizes.get(name, max(5, len(name))) + 2 for name in header)


def _value(value: object) -> str:
    text = _one_line(str(value))
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}\u2026"


def _one_line(text: str) -> str:
    """A text without line ends and other control characters, which a name may have."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def as_csv(runs: Sequence[Run]) -> str:
    """A row for each run: place, all scores, and the keys that differ."""
    scores = list(dict.fromkeys(key for run in runs for key in run.scores))
    keys = list(dict.fromkeys(key for run in runs for key in run.differs))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["run", "kind", "done", "hours", *scores, *(f"config:{key}" for key in keys)])
    for run in runs:
        name = run.name.encode("utf-8", "backslashreplace").decode()
        cells = [run.scores.get(key, "") for key in scores]
        values = [run.differs.get(key, "") for key in keys]
        writer.writerow([name, run.kind, run.done, round(run.secs / 3600, 4), *cells, *values])
    return table.getvalue()
