"""Score files in the official format.

If two interactions differ in length, the official program truncates the longer one without an
error. This one stops with an error, unless `is_official_zip` is set. The official program crashes
on a gold query that does not parse or run. This one lists the query, gives it 0, and continues.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Literal, NamedTuple

from mtsql.judge.aggregate import Score, Summary, aggregate
from mtsql.judge.exact_match import Part, match_clauses
from mtsql.judge.execution_match import (
    OFFICIAL_LIMITS,
    executed_text,
    official_prediction,
    set_match,
    texts_match,
)
from mtsql.judge.hardness import hardness
from mtsql.judge.official_files import GoldLine, database_files, read_gold, read_predictions
from mtsql.sql.dialogues import ExRule
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema, load_schemas
from mtsql.sql.worker_pool import query_threads

MAX_PLUGGED = 10_000
"""Limit of the variants of a prediction that `plug_value` tries; the official program has none."""


@dataclass(frozen=True)
class ScorerConfig:
    """How to score. The defaults are the official ones, except for etype (officially "exec")."""

    etype: Literal["all", "match", "exec"] = "all"
    """The verdicts to compute: exact match, execution match, or both."""
    ex: ExRule = "official"
    """Execution match: how results are compared. set: as BIRD's evaluator does."""
    keep_distinct: bool = False
    """Execution match: leave DISTINCT in the queries that run."""
    plug_value: bool = False
    """Execution match: also try the prediction with the gold's literals in it."""
    compare_values: bool = False
    """Exact match: compare literals. The official source fixes this and the next switch."""
    compare_distinct: bool = False
    """Exact match: compare DISTINCT."""
    is_official_zip: bool = False
    """Truncate the longer of two interactions without an error."""
    num_threads: int = os.cpu_count() or 1
    limits: QueryConfig = OFFICIAL_LIMITS

    def __post_init__(self) -> None:
        if self.etype not in ("match", "exec", "all"):
            raise ValueError(f"etype: expected match, exec or all, found {self.etype!r}")
        if self.ex == "set":
            unused = [name for name in ("keep_distinct", "plug_value") if getattr(self, name)]
            unused += ["etype match"] if self.etype == "match" else []
            if unused:
                raise ValueError(f"ex is set: {unused[0]} does not go with it")


