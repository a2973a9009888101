"""Whether an execution match proves anything: the guard between rows that agree and a reward.

A policy is paid for what it can find, and it finds what agrees by accident: `SELECT 3` where the
gold counts three rows, a filter left out where it keeps every row of a tiny database, a list of the
values that a tool has shown, anything without rows where the gold has none, the last turn's SQL
once more. So an answer is run again on altered copies of the database (variants.py), where only a
query that means the same keeps agreeing. The official metrics have no such guard, and evaluation
uses none.

The way of a copy: `content_of` reads a database (content.py, tables.py), `altered` changes it
(variants.py, new_values.py), `memory_copy` packs it, a SQL worker builds it in its memory
(connection.py), and `trial_of` runs the gold on it. `evidence` compares an answer with that.
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
    without_quotes,
)
from mtsql.judge.altered_copies import altered
from mtsql.judge.content import memory_copy
from mtsql.judge.exact_match import exact_match
from mtsql.judge.sql_parser import parse_sql
from mtsql.sql.cache import SharedCache
from mtsql.sql.connection import TICK_VM_STEPS
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
MAX_COPIES = 12
"""Copies of a gold; more, while none of them tells it from a constant."""
SECS_PER_TICK = 0.1
"""On a copy, a query may take so many seconds for each million steps of its budget. Steps take a
tenth of that; only what needs no steps takes longer."""
MAX_CACHED_BYTES = 128 * 2**20
"""All cached trials together take at most so many bytes."""


_QUOTED = re.compile(QUOTED, re.VERBOSE | re.DOTALL)


class Evidence(Enum):
    """What the copies say about an answer that agrees with the gold on the database itself."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NONE = "none"
    """Copies could be made, but on all of them the gold returns nothing, or the same constant, or
    rows that depend on how the database stores them."""
    UNKNOWN = "unknown"
    """There are no copies on which the gold runs, or they lack what the answer names."""


@dataclass(frozen=True)
class _Copy:
    """A copy, and the gold's rows on it, with ties broken in two opposite ways.

    is_telling: the gold's result is neither empty here nor the one it has on the database, so that
    no constant can agree with both.
    """

    database: MemoryCopy
    gold_rows: tuple[tuple, ...]
    mirrored_rows: tuple[tuple, ...]
    is_telling: bool


@dataclass(frozen=True)
class Trial:
    """The copies a gold is tried on."""

    copies: tuple[_Copy, ...]
    is_unknown: bool = False
    """Whether the gold ran on no copy."""
    num_bytes: int = 0
    is_lasting: bool = True
    """Whether it may be cached: every query of the gold was `is_repeatable`."""

    @property
    def is_telling(self) -> bool:
        return any(copy.is_telling for copy in self.copies)


def is_same_query(sql: str, other_sql: str, schema: Schema) -> bool:
    """The same text but for blanks and case, or the same parse with values and DISTINCT."""
    if folded(sql) == folded(other_sql):
        return True
    parsed = parse_sql(sql, schema)
    return parsed is not None and parsed == parse_sql(other_sql, schema)


def has_same_program(sql: str, other_sql: str, db_path: Path, config: QueryConfig) -> bool:
    """Whether SQLite compiles both texts to the same steps: aliases, redundant brackets and quotes
    change nothing there. Then they return the same rows, whatever the tables hold."""
    one, other = (run_query(db_path, f"EXPLAIN {text}", config) for text in (sql, other_sql))
    return one.is_ok and other.is_ok and one.rows == other.rows


def _with_single_quotes(sql: str, schema: Schema) -> str:
    """The text with 'x' for "x", unless x is a name. SQLite compiles `a IN ("x")` in another
    way."""
    names = {fold(table.name) for table in schema.tables}
    names |= {fold(column.name) for table in schema.tables for column in table.columns}

    def requoted(found: re.Match) -> str:
        text = found[0]
        if text[0] != '"' or fold(text[1:-1]) in names or "'" in text or '""' in text[1:-1]:
            return text
        return f"'{text[1:-1]}'"

    return _QUOTED.sub(requoted, sql)


class Copied(Enum):
    """What an answer has of an earlier turn's query, where this turn's gold is another one."""

    NO = "no"
    STRUCTURE = "structure"
    """All but the literals, as exact match compares. An honest answer may look like that, too: then
    its literals are those that this turn asks for."""
    QUERY = "query"
    """All of it, but for DISTINCT, the order of columns, and a SELECT around it."""


