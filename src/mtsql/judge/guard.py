"""The guard: it checks that an answer whose rows agree with the gold query's did not get them by
accident.

A policy learns whatever is rewarded, and rows often agree by accident:

- `SELECT 3`, where the gold query counts three rows;
- an answer without a filter, where the filter keeps every row of a tiny database;
- a list of the values that a tool has shown;
- anything without rows, where the gold query returns none;
- the last turn's SQL once more.

So an answer also runs on altered copies of the database (altered_copies.py), where only a query
with the same meaning still agrees. The guard can only turn a match into a mismatch. The official
metrics have no such guard, and evaluation uses none.

How a copy is made and used:

1. `content_of` reads a database (content.py).
2. `altered` changes the content (altered_copies.py), and `memory_copy` packs it.
3. A SQL worker builds the copy in its memory (mtsql/sql/connection.py).
4. `trial_of` runs the gold query on it.
5. `evidence` compares an answer's rows there with the gold query's.

In this folder, "the gold" is short for the gold query.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from mtsql.judge.agreement import (
    agrees_but_for_ties,
    is_ordered,
    ordered_both_ways,
    rounded,
    rows_agree,
    selects_distinct,
    stable_order,
)
from mtsql.judge.altered_copies import altered
from mtsql.judge.content import memory_copy
from mtsql.judge.same_query import has_same_program
from mtsql.sql.cache import SharedCache
from mtsql.sql.connection import TICK_VM_STEPS
from mtsql.sql.dialogues import ExRule
from mtsql.sql.runnable import QUOTED, folded
from mtsql.sql.sandbox import (
    DatabaseFileError,
    MemoryCopy,
    QueryConfig,
    QueryResult,
    QueryStatus,
    content_hash,
    file_version,
    run_query,
)
from mtsql.sql.schema import Schema, fold

NUM_COPIES = 8
"""Number of copies that are made for a gold query."""
MAX_COPIES = 12
"""Maximum number of copies, for a gold query whose result is a constant on all copies so far."""
SECS_PER_TICK = 0.1
"""Time limit of a query on a copy, in seconds for each million VM steps of its budget. The steps
themselves take a tenth of that, so only work that is not counted in steps reaches the limit."""
MAX_CACHED_BYTES = 128 * 2**20
"""Limit of all cached trials together."""
_TRIAL_BYTES = 1000
"""Size of a cached trial without its copies and rows."""

Rows = Sequence[tuple]


class Evidence(Enum):
    """What the copies say about an answer that agrees with the gold on the database itself."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NONE = "none"
    """Copies could be made, but on all of them the gold returns nothing, or the same constant, or
    rows that depend on how the database stores them."""
    UNKNOWN = "unknown"
    """There are no copies on which the gold runs, or they lack something that the answer names."""


@dataclass(frozen=True)
class _Copy:
    """A copy, and the gold's rows on it, with ties broken in two opposite ways.

    is_telling: the gold's result is not empty here and differs from its result on the database, so
    no constant can agree with both.
    """

    database: MemoryCopy
    gold_rows: Rows
    mirrored_rows: Rows
    is_telling: bool


@dataclass(frozen=True)
class Trial:
    """The copies on which the answers to one gold are tried.

    is_unknown: the gold ran on no copy. is_lasting: the trial may be cached, because every query of
    the gold was `is_repeatable`.
    """

    copies: tuple[_Copy, ...]
    is_unknown: bool = False
    num_bytes: int = 0
    is_lasting: bool = True

    @property
    def is_telling(self) -> bool:
        """Whether some copy distinguishes the gold from a constant."""
        return any(copy.is_telling for copy in self.copies)


def evidence(
    sql: str,
    gold_sql: str,
    schema: Schema,
    db_path: Path,
    limits: QueryConfig,
    rule: ExRule = "official",
) -> Evidence:
    """Try an answer, which runs on the database, on the gold's copies. rule: "set" compares rows
    there as BIRD's EX does."""
    if folded(sql) == folded(gold_sql):
        return Evidence.AGREES
    trial = trial_of(gold_sql, schema, db_path, limits)
    copy_limits = _limits_on_copies(limits)
    is_telling = False
    is_unknown = trial.is_unknown
    for copy in trial.copies:
        result = run_query(copy.database, sql, copy_limits)
        if not result.is_ok and _lacks_what_it_names(sql, copy.database, copy_limits):
            is_unknown = True
        elif not result.is_ok or not _agrees(result.rows, copy, sql, gold_sql, rule):
            return Evidence.DIFFERS
        elif copy.is_telling:
            is_telling = True
    if is_telling:
        return Evidence.AGREES
    text = _with_single_quotes(sql, schema)
    gold_text = _with_single_quotes(gold_sql, schema)
    if has_same_program(text, gold_text, db_path, copy_limits):
        return Evidence.AGREES
    return Evidence.UNKNOWN if is_unknown else Evidence.NONE


