"""Whether two texts are the same query. This finds answers that repeat an earlier turn's SQL."""

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from mtsql.judge.agreement import without_quotes
from mtsql.judge.exact_match import exact_match
from mtsql.judge.sql_parser import parse_sql
from mtsql.sql.runnable import folded
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema

_LITERAL = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|(?<![\w.])\d+(?:\.\d+)?(?![\w.])""")
_OPENING = re.compile(r"\s*select\s+(?:distinct\s+)?(?:\w+\.)?\*\s*from\s*\(", re.IGNORECASE)


def is_same_query(sql: str, other_sql: str, schema: Schema) -> bool:
    """Whether the texts differ in blanks and case only, or parse to the same query, values and
    DISTINCT included."""
    if folded(sql) == folded(other_sql):
        return True
    parsed = parse_sql(sql, schema)
    return parsed is not None and parsed == parse_sql(other_sql, schema)


def has_same_program(sql: str, other_sql: str, db_path: Path, config: QueryConfig) -> bool:
    """Whether SQLite compiles both texts to the same steps.

    Aliases, redundant brackets and quotes do not change the steps. Two texts with the same steps
    return the same rows, whatever the tables hold.
    """
    one = run_query(db_path, f"EXPLAIN {sql}", config)
    other = run_query(db_path, f"EXPLAIN {other_sql}", config)
    return one.is_ok and other.is_ok and one.rows == other.rows


def means_same(sql: str, other_sql: str, schema: Schema) -> bool:
    """Whether the texts are equal for exact match and in what exact match ignores.

    It ignores literals, DISTINCT, directions of ORDER BY, and which of two columns that refer to
    each other is named.
    """
    if folded(sql) == folded(other_sql):
        return True
    is_match = exact_match(
        sql, other_sql, schema, compare_values=True, compare_distinct=True, is_official=False
    )
    return (
        is_match
        and _literals(sql) == _literals(other_sql)
        and _distincts_and_descs(sql) == _distincts_and_descs(other_sql)
        and _columns(sql, schema) == _columns(other_sql, schema)
    )


def _literals(sql: str) -> list[str]:
    """The numbers and quoted texts, sorted; LIMIT's number is one of them."""
    return sorted(literal.strip("'\"").lower() for literal in _LITERAL.findall(sql))


def _distincts_and_descs(sql: str) -> list[str]:
    """Each DISTINCT and DESC of the text, sorted."""
    return sorted(re.findall(r"\b(?:distinct|desc)\b", without_quotes(sql).lower()))


def _columns(sql: str, schema: Schema) -> list[str]:
    """All columns that the parsed query names, sorted; those behind ON too."""
    return sorted(re.findall(r"ColumnName\(.*?\)", repr(parse_sql(sql, schema))))


class Copied(Enum):
    """What an answer repeats of an earlier turn's query that is not the gold query of this turn."""

    NO = "no"
    STRUCTURE = "structure"
    """Everything except the literals, as exact match compares. A correct answer may look like this
    too: then its literals are those that this turn asks for."""
    QUERY = "query"
    """Everything, except DISTINCT, the order of columns, and a SELECT around the query."""


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
        repeats_gold = means_same(earlier, gold_sql, schema) or has_same_program(
            earlier, gold_sql, db_path, config
        )
        if repeats_gold:
            continue  # this turn asks for the earlier query again
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


def _unwrapped(sql: str) -> str:
    """The query inside any number of `SELECT * FROM (...)`, with or without an alias."""
    while opening := _OPENING.match(sql):
        end = sql.rfind(")")
        words_after = sql[end + 1 :].strip("; \n\t").lower().split()
        is_alias = words_after[:-1] in ([], ["as"])
        if end < opening.end() or not is_alias:
            break
        sql = sql[opening.end() : end]
    return sql