def copied_from_history(
    sql: str,
    history: Sequence[tuple[str, str]],
    gold_sql: str,
    schema: Schema,
    db_path: Path,
    config: QueryConfig,
) -> Copied:
    """Compare an answer with the (question, SQL) pairs of earlier turns."""
    forms = {sql, _unwrapped(sql)}
    if any(means_same(form, gold_sql, schema) for form in forms):
        return Copied.NO
    found = Copied.NO
    for _, earlier in history:
        if means_same(earlier, gold_sql, schema) or has_same_program(
            earlier, gold_sql, db_path, config
        ):
            continue  # the question asks for the same again
        if has_same_program(sql, earlier, db_path, config):
            return Copied.QUERY
        for form in forms:
            if folded(form) == folded(earlier):
                return Copied.QUERY
            if exact_match(form, earlier, schema, is_official=False):
                if _literals(form) == _literals(earlier):
                    return Copied.QUERY
                found = Copied.STRUCTURE
    return found


def means_same(sql: str, other_sql: str, schema: Schema) -> bool:
    """Equal as exact match compares, and in what it does not see: literals, DISTINCT, directions of
    ORDER BY, and which of two columns that refer to each other is named."""
    if folded(sql) == folded(other_sql):
        return True
    is_match = exact_match(
        sql, other_sql, schema, compare_values=True, compare_distinct=True, is_official=False
    )
    return is_match and all(
        of(sql) == of(other_sql) for of in (_literals, _words, lambda text: _columns(text, schema))
    )


def _words(sql: str) -> list[str]:
    """How often the text says DISTINCT and DESC."""
    return sorted(re.findall(r"\b(?:distinct|desc)\b", without_quotes(sql).lower()))


def _columns(sql: str, schema: Schema) -> list[str]:
    """All columns that the parsed query names, sorted; also those behind ON."""
    return sorted(re.findall(r"ColumnName\(.*?\)", repr(parse_sql(sql, schema))))


_LITERAL = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|(?<![\w.])\d+(?:\.\d+)?(?![\w.])""")
_OPENING = re.compile(r"\s*select\s+(?:distinct\s+)?(?:\w+\.)?\*\s*from\s*\(", re.IGNORECASE)


def _literals(sql: str) -> list[str]:
    """The numbers and quoted texts, sorted; LIMIT's number is one of them."""
    return sorted(literal.strip("'\"").lower() for literal in _LITERAL.findall(sql))


def _unwrapped(sql: str) -> str:
    """The query within any number of `SELECT * FROM (...)`."""
    while opening := _OPENING.match(sql):
        end = sql.rfind(")")
        alias = sql[end + 1 :].strip("; \n\t").lower().split()
        is_whole = not alias or alias[:-1] in ([], ["as"])
        if end < opening.end() or not is_whole:
            break
        sql = sql[opening.end() : end]
    return sql


def evidence(
    sql: str, gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig
) -> Evidence:
    """Try an answer, which runs on the database, on the gold's copies."""
    if folded(sql) == folded(gold_sql):
        return Evidence.AGREES
    trial, limits = trial_of(gold_sql, schema, db_path, limits), _for_copies(limits)
    is_telling, is_unknown = False, trial.is_unknown
    for copy in trial.copies:
        result = run_query(copy.database, sql, limits)
        if not result.is_ok and _lacks_what_it_names(sql, copy.database, limits):
            is_unknown = True
        elif not result.is_ok or not _agrees(result.rows, copy, sql, gold_sql):
            return Evidence.DIFFERS
        else:
            is_telling |= copy.is_telling
    texts = (_with_single_quotes(text, schema) for text in (sql, gold_sql))
    if is_telling or has_same_program(*texts, db_path, limits):
        return Evidence.AGREES
    return Evidence.UNKNOWN if is_unknown else Evidence.NONE


