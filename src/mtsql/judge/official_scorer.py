"""Files in the official format -> the official tables; and the same tables from scores made elsewhere.

    python -m mtsql.judge.official_scorer --gold dev_gold.txt --pred pred.txt --tables tables.json --databases database

Gold: `SQL<TAB>db_id` a line; prediction: one SQL a line; a blank line ends an interaction in both. Where the
official program cuts the longer of two interactions silently we stop with an error, unless --official-zip
asks for its way. Where it dies of a gold that does not parse or run, we list the gold, score it 0, and go on.
"""

import json
import os
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, product
from pathlib import Path

from mtsql.files import print_line, write_text
from mtsql.judge.exact_match import HARDNESS, PARTS, Part, compare, hardness
from mtsql.judge.execution_match import (
    OFFICIAL_LIMITS,
    executed_text,
    official_prediction,
    texts_match,
)
from mtsql.judge.official_files import GoldLine, database_files, read_gold, read_predictions
from mtsql.sql.command_line import OneLineParser, whole_number
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema, load_schemas
from mtsql.sql.worker_pool import query_threads, set_num_workers

LEVELS = (*HARDNESS, "all")
TURNS = ("1", "2", "3", "4", "> 4")
MAX_PLUGGED = 10_000
"""Variants of one prediction that --plug-value tries; the official program tries them all, however
many."""


@dataclass(frozen=True)
class Score:
    """The verdicts on one turn. em, ex: None if not computed. hardness: None if the gold does not
    parse."""

    interaction: Hashable
    turn: int  # from 0
    hardness: str | None
    em: bool | None = None
    ex: bool | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Figures:
    """Means over `count` turns or interactions, as fractions; 0 of nothing is 0. None: not
    computed."""

    count: int
    em: float | None
    ex: float | None


@dataclass(frozen=True)
class PartFigures:
    accuracy: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Summary:
    """The official tables. `interactions`: the share with every turn right, IM in its `em`."""

    by_hardness: dict[str, Figures]
    by_turn: dict[str, Figures]
    interactions: Figures
    parts: dict[str, dict[str, PartFigures]]  # level -> part -> figures

    @property
    def question_match(self) -> float | None:
        return self.by_hardness["all"].em

    @property
    def interaction_match(self) -> float | None:
        return self.interactions.em


def aggregate(scores: Sequence[Score], num_empty_interactions: int = 0) -> Summary:
    """The official tables from the scores of single turns.

    num_empty_interactions: interactions of no turns (two blank lines in a row). Quirk: they are
    fully right.
    """
    levels = {
        name: [score for score in scores if name in ("all", score.hardness)] for name in LEVELS
    }
    turns = {
        name: [score for score in scores if min(score.turn, 4) == i] for i, name in enumerate(TURNS)
    }
    interactions: dict[Hashable, list[Score]] = {}
    for score in scores:
        interactions.setdefault(score.interaction, []).append(score)
    em, ex = (
        [_all_of(group, metric) for group in interactions.values()] for metric in ("em", "ex")
    )
    empty = [True] * num_empty_interactions
    return Summary(
        by_hardness={name: _figures(group) for name, group in levels.items()},
        by_turn={name: _figures(group) for name, group in turns.items()},
        interactions=Figures(
            len(em) + num_empty_interactions, _mean(em + empty), _mean(ex + empty)
        ),
        parts={
            level: {
                name: _part_figures([score.parts[index] for score in group if score.parts])
                for index, name in enumerate(PARTS)
            }
            for level, group in levels.items()
        },
    )


def _figures(scores: Sequence[Score]) -> Figures:
    return Figures(
        len(scores), _mean([score.em for score in scores]), _mean([score.ex for score in scores])
    )


def _all_of(scores: Sequence[Score], metric: str) -> bool | None:
    verdicts = [getattr(score, metric) for score in scores]
    return None if None in verdicts else all(verdicts)


def _mean(verdicts: Sequence[bool | None]) -> float | None:
    if None in verdicts:
        return None
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def _part_figures(parts: Sequence[Part]) -> PartFigures:
    """Accuracy counts where the prediction has the part, recall where the gold has it."""
    accuracy = _mean([part.f1 == 1 for part in parts if part.num_pred > 0])
    recall = _mean([part.f1 == 1 for part in parts if part.num_gold > 0])
    if not parts:
        return PartFigures(0.0, 0.0, 0.0)
    f1 = (
        2 * accuracy * recall / (accuracy + recall) if accuracy + recall else 1.0
    )  # quirk: 1 of two zeros
    return PartFigures(accuracy, recall, f1)


# Files.


@dataclass(frozen=True)
class ScorerConfig:
    """Defaults are the official ones, but for etype (officially "exec").

    etype: "match", "exec" or "all". keep_distinct, plug_value: of execution. compare_values,
    compare_distinct: of exact match, fixed in the official source. is_official_zip: cut the longer
    of two interactions silently.
    """

    etype: str = "all"
    keep_distinct: bool = False
    plug_value: bool = False
    compare_values: bool = False
    compare_distinct: bool = False
    is_official_zip: bool = False
    num_threads: int = os.cpu_count() or 1
    limits: QueryConfig = OFFICIAL_LIMITS

    def __post_init__(self) -> None:
        if self.etype not in ("match", "exec", "all"):
            raise ValueError(f"etype: expected match, exec or all, found {self.etype!r}")


