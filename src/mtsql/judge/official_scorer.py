"""Score files in the official format and print the official tables.

    python -m mtsql.judge.official_scorer --gold dev_gold.txt --pred pred.txt \\
        --tables tables.json --databases database

Gold: `SQL<TAB>db_id` a line; prediction: one SQL a line; a blank line ends an interaction in both.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mtsql.files import print_line, write_text
from mtsql.judge.aggregate import LEVELS, TURNS, Figures, Summary
from mtsql.judge.exact_match import PARTS
from mtsql.judge.execution_match import OFFICIAL_LIMITS
from mtsql.judge.score_files import Report, ScorerConfig, score_files
from mtsql.sql.command_line import OneLineParser, whole_number
from mtsql.sql.sandbox import QueryConfig
from mtsql.sql.worker_pool import set_num_workers

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


def _parser() -> OneLineParser:
    """The flags of the command."""
    summary = __doc__.split("\n")[0]
    parser = OneLineParser(prog="python -m mtsql.judge.official_scorer", description=summary)

    def switch(name: str, text: str) -> None:
        parser.add_argument(name, action="store_true", help=text)

    def path(name: str, text: str, **options: object) -> None:
        parser.add_argument(name, type=Path, help=text, **options)

    def number(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=whole_number, default=default, help=text)

    path("--gold", "one SQL<TAB>database id a line", required=True)
    path("--pred", "one SQL a line", required=True)
    path("--tables", "tables.json", required=True)
    path("--databases", "folders with <id>/<id>.sqlite", required=True, nargs="+")
    parser.add_argument("--etype", choices=("all", "match", "exec"), default="all")
    switch("--keep-distinct", "execution: leave DISTINCT in the queries that run")
    switch("--plug-value", "execution: also try the gold's literals in the prediction")
    switch("--compare-values", "exact match: compare literals")
    switch("--compare-distinct", "exact match: compare DISTINCT of columns")
    switch("--official-zip", "truncate the longer of two interactions without an error")
    number("--threads", os.cpu_count() or 1, "number of queries that run at a time")
    steps = OFFICIAL_LIMITS.max_vm_steps
    number("--max-steps", steps, f"limit of VM steps for a query (default: {steps:,})")
    path("--json", "file to write figures and verdicts to")
    return parser


def _limits(max_steps: int) -> QueryConfig:
    try:
        return replace(OFFICIAL_LIMITS, max_vm_steps=max_steps)
    except ValueError as error:
        raise ValueError(str(error).replace("env.query.max_vm_steps", "--max-steps")) from error


def _score(given: Namespace) -> None:
    """Score the given files, print the tables, and write the JSON file."""
    if given.etype != "match":
        for folder in given.databases:
            if not folder.is_dir():
                raise ValueError(f"--databases {folder}: no such folder")
    if given.json and given.json.is_dir():
        raise ValueError(f"--json {given.json}: a folder stands there, name a file")
    options = ScorerConfig(
        etype=given.etype,
        keep_distinct=given.keep_distinct,
        plug_value=given.plug_value,
        compare_values=given.compare_values,
        compare_distinct=given.compare_distinct,
        is_official_zip=given.official_zip,
        num_threads=given.threads,
        limits=_limits(given.max_steps),
    )
    set_num_workers(given.threads)
    report = score_files(given.gold, given.pred, given.tables, given.databases, options)
    if given.json:
        write_text(given.json, json.dumps(asdict(report), indent=1) + "\n")
    print_line(format_report(report))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user ends it with one line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _score(given)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