def _for_copies(limits: QueryConfig) -> QueryConfig:
    secs = SECS_PER_TICK * max(1, limits.max_vm_steps // TICK_VM_STEPS)
    return replace(limits, timeout_secs=min(limits.timeout_secs, secs))


_MISSING = re.compile(
    r"no such (column|index|function|collation|module|table: (?!(main\.)?sqlite_))"
    r"|no query solution"
)


def _lacks_what_it_names(sql: str, copy: MemoryCopy, limits: QueryConfig) -> bool:
    """Whether SQLite cannot compile the query on the copy, although it runs on the database:
    something could not be copied. What the answer finds in the rows has no influence on that. It
    may not name SQLite's own tables, which no copy has."""
    compiled = run_query(copy, f"EXPLAIN {sql}", limits)
    return compiled.status is QueryStatus.ERROR and bool(_MISSING.search(compiled.message))


def _agrees(rows: Sequence[tuple], copy: _Copy, sql: str, gold_sql: str) -> bool:
    """Whether an answer's rows on a copy are the gold's.

    How often a row comes counts only if one of the two says SELECT DISTINCT: a join repeats what IN
    does not.
    """
    gold, mirrored = copy.gold_rows, copy.mirrored_rows
    if _is_nothing(rows) and _is_nothing(gold):
        return True  # max() of no rows is NULL, and ORDER BY with LIMIT 1 returns nothing
    if not (selects_distinct(sql) or selects_distinct(gold_sql)):
        rows, gold, mirrored = map(_once, (rows, gold, mirrored))
    if not rows_agree(rows, gold):
        return False
    return not is_ordered(gold_sql) or agrees_but_for_ties(rows, gold, mirrored)


def _is_nothing(rows: Sequence[tuple]) -> bool:
    return all(cell is None for row in rows for cell in row)


def _once(rows: Sequence[tuple]) -> tuple[tuple, ...]:
    """Each row once, at its first place."""
    return tuple(dict.fromkeys(rounded(rows)))


def trial_of(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    """Make the copies and run the gold on each, once for all answers to a turn.

    A copy on which the gold does not fix its own rows (a tie at LIMIT, a bare column beside an
    aggregate) is not used. A database that cannot be read gives no copies.
    """
    try:
        key = gold_sql, schema, content_hash(*file_version(db_path)), limits
        return _TRIALS.get(key, lambda _: _make_trial(gold_sql, schema, db_path, limits))
    except DatabaseFileError:
        return Trial((), is_unknown=True)


def _make_trial(gold_sql: str, schema: Schema, db_path: Path, limits: QueryConfig) -> Trial:
    original, limits = run_query(db_path, gold_sql, limits), _for_copies(limits)
    copies: list[_Copy] = []
    num_run, num_bytes, is_lasting = 0, 0, original.is_repeatable
    for seed in range(MAX_COPIES if original.is_ok else 0):
        if seed >= NUM_COPIES and any(copy.is_telling for copy in copies):
            break
        content = altered(db_path, gold_sql, schema, seed)
        copy = memory_copy(content)
        result, mirrored = (
            run_query(one, gold_sql, limits) for one in (copy, replace(copy, is_reversed=True))
        )
        is_lasting &= result.is_repeatable and mirrored.is_repeatable
        if result.is_ok and mirrored.status is QueryStatus.ERROR:
            mirrored = result  # something in its CREATE statements does not allow another order
        if not result.is_ok or not mirrored.is_ok:
            if QueryStatus.TIMEOUT in (result.status, mirrored.status):
                break  # it would take as long on the others
            continue
        num_run += 1
        rows = _tied(gold_sql, copy, result, mirrored, limits)
        if rows is not None:
            is_same = rows_agree(_once(result.rows), _once(original.rows))
            is_telling = not (result.is_empty or is_same)
            copies.append(_Copy(copy, *rows, is_telling))
            num_bytes += len(copy.packed) + result.num_bytes + mirrored.num_bytes
    return Trial(tuple(copies), num_run == 0, num_bytes, is_lasting)


def _tied(
    gold_sql: str, copy: MemoryCopy, result: QueryResult, mirrored: QueryResult, limits: QueryConfig
) -> tuple[Sequence[tuple], Sequence[tuple]] | None:
    """The gold's rows on a copy with ties broken in two opposite ways. None if it does not fix
    which rows it returns."""
    if stable_order(result.rows, mirrored.rows, gold_sql) is None:
        return None
    orders = ordered_both_ways(gold_sql, len(result.columns), copy, limits)
    if orders is None:
        return result.rows, mirrored.rows
    return orders if rows_agree(*orders) else None  # else rows tie at LIMIT


_TRIALS: SharedCache[Trial] = SharedCache(
    MAX_CACHED_BYTES,
    num_bytes=lambda trial: trial.num_bytes + 1000,
    is_lasting=lambda trial: trial.is_lasting,
)
