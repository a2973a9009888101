"""Answers that need no idea of the question. Whatever they earn can be farmed."""

from collections.abc import Iterator

import sqlparse

from mtsql.audit.reader import read_sql
from mtsql.audit.statement import Unreadable
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult
from mtsql.sql.schema import Schema, quoted

MAX_CONSTANT_CELLS = 8
MAX_LISTED = 40
"""Values of a list; a policy can read no more in an observation."""


def attacks_on(turn: Turn, gold: QueryResult, schema: Schema) -> Iterator[tuple[str, str]]:
    """-> (name of the attack, SQL)."""
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
    tokens = sqlparse.parse(turn.sql)[0].tokens
    is_where = [isinstance(token, sqlparse.sql.Where) for token in tokens]
    if any(is_where):
        texts = [" " if w else str(token) for w, token in zip(is_where, tokens, strict=True)]
        yield "no filter", "".join(texts)
    if gold.rows and len(gold.rows[0]) == 1:
        yield from _seen_values(turn.sql, [cell for (cell,) in gold.rows], schema)


def _seen_values(gold_sql: str, cells: list, schema: Schema) -> Iterator[tuple[str, str]]:
    """The values of the gold's one column, as a filter of that column."""
    values = [cell for cell in dict.fromkeys(cells) if cell is not None]
    column = _only_column(gold_sql, schema)
    if column is None or not 0 < len(values) <= MAX_LISTED:
        return
    listed = ", ".join(map(literal, values))
    name, select = column
    yield "values listed", f"{select} WHERE {name} IN ({listed})"
    if len({type(value) for value in values}) == 1:
        low, high = literal(min(values)), literal(max(values))
        yield "values between", f"{select} WHERE {name} BETWEEN {low} AND {high}"


def _only_column(sql: str, schema: Schema) -> tuple[str, str] | None:
    """(the one column that a query returns, `SELECT it FROM its table`), if it returns a column.

    None if WHERE names that column: then its values may be what the question gives.
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
    places = range(*select.clauses.get("where", (0, 0)))
    if any(statement.tokens[at].name == statement.tokens[end - 1].name for at in places):
        return None
    name = statement.tokens[end - 1].text
    return name, f"SELECT {name} FROM {quoted(source.table)}"


def literal(cell: object) -> str:
    """A cell as SQL."""
    if cell is None:
        return "NULL"
    if isinstance(cell, bytes):
        return f"x'{cell.hex()}'"
    return "'" + cell.replace("'", "''") + "'" if isinstance(cell, str) else repr(cell)
