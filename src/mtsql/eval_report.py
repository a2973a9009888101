"""The report of eval.py: tables from the results of scores.json, for the screen and as Markdown.

For each data set there are two tables, which have its histories side by side: one of the verdicts
and one of how the episodes went.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mtsql.files import print_line, printing
from mtsql.judge.aggregate import TURNS
from mtsql.judge.error_classes import ERROR_DEFINITIONS
from mtsql.judge.hardness import HARDNESS
from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, COSTS, STARTS
from mtsql.run.screen import wrapped

Result = dict[str, Any]
"""One cell of the matrix, as scores.json has it."""
Row = tuple[str, ...] | None
"""The cells of a row; None for a line between two groups of rows."""
NOTES = {
    "EX": "execution match",
    "QM": "question match, the exact set match (EM) of a turn",
    "IM": "interaction match, the share of dialogues whose turns are all right by QM; "
    "`dialogues` has it by EX, too",
    "in brackets after a figure": "95 % interval, bootstrapped by dialogue",
    "in brackets after a name": "number of turns or dialogues",
    "not scored": "turns of the file without SQL, or without a database that can be read",
}
AHA_NOTES = {
    "aha": "of the episodes whose first execution failed or returned nothing, the share whose "
    "answer is right by EX; mended: those that answer with another query than the first one",
    "starts": "the first execution of an episode returned rows, was empty (no row or only NULLs), "
    "failed (an error or a limit), or there was none",
}
ERROR_NOTES = {
    "right by EM": "the share of the wrong answers that have the right clauses: a literal, or what "
    "the parser does not read, is wrong",
}
SECS_NOTES = {
    "wall secs": "the time on the clock for all questions, which are played side by side, divided "
    "by their number",
    "secs alone": "from the prompt to the end of the episode when nothing else runs, for a few "
    "questions played one after another: what a single user waits for",
}
SAMPLE_NOTES = {
    "pass@k": "the chance that one of k samples is right (unbiased estimate from all samples)",
    "vote@k": "the answers of the first k samples vote by their results on the database; the gold "
    "has no part in it. All other figures are about the first sample of each turn",
}


@dataclass(frozen=True)
class Sheet:
    """A table with a title."""

    title: str
    header: tuple[str, ...]
    rows: list[Row]


def sheets(results: Sequence[Result], digits: int = 1) -> list[Sheet]:
    """All tables. `digits` are the decimals of the intervals of percentages."""
    found = [_overview(results, digits)]
    for name in dict.fromkeys(result["data"] for result in results):
        cells = [result for result in results if result["data"] == name]
        found += [_verdicts(name, cells, digits), _episodes(name, cells, digits)]
        if "samples" in cells[0]:
            found.append(_samples(name, cells, digits))
    return found


def notes_of(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """What the figures mean: title -> name of a figure -> definition."""
    notes: dict[str, dict[str, str]] = {
        "Figures": {**NOTES, **AHA_NOTES, **ERROR_NOTES, **SECS_NOTES},
        "Abilities": ABILITY_DEFINITIONS,
        "Wrong answers by EX, each in the first class that applies": ERROR_DEFINITIONS,
    }
    if any("samples" in result for result in results):
        notes["Several samples"] = SAMPLE_NOTES
    return notes


def markdown(results: Sequence[Result], heading: str, facts: dict[str, str]) -> str:
    """The report as Markdown: a heading, facts by name, the tables, what their figures mean."""
    parts = [f"# {heading}", "\n".join(f"- {name}: {text}" for name, text in facts.items())]
    for sheet in sheets(results):
        lines = [_line(sheet.header), _line(["---"] * len(sheet.header))]
        blank = [""] * len(sheet.header)
        lines += [_line(row or blank) for row in sheet.rows]
        parts += [f"## {sheet.title}", "\n".join(lines)]
    for title, notes in notes_of(results).items():
        parts += [f"## {title}", "\n".join(f"- {name}: {text}" for name, text in notes.items())]
    return "\n\n".join(parts) + "\n"


def print_report(results: Sequence[Result]) -> None:
    """Print the tables and what their figures mean. Intervals are rounded to whole percents."""
    console = Console(highlight=False)
    with printing():
        for sheet in sheets(results, digits=0):
            table = Table(*sheet.header, box=SIMPLE, pad_edge=False, show_edge=False)
            for row in sheet.rows:
                if row is None:
                    table.add_section()
                else:
                    table.add_row(*row)
            console.print(sheet.title, markup=False)
            console.print(table)
            console.print()
    for title, notes in notes_of(results).items():
        print_line(f"{title}:")
        for name, text in notes.items():
            print_line(wrapped(f"  {name}: {text}", "    "))


def name_of(result: Result) -> str:
    """What a cell is called, such as `sparc dev, gold`."""
    return f"{result['data']}, {result['history']}"


def figure(
    value: float | None, interval: Sequence[float] | None, digits: int = 1, decimals: int = 1
) -> str:
    """A number with its interval, such as 40.9 (37.0, 44.8); - for none. `digits` are the decimals
    of the interval, `decimals` those of the number."""
    if value is None:
        return "-"
    text = f"{value:.{decimals}f}"
    if interval is None:
        return text
    low, high = interval
    return f"{text} ({low:.{digits}f}, {high:.{digits}f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _share(share: dict[str, Any], digits: int) -> str:
    return figure(share["percent"], share["interval"], digits)


def _of(share: dict[str, Any]) -> str:
    return f"{share['num']} of {share['of']}"


def _verdict(row: dict[str, Any], verdict: str, digits: int) -> str:
    if not row["count"]:
        return "-"
    return figure(row[verdict], row[f"{verdict}_interval"], digits)


def _overview(results: Sequence[Result], digits: int) -> Sheet:
    rows: list[Row] = []
    for result in results:
        name = name_of(result)
        if result["domain"] == "out-of-domain":
            name += " (out-of-domain)"
        ex = _verdict(result["all"], "ex", digits)
        qm = _verdict(result["all"], "em", digits)
        im = _verdict(result["interaction"], "em", digits)
        rows.append((name, ex, qm, im))
    return Sheet("Scores, %", ("data, history", "EX", "QM", "IM"), rows)


def _verdicts(name: str, cells: Sequence[Result], digits: int) -> Sheet:
    """EX and EM in all, by turn, by hardness and by dialogue."""
    histories = [cell["history"] for cell in cells]
    header = [f"EX {history}" for history in histories] + [f"EM {history}" for history in histories]

    def row(label: str, *keys: str) -> Row:
        found = [_inner(cell, keys) for cell in cells]
        texts = [_verdict(one, verdict, digits) for verdict in ("ex", "em") for one in found]
        return (f"{label} ({found[0]['count']})", *texts)

    rows = [row("all", "all"), None]
    rows += [row(f"turn {turn}", "by_turn", turn) for turn in TURNS]
    rows.append(None)
    rows += [row(level, "by_hardness", level) for level in HARDNESS]
    rows += [None, row("dialogues", "interaction")]
    title = f"{name}: right answers, %; {cells[0]['skipped']} turns were not scored"
    return Sheet(title, ("", *header), rows)


def _inner(values: dict[str, Any], keys: Sequence[str]) -> Any:
    """The value at the end of a path of keys."""
    found: Any = values
    for key in keys:
        found = found[key]
    return found


def _episodes(name: str, cells: Sequence[Result], digits: int) -> Sheet:
    """Abilities, starts, errors, endings and costs."""

    def row(label: str, text: Callable[[Result, str], str], key: str = "") -> Row:
        return (label, *(text(cell, key) for cell in cells))

    def ability(cell: Result, key: str) -> str:
        return figure(cell["abilities"][key], cell["ability_intervals"][key], 2, 2)

    def start(cell: Result, key: str) -> str:
        return _of(cell["aha"]["by_start"][key])

    def error(cell: Result, key: str) -> str:
        return _share(cell["errors"][key], digits)

    def ending(cell: Result, key: str) -> str:
        return str(cell["outcomes"].get(key, 0))

    def cost(cell: Result, key: str) -> str:
        return figure(cell["costs"][key]["mean"], cell["costs"][key]["interval"])

    def alone(cell: Result, _: str) -> str:
        secs = cell["secs"]["alone"]
        return figure(secs["mean"], secs["interval"], 2, 2)

    endings = sorted({name for cell in cells for name in cell["outcomes"]})
    rows = [row(key, ability, key) for key in ABILITY_DEFINITIONS]
    rows += [
        None,
        row("aha, %", lambda cell, _: _share(cell["aha"]["aha"], digits)),
        row("aha, episodes", lambda cell, _: _of(cell["aha"]["aha"])),
        row("- of which mended", lambda cell, _: str(cell["aha"]["mended"])),
        row("other starts", lambda cell, _: _of(cell["aha"]["other_starts"])),
    ]
    rows += [row(f"- right, start: {key}", start, key) for key in STARTS]
    rows += [None, row("wrong answers", lambda cell, _: str(cell["errors"]["other"]["of"]))]
    rows += [row(f"- {key}, %", error, key) for key in ERROR_DEFINITIONS]
    rows.append(row("right by EM, %", lambda cell, _: _share(cell["right_by_em"], digits)))
    rows += [None, *(row(f"ended: {key}", ending, key) for key in endings)]
    rows += [None, *(row(f"{key.replace('_', ' ')}, mean", cost, key) for key in COSTS)]
    rows.append(row("wall secs", lambda cell, _: f"{cell['secs']['per_question']:.3f}"))
    rows.append(row("secs alone", alone))
    return Sheet(f"{name}: how episodes went", ("", *(cell["history"] for cell in cells)), rows)


def _samples(name: str, cells: Sequence[Result], digits: int) -> Sheet:
    """pass@k and vote@k."""
    numbers = list(cells[0]["samples"]["ex"]["pass"])
    rows: list[Row] = []
    for cell in cells:
        for verdict in ("ex", "em"):
            for kind in ("pass", "vote"):
                shares = cell["samples"][verdict][kind]
                label = f"{cell['history']}: {kind}@k by {verdict.upper()}"
                rows.append((label, *(_share(shares[k], digits) for k in numbers)))
    header = ("", *(f"k = {k}" for k in numbers))
    return Sheet(f"{name}: {cells[0]['samples']['num_samples']} samples, %", header, rows)
