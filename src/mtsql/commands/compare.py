"""Compare two evaluations turn by turn: B against A.

    mtsql compare runs/eval-warm runs/eval-rl
    mtsql compare runs/eval-warm runs/eval-rl --out runs/compare
    mtsql compare runs/rl/eval/dev-00000.json runs/rl/eval/dev-00040.json
    mtsql compare runs/eval-rl runs/eval-rl --histories gold predicted

A and B are folders of eval.py, or files eval/*.json of a training run. For
each data set, split and history that both have, tables show EX and EM of both
and the difference with its 95 % interval (bootstrap by dialogue), in all, by
turn and by hardness. `mended` counts the turns that only B has right in
execution, `broken` those that only A has; p is McNemar's exact test of the
two. The last table has abilities and costs. Turns that only one of them has
are counted and named.

--out FOLDER also writes the tables to compare.md as Markdown, all figures to
compare.json, and the turns that changed, with both answers, to changed.tsv.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line, write_text
from mtsql.judge.comparison import (
    MAX_NAMED,
    Comparison,
    Difference,
    Row,
    compare,
    paired,
    read_evaluation,
    under,
)
from mtsql.run.config import parse_config
from mtsql.run.screen import wrapped


@dataclass(frozen=True)
class Config:
    """Flags of mtsql compare."""

    runs: tuple[str, ...] = ()
    """The two evaluations, A and B. They may also be given without the name of the flag."""
    out: str | None = None
    """Folder to write compare.md, compare.json and changed.tsv to."""
    histories: tuple[str, ...] = ()
    """Two histories, such as gold predicted: the parts of A under the first are compared with those
    of B under the second. A and B may then be the same evaluation."""
    seed: int = 0
    """Seed of the bootstrap."""
    num_resamples: int = 2000
    """Number of resamples of the bootstrap."""

    def __post_init__(self) -> None:
        if self.num_resamples < 100:
            raise ValueError(f"num_resamples must be at least 100, not {self.num_resamples}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}")
        if len(self.histories) not in (0, 2):
            raise ValueError(f"histories: expected two, found {len(self.histories)}")


def main(words: Sequence[str]) -> None:
    """Compare the evaluations that the words name, print the tables, write the files."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if len(config.runs) != 2:
        raise ValueError(f"compare needs two evaluations, A and B; found {len(config.runs)}")
    is_same = len({Path(run).resolve() for run in config.runs}) == 1
    if is_same and len(set(config.histories)) < 2:
        raise ValueError(
            "A and B are the same evaluation: name two of them, or two histories of it with "
            "--histories gold predicted"
        )
    out = Path(config.out) if config.out else None
    if out is not None and (out / "compare.json").exists():
        raise ValueError(f"--out {out}: it holds a comparison: name another folder or remove it")
    a, b = (read_evaluation(Path(run)) for run in config.runs)
    notes = [f"{name} is not finished" for name, one in zip("AB", (a, b)) if not one[0].is_complete]
    if config.histories:
        name = " against ".join(config.histories)
        a, b = under(a, config.histories[0], name), under(b, config.histories[1], name)
    pairs, alone = paired(a, b)
    notes += alone
    found = [compare(*pair, config.seed, config.num_resamples) for pair in pairs]
    if out is not None:
        content = {**asdict(config), "notes": notes, "results": [as_data(c) for c in found]}
        text = "\n".join(report(config.runs, found, notes, _markdown_table))
        write_text(out / "compare.md", f"{text}\n")
        write_text(out / "changed.tsv", "".join(f"{line}\n" for line in changed_lines(found)))
        write_text(out / "compare.json", json.dumps(content, indent=1) + "\n")
    for line in report(config.runs, found, notes, _plain_table):
        print_line(wrapped(line))
    if out is not None:
        print_line(f"figures: {out}/compare.json; turns that changed: {out}/changed.tsv")


