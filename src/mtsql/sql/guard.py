"""Whether an execution match proves anything: the guard between the official verdicts and a reward.

A policy is paid for what it can find, and it finds what agrees by accident: `SELECT 3` where the gold counts three
rows, a filter left out where it keeps every row of a tiny database, anything without rows where the gold has none, the
last turn's SQL once more. So an answer is run again on altered copies of the database (variants.py), where only a
query that means the same keeps agreeing. The official metrics have no such guard, and evaluation uses none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mtsql.sql.execution import executed_text, official_prediction, results_agree
from mtsql.sql.cache import SharedCache
from mtsql.sql.parse import parse_sql
from mtsql.sql.sandbox import (
    DatabaseFileError,
    MemoryCopy,
    QueryConfig,
    QueryStatus,
    content_hash,
    file_version,
    run_query,
)
from mtsql.sql.schema import Schema
from mtsql.sql.variants import altered, memory_copy, reversed_rows

NUM_COPIES = 5
MAX_COPIES = 12
"""Copies of a gold; more, while none of them tells it from a constant."""
MAX_CACHED_BYTES = 128 * 2**20
"""All cached trials together take at most so many bytes."""
NUM_DIGITS = 9
"""Of a float that are compared."""


class Evidence(Enum):
    """What the copies say about an answer that agrees with the gold on the database itself."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NONE = "none"


@dataclass(frozen=True)
class _Copy:
    database: MemoryCopy
    gold_rows: tuple[tuple, ...]
    is_ordered: bool


@dataclass(frozen=True)
class Trial:
    """The copies a gold is tried on. `is_telling`: on one of them at least its result is neither empty nor the one it
    has on the database, so that no constant can agree with both."""

    copies: tuple[_Copy, ...]
    is_telling: bool
    num_bytes: int = 0
    is_lasting: bool = True
    """Whether it may be cached: every query of the gold was `is_repeatable`."""


def is_same_query(sql: str, other_sql: str, schema: Schema) -> bool:
    """The same text but for blanks and case, or the same parse with values and DISTINCT."""
    if _folded(sql) == _folded(other_sql):
        return True
    parsed = parse_sql(sql, schema)
    return parsed is not None and parsed == parse_sql(other_sql, schema)


def is_copied(sql: str, history: Sequence[tuple[str, str]], gold_sql: str, schema: Schema) -> bool:
    """Whether the answer is an earlier turn's query, while this turn's gold is another one."""
    copied = any(is_same_query(sql, earlier, schema) for _, earlier in history)
    return copied and not is_same_query(sql, gold_sql, schema)


def evidence(sql: str, gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Evidence:
    """Try an answer on the gold's copies. NONE where the gold has no rows on the database, or no copy can tell."""
    if is_same_query(sql, gold_sql, schema):
        return Evidence.AGREES
    trial = trial_of(gold_sql, schema, db_path, limits)
    text = executed_text(official_prediction(sql))
    for copy in trial.copies:
        result = run_query(copy.database, text, limits)
        if result.status in (QueryStatus.TIMEOUT, QueryStatus.TOO_LARGE):
            # The answer finished on the real database, so a limit on a copy does not show that it means something else.
            return Evidence.NONE
        if not result.is_ok or not results_agree(_distinct(result.rows), copy.gold_rows, copy.is_ordered):
            return Evidence.DIFFERS
    return Evidence.AGREES if trial.is_telling else Evidence.NONE


def trial_of(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    """Make the copies and run the gold on each, once for all answers to a turn.

    A copy on which the gold's own rows depend on the order of the stored ones (a tie at LIMIT, a bare column beside
    an aggregate) is not used; where only the order of its rows does, they count as a multiset. A database that cannot
    be read gives no copies.
    """
    try:
        key = gold_sql, schema, content_hash(*file_version(db_path)), limits
        return _TRIALS.get(key, lambda _: _make_trial(gold_sql, schema, db_path, limits))
    except DatabaseFileError:
        return Trial((), False)


def _make_trial(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    text = executed_text(gold_sql)
    original = run_query(db_path, text, limits)
    copies, is_telling, num_bytes, is_lasting = [], False, 0, original.is_repeatable
    for seed in range(MAX_COPIES if original.is_ok else 0):
        if seed >= NUM_COPIES and (is_telling or original.is_empty):
            break
        tables = altered(db_path, gold_sql, schema, seed)
        copy = memory_copy(tables)
        result, mirrored = (run_query(memory, text, limits) for memory in (copy, memory_copy(reversed_rows(tables))))
        is_lasting &= result.is_repeatable and mirrored.is_repeatable
        order = stable_order(result.rows, mirrored.rows, text) if result.is_ok and mirrored.is_ok else None
        if order is None:
            continue
        rows = _distinct(result.rows)
        copies.append(_Copy(copy, rows, order))
        num_bytes += len(copy.packed) + result.num_bytes
        is_same = results_agree(rows, _distinct(original.rows), False)
        is_telling |= not (original.is_empty or result.is_empty or is_same)
    return Trial(tuple(copies), is_telling, num_bytes, is_lasting)


_TRIALS: SharedCache[Trial] = SharedCache(
    MAX_CACHED_BYTES,
    num_bytes=lambda trial: trial.num_bytes + 1000,
    is_lasting=lambda trial: trial.is_lasting,
)


def stable_order(rows: Sequence[tuple], mirrored: Sequence[tuple], gold_text: str) -> bool | None:
    """Whether the gold fixes the order of its rows; None if not even which rows it returns."""
    rows, mirrored = _rounded(rows), _rounded(mirrored)
    is_ordered = "order by" in gold_text.lower()
    if results_agree(mirrored, rows, is_ordered):
        return is_ordered
    return False if results_agree(mirrored, rows, False) else None


def _rounded(rows: Sequence[tuple]) -> tuple[tuple, ...]:
    """Floats without the digits that depend on the order of a sum."""
    return tuple(tuple(_round(cell) if isinstance(cell, float) else cell for cell in row) for row in rows)


def _distinct(rows: Sequence[tuple]) -> tuple[tuple, ...]:
    """Each row once: a join repeats what IN does not, and the official verdict disregards DISTINCT."""
    return tuple(dict.fromkeys(_rounded(rows)))


def _round(number: float) -> float:
    return float(f"{number:.{NUM_DIGITS}g}") if math.isfinite(number) else number


def _folded(sql: str) -> str:
    return " ".join(sql.lower().split()).rstrip("; ")

