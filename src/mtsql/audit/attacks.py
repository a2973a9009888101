"""Answers that need no understanding of the question. If the reward pays one, a policy can learn to
give it always."""

from collections.abc import Iterator

import sqlparse

from mtsql.sql.dialogues import Turn
from mtsql.sql.reader import read_sql
from mtsql.sql.sandbox import QueryResult
from mtsql.sql.schema import Schema, quoted
from mtsql.sql.statement import Unreadable

MAX_CONSTANT_CELLS = 8
"""Limit of the cells of a row that an attack writes down as a constant."""
MAX_LISTED = 40
"""Limit of the values in a list. A policy cannot read more of them in an observation."""


def attacks_on(turn: Turn, gold: QueryResult, schema: Schema) -> Iterator[tuple[str, str]]:
    """The attacks that can be tried on a turn: (name of the attack, SQL). gold: its result."""
    yield "SELECT 1", "SELECT 1"
    table = quoted(schema.tables[0].name)
    if len(gold.rows) == 1 and len(gold.rows[0]) <= MAX_CONSTANT_CELLS:
        constant = "SELECT " + ", ".join(map(literal, gold.rows[0]))
        yield "constant", constant
        yield "constant FROM", f"{constant} FROM {table} LIMIT 1"
    if gold.is_ok and not gold.rows:
        yield "no rows", f"SELECT * FROM {table} WHERE 1 = 2"
    for _, sql in turn.history:
        yield "copied", sql
    without_filter = _without_filter(turn.sql)
    if without_filter is not None:
        yield "no filter", without_filter
    if gold.rows and len(gold.rows[0]) == 1:
        yield from _seen_values(turn.sql, [cell for (cell,) in gold.rows], schema)


def _without_filter(sql: str) -> str | None:
    """The query without its outermost WHERE; None if it has none."""
    texts = []
    has_filter = False
    for token in sqlparse.parse(sql)[0].tokens:
        is_where = isinstance(token, sqlparse.sql.Where)
        has_filter |= is_where
        texts.append(" " if is_where else str(token))
    return "".join(texts) if has_filter else None


def _seen_values(gold_sql: str, cells: list, schema: Schema) -> Iterator[tuple[str, str]]:
    """Filters of the gold's only result column by the values that the gold returns."""
    values = [cell for cell in dict.fromkeys(cells) if cell is not None]
    column = _only_column(gold_sql, schema)
    if column is None or not 0 < len(values) <= MAX_LISTED:
        return
    name, select = column
    listed = ", ".join(map(literal, values))
    yield "values listed", f"{select} WHERE {name} IN ({listed})"
    if len({type(value) for value in values}) == 1:
        low = literal(min(values))
        high = literal(max(values))
        yield "values between", f"{select} WHERE {name} BETWEEN {low} AND {high}"


def _only_column(sql: str, schema: Schema) -> tuple[str, str] | None:
    """(the column that the query returns, `SELECT column FROM its table`).

    None if the result is not a plain column, or if WHERE names that column, because then its
    values may stand in the question.
    """
    try:
        statement = read_sql(sql, schema)
    except Unreadable:
        return None
    select = min(statement.selects, key=lambda select: select.start)
    first, end = select.items[0]
    source = statement.targets.get(first)
    if source is None or source.table is None or statement.column_end(first) != end:
        return None
    column = statement.tokens[end - 1]
    where = select.clauses.get("where", (0, 0))
    if any(statement.tokens[at].name == column.name for at in range(*where)):
        return None
    return column.text, f"SELECT {column.text} FROM {quoted(source.table)}"


def literal(cell: object) -> str:
    """Write a cell as SQL."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bytes):
        return f"x'{cell.hex()}'"
    if isinstance(cell, str):
        return "'" + cell.replace("'", "''") + "'"
    return repr(cell)