@dataclass(frozen=True)
class GoldError:
    """A gold that cannot be met, whatever is predicted."""

    gold: GoldLine
    reason: str


@dataclass(frozen=True)
class Report:
    options: ScorerConfig
    summary: Summary
    gold_errors: tuple[GoldError, ...]
    scores: tuple[Score, ...]


def score_files(
    gold_file: Path,
    pred_file: Path,
    tables_file: Path,
    database_dirs: Sequence[Path],
    options: ScorerConfig = ScorerConfig(),
) -> Report:
    """Score a prediction file, after checking every gold against itself.

    Raises ValueError naming file and line for a database that tables_file or database_dirs lack,
    and for files whose interactions or turns differ in number.
    """
    golds, preds = read_gold(gold_file), read_predictions(pred_file)
    pairs = _pair(golds, preds, f"{gold_file} and {pred_file}", options)
    schemas = load_schemas(tables_file)
    files: dict[str, list[Path]] = {}
    for gold in chain.from_iterable(golds):
        if gold.db_id not in schemas:
            raise ValueError(
                f"{gold_file}:{gold.line}: database {gold.db_id!r} is not in {tables_file}"
            )
        if gold.db_id not in files:
            files[gold.db_id] = []
            if options.etype != "match":
                files[gold.db_id] = _found_files(gold, gold_file, database_dirs)

    def check(gold: GoldLine) -> GoldError | None:
        reason = _gold_fault(gold, schemas[gold.db_id], files[gold.db_id], options)
        return GoldError(gold, reason) if reason else None

    def score(pair: tuple[int, int, GoldLine, str]) -> Score:
        interaction, turn, gold, pred = pair
        return _score(
            interaction, turn, gold, pred, schemas[gold.db_id], files[gold.db_id], options
        )

    with query_threads(options.num_threads, "score") as pool:
        gold_errors = tuple(error for error in pool.map(check, chain.from_iterable(golds)) if error)
        scores = tuple(pool.map(score, pairs))
    num_empty = len(golds) - len({score.interaction for score in scores})
    return Report(options, aggregate(scores, num_empty), gold_errors, scores)


def _found_files(gold: GoldLine, gold_file: Path, folders: Sequence[Path]) -> list[Path]:
    try:
        return database_files(gold.db_id, folders)
    except ValueError as error:
        raise ValueError(f"{gold_file}:{gold.line}: {error}") from error


def _pair(
    golds: list[list[GoldLine]], preds: list[list[str]], files: str, options: ScorerConfig
) -> list[tuple[int, int, GoldLine, str]]:
    """(interaction, turn, gold, prediction), both counted from 0."""
    if len(golds) != len(preds):
        raise ValueError(f"{files}: {len(golds)} and {len(preds)} interactions")
    pairs = []
    for interaction, (gold_turns, pred_turns) in enumerate(zip(golds, preds, strict=True)):
        if len(gold_turns) != len(pred_turns) and not options.is_official_zip:
            where = f"interaction {interaction + 1} (gold line {gold_turns[0].line if gold_turns else '-'})"
            counts = f"{len(gold_turns)} and {len(pred_turns)} turns"
            raise ValueError(f"{files}: {where}: {counts}; --official-zip cuts the longer one")
        for turn, (gold, pred) in enumerate(zip(gold_turns, pred_turns, strict=False)):
            pairs.append((interaction, turn, gold, pred))
    return pairs


def _gold_fault(
    gold: GoldLine, schema: Schema, db_paths: Sequence[Path], options: ScorerConfig
) -> str:
    """Why the gold does not match itself; empty if it does."""
    level = hardness(gold.sql, schema)
    if level is None:
        return "does not parse"
    text = executed_text(gold.sql, options.keep_distinct)
    for path in db_paths:
        result = run_query(path, text, options.limits)
        if not result.is_ok:
            return f"does not run on {path.name}: {result.message}"
    if official_prediction(gold.sql) == gold.sql:
        return ""
    score = _score(0, 0, gold, gold.sql, schema, db_paths, options)
    is_met = score.em is not False and score.ex is not False
    return "" if is_met else "does not match itself: `value` in a prediction becomes `1`"


def _score(
    interaction: int,
    turn: int,
    gold: GoldLine,
    pred: str,
    schema: Schema,
    db_paths: Sequence[Path],
    options: ScorerConfig,
) -> Score:
    em, ex, parts = None, None, ()
    if options.etype != "exec":
        match = compare(
            pred,
            gold.sql,
            schema,
            compare_values=options.compare_values,
            compare_distinct=options.compare_distinct,
        )
        em, parts = match.is_match, match.parts
    if options.etype != "match":
        gold_text = executed_text(gold.sql, options.keep_distinct)
        pred_text = executed_text(official_prediction(pred), options.keep_distinct)
        texts = chain([pred_text], plugged(pred_text, gold_text) if options.plug_value else ())
        ex = any(texts_match(text, gold_text, db_paths, options.limits) for text in texts)
    return Score(interaction, turn, hardness(gold.sql, schema), em, ex, parts)


