"""The official tables of a scorer report, as text."""

from collections.abc import Iterable

from mtsql.judge.aggregate import LEVELS, TURNS, Figures, Summary
from mtsql.judge.exact_match import PARTS
from mtsql.judge.score_files import Report

# Name of a row -> the field of Figures that it shows.
Rows = dict[str, str]


def format_report(report: Report) -> str:
    """The official tables as text."""
    summary = report.summary
    rows: Rows = {}
    if report.options.etype != "exec":
        rows["exact match"] = "em"
    if report.options.etype != "match":
        rows["execution"] = "ex"
    has_interactions = summary.interactions.count > 1
    columns = dict(summary.by_hardness)
    if has_interactions:
        columns["joint_all"] = summary.interactions

    lines = []
    for error in report.gold_errors:
        gold = error.gold
        lines.append(f"gold error, line {gold.line} ({gold.db_id}): {error.reason}: {gold.sql}")
    lines += _table(columns, rows)
    if report.options.etype != "exec":
        lines += _parts_tables(summary)
    if has_interactions:
        turns = {f"turn {name}": summary.by_turn[name] for name in TURNS}
        lines += ["", *_table(turns, rows)]
    return "\n".join(lines)


def _table(columns: dict[str, Figures], rows: Rows) -> list[str]:
    """A table with a head, the counts, and a row for each verdict."""
    lines = [_row("", columns), _row("count", (figures.count for figures in columns.values()))]
    for name, field in rows.items():
        values = (getattr(figures, field) for figures in columns.values())
        lines.append(_row(name, (f"{value:.3f}" for value in values)))
    return lines


def _parts_tables(summary: Summary) -> list[str]:
    """Three tables of the partial scores by level."""
    lines = []
    for field in ("accuracy", "recall", "f1"):
        lines += ["", _row(f"partial {field}", LEVELS)]
        for name in PARTS:
            values = (getattr(summary.parts[level][name], field) for level in LEVELS)
            lines.append(_row(name, (f"{value:.3f}" for value in values)))
    return lines


def _row(name: str, cells: Iterable[object]) -> str:
    return f"{name:<20}" + "".join(f"{cell!s:>10}" for cell in cells)