def as_data(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON, without the rows, which the two evaluations have."""
    found = asdict(comparison)
    del found["rows"]
    return found


def changed_lines(comparisons: Iterable[Comparison]) -> Iterable[str]:
    """A header and a line for each turn that is mended, broken or not in both: `data set, history,
    change, turn id, answer of A, answer of B`, with tabs between them."""
    yield "\t".join(("data", "history", "change", "turn_id", "prediction A", "prediction B"))
    for one in comparisons:
        changes = ("mended", "broken", "only_a", "only_b")
        for change in changes:
            for turn in getattr(one, change):
                rows: tuple[Row, ...] = one.rows.get(turn, ({}, {}))
                answers = [" ".join(str(row.get("prediction", "")).split()) for row in rows]
                yield "\t".join((one.data, one.history, change, turn, *answers))


LEGEND = (
    "B - A is in points, with its 95 % interval: bootstrap by dialogue. mended: turns that only B "
    "has right in execution; broken: only A; p: McNemar's exact test of the two."
)


def report(
    runs: Sequence[str],
    comparisons: Sequence[Comparison],
    notes: Sequence[str],
    as_lines: Callable[[list[list[str]]], list[str]],
) -> list[str]:
    """All tables, as lines. notes: what is missing in the evaluations as a whole. as_lines: writes
    a table, whose first row is the head."""
    lines = [f"# A: {runs[0]}, B: {runs[1]}", "", LEGEND, ""]
    if notes:
        lines += [f"Note: {'; '.join(notes)}.", ""]
    for one in comparisons:
        lines += [f"## {one.data} ({one.split}), {one.history} history", ""]
        lines += [f"{len(one.rows)} turns of {one.num_dialogues} dialogues are in both.", ""]
        for name, turns in (("A", one.only_a), ("B", one.only_b)):
            if turns:
                named = ", ".join(turns[:MAX_NAMED]) + (", ..." if len(turns) > MAX_NAMED else "")
                lines += [f"Only {name} has {len(turns)} turns, which are left out: {named}.", ""]
        for rows in _tables(one):
            lines += [*as_lines(rows), ""]
    return lines


def _tables(one: Comparison) -> list[list[list[str]]]:
    """The rows of the tables of EX, of EM, and, if the evaluations have them, of other figures."""
    head = ["count", "A", "B", "B - A"]
    ex = [["EX", *head, "mended", "broken", "p"]]
    em = [["EM", *head]]
    for group in one.groups:
        cells = [group.name, str(group.count)]
        changed = [str(group.mended), str(group.broken), _p_text(group.p)]
        ex.append([*cells, *_cells(group.ex, 1), *changed])
        em.append([*cells, *_cells(group.em, 1)])
    if not one.figures:
        return [ex, em]
    others = [[figure.name, str(figure.count), *_cells(figure.value, 2)] for figure in one.figures]
    return [ex, em, [["", *head], *others]]


def _cells(found: Difference, digits: int) -> list[str]:
    text = _signed(found.b - found.a, digits)
    if found.interval is not None:
        low, high = found.interval
        text += f" ({low:.{digits}f}, {high:.{digits}f})"
    return [f"{found.a:.{digits}f}", f"{found.b:.{digits}f}", text]


def _signed(number: float, digits: int) -> str:
    return f"{round(number, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.0


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _padded(row: list[str], widths: list[int]) -> list[str]:
    """The cells in columns of these widths, all but the first one to the right."""
    rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return [row[0].ljust(widths[0]), *rest]


def _plain_table(rows: list[list[str]]) -> list[str]:
    """A table for the screen."""
    widths = _widths(rows)
    return ["  ".join(_padded(row, widths)) for row in rows]


def _markdown_table(rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns also stand below each other as plain text."""
    widths = _widths(rows)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [rows[0], rule, *rows[1:]]
    return [f"| {' | '.join(_padded(row, widths))} |" for row in lines]