@dataclass(frozen=True)
class GoldError:
    """A gold query that no prediction can match."""

    gold: GoldLine
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that the scorer found."""

    options: ScorerConfig
    summary: Summary
    gold_errors: tuple[GoldError, ...]
    scores: tuple[Score, ...]


class _Pair(NamedTuple):
    """A gold and its prediction; interaction and turn are counted from 0."""

    interaction: int
    turn: int
    gold: GoldLine
    pred: str


def score_files(
    gold_file: Path,
    pred_file: Path,
    tables_file: Path,
    database_dirs: Sequence[Path],
    options: ScorerConfig = ScorerConfig(),
) -> Report:
    """Score a prediction file, after matching each gold with itself.

    ValueError that names file and line for a database that is missing in tables_file or
    database_dirs, and for files that differ in their numbers of interactions or turns.
    """
    interactions = read_gold(gold_file)
    preds = read_predictions(pred_file)
    pairs = _pair(interactions, preds, f"{gold_file} and {pred_file}", options.is_official_zip)
    golds = list(chain.from_iterable(interactions))
    schemas = load_schemas(tables_file)
    db_paths: dict[str, list[Path]] = {}
    for gold in golds:
        where = f"{gold_file}:{gold.line}"
        if gold.db_id not in schemas:
            raise ValueError(f"{where}: database {gold.db_id!r} is not in {tables_file}")
        if gold.db_id not in db_paths:
            db_paths[gold.db_id] = []
            if options.etype != "match":
                db_paths[gold.db_id] = _find_databases(gold.db_id, database_dirs, where)
    scorer = _Scorer(schemas, db_paths, options)
    with query_threads(options.num_threads, "score") as threads:
        gold_errors = tuple(error for error in threads.map(scorer.check, golds) if error)
        scores = tuple(threads.map(scorer.score, pairs))
    num_empty = len(interactions) - len({score.interaction for score in scores})
    return Report(options, aggregate(scores, num_empty), gold_errors, scores)


def _find_databases(db_id: str, folders: Sequence[Path], where: str) -> list[Path]:
    try:
        return database_files(db_id, folders)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _pair(
    golds: list[list[GoldLine]], preds: list[list[str]], files: str, is_official_zip: bool
) -> list[_Pair]:
    """Pair each gold with its prediction. `files` names both files in an error."""
    if len(golds) != len(preds):
        raise ValueError(f"{files}: {len(golds)} and {len(preds)} interactions")
    pairs = []
    for interaction, (gold_turns, pred_turns) in enumerate(zip(golds, preds, strict=True)):
        if len(gold_turns) != len(pred_turns) and not is_official_zip:
            line = gold_turns[0].line if gold_turns else "-"
            where = f"interaction {interaction + 1} (gold line {line})"
            counts = f"{len(gold_turns)} and {len(pred_turns)} turns"
            raise ValueError(f"{files}: {where}: {counts}; --official-zip truncates the longer one")
        for turn, (gold, pred) in enumerate(zip(gold_turns, pred_turns, strict=False)):
            pairs.append(_Pair(interaction, turn, gold, pred))
    return pairs


@dataclass(frozen=True)
class _Scorer:
    """Scores single turns. schemas and db_paths have database ids as keys."""

    schemas: dict[str, Schema]
    db_paths: dict[str, list[Path]]
    options: ScorerConfig

    def check(self, gold: GoldLine) -> GoldError | None:
        """What is wrong with a gold, if it does not match itself."""
        reason = self._fault(gold)
        return GoldError(gold, reason) if reason else None

    def _fault(self, gold: GoldLine) -> str:
        """Why the gold does not match itself; empty if it does."""
        is_set = self.options.ex == "set"
        needs_parsing = not is_set or self.options.etype == "all"
        if needs_parsing and hardness(gold.sql, self.schemas[gold.db_id]) is None:
            return "does not parse"
        text = gold.sql if is_set else executed_text(gold.sql, self.options.keep_distinct)
        for path in self.db_paths[gold.db_id]:
            result = run_query(path, text, self.options.limits)
            if not result.is_ok:
                return f"does not run on {path.name}: {result.message}"
        if official_prediction(gold.sql) == gold.sql:
            return ""
        score = self.score(_Pair(0, 0, gold, gold.sql))
        if score.em is not False and score.ex is not False:
            return ""
        return "does not match itself: `value` in a prediction becomes `1`"

    def score(self, pair: _Pair) -> Score:
        """The verdicts on one prediction."""
        schema = self.schemas[pair.gold.db_id]
        em = None
        ex = None
        parts: tuple[Part, ...] = ()
        if self.options.etype != "exec":
            match = match_clauses(
                pair.pred,
                pair.gold.sql,
                schema,
                compare_values=self.options.compare_values,
                compare_distinct=self.options.compare_distinct,
            )
            em = match.is_match
            parts = match.parts
        if self.options.etype != "match":
            ex = self._executes(pair)
        level = hardness(pair.gold.sql, schema)
        return Score(pair.interaction, pair.turn, level, em, ex, parts)

    def _executes(self, pair: _Pair) -> bool:
        """Execution match of the prediction, or of one of its variants with `plug_value`."""
        options = self.options
        db_paths = self.db_paths[pair.gold.db_id]
        if options.ex == "set":
            return set_match(pair.pred, pair.gold.sql, db_paths, options.limits)
        gold_text = executed_text(pair.gold.sql, options.keep_distinct)
        pred_text = executed_text(official_prediction(pair.pred), options.keep_distinct)
        if texts_match(pred_text, gold_text, db_paths, options.limits):
            return True
        variants = plugged(pred_text, gold_text) if options.plug_value else ()
        return any(texts_match(text, gold_text, db_paths, options.limits) for text in variants)


_LITERAL = re.compile(
    r""" '[^']*' | "[^"]*" | (?<!\S) [-+]? (?: \d*\.\d+ | \d+ ) (?!\S) """, re.VERBOSE
)
_TABLE_STAR = re.compile(r"\w+\.\*")


def plugged(pred_text: str, gold_text: str) -> Iterator[str]:
    """The prediction with its literals replaced by literals of the gold, in every combination.

    `a = 1 AND b = 2` with the gold's literals 8 and 9 gives `a = 8 and b = 8`, `a = 8 and b = 9`,
    `a = 9 and b = 8` and `a = 9 and b = 9`.
    """
    literals = sorted(set(_LITERAL.findall(gold_text)))
    first, *rest = (_TABLE_STAR.sub("*", piece.lower()) for piece in _LITERAL.split(pred_text))
    for chosen in islice(product(literals, repeat=len(rest)), MAX_PLUGGED):
        parts = [first]
        for literal, piece in zip(chosen, rest, strict=True):
            parts += [literal, piece]
        yield "".join(parts)