def _limits_on_copies(limits: QueryConfig) -> QueryConfig:
    num_ticks = max(1, limits.max_vm_steps // TICK_VM_STEPS)
    return replace(limits, timeout_secs=min(limits.timeout_secs, SECS_PER_TICK * num_ticks))


_MISSING = re.compile(
    r"no such (column|index|function|collation|module|table: (?!(main\.)?sqlite_))"
    r"|no query solution"
)


def _lacks_what_it_names(sql: str, copy: MemoryCopy, limits: QueryConfig) -> bool:
    """Whether SQLite cannot compile the query on the copy, although it runs on the database.

    Then something could not be copied. The rows that the answer finds have no influence on that.
    SQLite's own tables, which no copy has, do not count: the answer may not name them.
    """
    compiled = run_query(copy, f"EXPLAIN {sql}", limits)
    return compiled.status is QueryStatus.ERROR and bool(_MISSING.search(compiled.message))


def _agrees(rows: Rows, copy: _Copy, sql: str, gold_sql: str, rule: ExRule) -> bool:
    """Whether an answer's rows on a copy are the gold's.

    Repeated rows count only if one of the two texts says SELECT DISTINCT, because a join repeats
    rows that IN does not.
    """
    gold = copy.gold_rows
    mirrored = copy.mirrored_rows
    if _is_nothing(rows) and _is_nothing(gold):
        return True  # max() of no rows is NULL, while ORDER BY with LIMIT 1 returns no row
    if rule == "set":
        return set(rounded(rows)) == set(rounded(gold))
    if not selects_distinct(sql) and not selects_distinct(gold_sql):
        rows = _without_repeats(rows)
        gold = _without_repeats(gold)
        mirrored = _without_repeats(mirrored)
    if not rows_agree(rows, gold):
        return False
    return not is_ordered(gold_sql) or agrees_but_for_ties(rows, gold, mirrored)


def _is_nothing(rows: Rows) -> bool:
    """Whether there are no values except NULL."""
    return all(cell is None for row in rows for cell in row)


def _without_repeats(rows: Rows) -> Rows:
    """Each row once, at its first place."""
    return tuple(dict.fromkeys(rounded(rows)))


_QUOTED = re.compile(QUOTED, re.VERBOSE | re.DOTALL)


def _with_single_quotes(sql: str, schema: Schema) -> str:
    """The text with 'x' for "x", unless x is a name.

    SQLite compiles `a IN ("x")` and `a IN ('x')` to different steps.
    """
    names = {fold(table.name) for table in schema.tables}
    names |= {fold(column.name) for table in schema.tables for column in table.columns}

    def requoted(found: re.Match[str]) -> str:
        text = found[0]
        inner = text[1:-1]
        if text[0] != '"' or fold(inner) in names or "'" in text or '""' in inner:
            return text
        return f"'{inner}'"

    return _QUOTED.sub(requoted, sql)


def trial_of(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    """Make the copies and run the gold on each of them, once for all answers to a turn.

    A copy is not used if the gold does not fix its own rows there (a tie at LIMIT, a bare column
    beside an aggregate). A database that cannot be read gives no copies.
    """
    try:
        key = gold_sql, schema, content_hash(*file_version(db_path)), limits
        return _TRIALS.get(key, lambda _: _make_trial(gold_sql, schema, db_path, limits))
    except DatabaseFileError:
        return Trial((), is_unknown=True)


def _make_trial(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    original = run_query(db_path, gold_sql, limits)
    if not original.is_ok:
        return Trial((), is_unknown=True, is_lasting=original.is_repeatable)
    copy_limits = _limits_on_copies(limits)
    copies: list[_Copy] = []
    num_run = 0
    num_bytes = 0
    is_lasting = original.is_repeatable
    for seed in range(MAX_COPIES):
        if seed >= NUM_COPIES and any(copy.is_telling for copy in copies):
            break
        database = memory_copy(altered(db_path, gold_sql, schema, seed))
        result = run_query(database, gold_sql, copy_limits)
        mirrored = run_query(replace(database, is_reversed=True), gold_sql, copy_limits)
        is_lasting &= result.is_repeatable and mirrored.is_repeatable
        if result.is_ok and mirrored.status is QueryStatus.ERROR:
            mirrored = result  # something in its CREATE statements does not allow another order
        if not result.is_ok or not mirrored.is_ok:
            if QueryStatus.TIMEOUT in (result.status, mirrored.status):
                break  # the gold would take as long on the other copies
            continue
        num_run += 1
        rows = _rows_with_ties(gold_sql, database, result, mirrored, copy_limits)
        if rows is not None:
            is_constant = rows_agree(_without_repeats(result.rows), _without_repeats(original.rows))
            is_telling = not result.is_empty and not is_constant
            copies.append(_Copy(database, *rows, is_telling))
            num_bytes += len(database.packed) + result.num_bytes + mirrored.num_bytes
    return Trial(tuple(copies), num_run == 0, num_bytes, is_lasting)


def _rows_with_ties(
    gold_sql: str, copy: MemoryCopy, result: QueryResult, mirrored: QueryResult, limits: QueryConfig
) -> tuple[Rows, Rows] | None:
    """The gold's rows on a copy with ties broken in two opposite ways.

    mirrored: its result on the copy with all rows stored in the opposite order. None if the gold
    does not fix which rows it returns.
    """
    if stable_order(result.rows, mirrored.rows, gold_sql) is None:
        return None
    orders = ordered_both_ways(gold_sql, len(result.columns), copy, limits)
    if orders is None:
        return result.rows, mirrored.rows
    return orders if rows_agree(*orders) else None  # rows that do not agree tie at LIMIT


_TRIALS: SharedCache[Trial] = SharedCache(
    MAX_CACHED_BYTES,
    num_bytes=lambda trial: trial.num_bytes + _TRIAL_BYTES,
    is_lasting=lambda trial: trial.is_lasting,
)