_LITERAL = re.compile(
    r""" '[^']*' | "[^"]*" | (?<!\S) [-+]? (?: \d*\.\d+ | \d+ ) (?!\S) """, re.VERBOSE
)
_TABLE_STAR = re.compile(r"\w+\.\*")


def plugged(pred_text: str, gold_text: str) -> Iterator[str]:
    """The prediction with each of its literals replaced by each literal of the gold, in every
    combination."""
    literals = sorted(set(_LITERAL.findall(gold_text)))
    pieces = [_TABLE_STAR.sub("*", piece.lower()) for piece in _LITERAL.split(pred_text)]
    for chosen in islice(product(literals, repeat=len(pieces) - 1), MAX_PLUGGED):
        yield pieces[0] + "".join(
            literal + piece for literal, piece in zip(chosen, pieces[1:], strict=True)
        )


# Text.


def format_report(report: Report) -> str:
    """The official tables as text."""
    summary, options = report.summary, report.options
    has_interactions = summary.interactions.count > 1
    lines = []
    for gold, reason in ((error.gold, error.reason) for error in report.gold_errors):
        lines.append(f"gold error, line {gold.line} ({gold.db_id}): {reason}: {gold.sql}")
    metrics = [("exact match", "em")][: options.etype != "exec"] + [("execution", "ex")][
        : options.etype != "match"
    ]
    columns = [*summary.by_hardness.values()] + [summary.interactions] * has_interactions
    lines += _table([*LEVELS] + ["joint_all"] * has_interactions, columns, metrics)
    for value in ("accuracy", "recall", "f1") if options.etype != "exec" else ():
        lines += ["", _row(f"partial {value}", LEVELS)]
        for name in PARTS:
            figures = (getattr(summary.parts[level][name], value) for level in LEVELS)
            lines.append(_row(name, (f"{figure:.3f}" for figure in figures)))
    if has_interactions:
        lines += [
            "",
            *_table([f"turn {name}" for name in TURNS], [*summary.by_turn.values()], metrics),
        ]
    return "\n".join(lines)


def _table(head: list[str], columns: list[Figures], metrics: list[tuple[str, str]]) -> list[str]:
    rows = [_row("", head), _row("count", (column.count for column in columns))]
    return rows + [
        _row(name, (f"{getattr(column, key):.3f}" for column in columns)) for name, key in metrics
    ]


def _row(name: str, cells) -> str:
    return f"{name:<20}" + "".join(f"{cell!s:>10}" for cell in cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the files that the flags name and print the tables."""
    parser = OneLineParser(
        prog="python -m mtsql.judge.official_scorer", description=__doc__.split("\n")[0]
    )

    def flag(name: str, help_text: str) -> None:
        parser.add_argument(name, action="store_true", help=help_text)

    parser.add_argument("--gold", type=Path, required=True, help="SQL<TAB>database id a line")
    parser.add_argument("--pred", type=Path, required=True, help="one SQL a line")
    parser.add_argument("--tables", type=Path, required=True, help="tables.json")
    parser.add_argument(
        "--databases", type=Path, required=True, nargs="+", help="folders of <id>/<id>.sqlite"
    )
    parser.add_argument("--etype", choices=("all", "match", "exec"), default="all")
    flag("--keep-distinct", "leave DISTINCT in what is executed")
    flag("--plug-value", "try the gold's literals in the prediction")
    flag("--compare-values", "exact match: literals count")
    flag("--compare-distinct", "exact match: DISTINCT of columns counts")
    flag("--official-zip", "cut the longer of two interactions silently")
    parser.add_argument(
        "--threads", type=whole_number, default=os.cpu_count() or 1, help="queries at a time"
    )
    steps = OFFICIAL_LIMITS.max_vm_steps
    parser.add_argument(
        "--max-steps",
        type=whole_number,
        default=steps,
        help=f"VM steps of a query (default: {steps:,})",
    )
    parser.add_argument("--json", type=Path, help="write figures and verdicts to this file")
    given = parser.parse_args(arguments)
    try:
        for folder in given.databases if given.etype != "match" else ():
            if not folder.is_dir():
                raise ValueError(f"--databases {folder}: no such folder")
        if given.json and given.json.is_dir():
            raise ValueError(f"--json {given.json}: a folder stands there, name a file")
        try:
            limits = replace(OFFICIAL_LIMITS, max_vm_steps=given.max_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("env.query.max_vm_steps", "--max-steps")) from error
        options = ScorerConfig(
            given.etype,
            given.keep_distinct,
            given.plug_value,
            given.compare_values,
            given.compare_distinct,
            given.official_zip,
            given.threads,
            limits,
        )
        set_num_workers(given.threads)
        report = score_files(given.gold, given.pred, given.tables, given.databases, options)
        if given.json:
            write_text(given.json, json.dumps(asdict(report), indent=1) + "\n")
        print_line(format_report(report))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
