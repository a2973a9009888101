"""The official level of difficulty of a query."""

from mtsql.judge.sql_parser import parse_sql
from mtsql.judge.sql_query import Condition, Query
from mtsql.sql.schema import Schema

HARDNESS = ("easy", "medium", "hard", "extra")
"""The levels, the easiest first."""


def hardness(gold_sql: str, schema: Schema) -> str | None:
    """The level of a query, from its outermost SELECT alone. None if the text does not parse."""
    query = parse_sql(gold_sql, schema)
    if query is None:
        return None
    num_clauses = _num_clauses(query)
    num_nested = _num_nested(query)
    num_others = _num_others(query)
    if num_nested == 0:
        if num_clauses <= 1 and num_others == 0:
            return "easy"
        if (num_clauses <= 1 and num_others <= 2) or (num_clauses <= 2 and num_others < 2):
            return "medium"
        if (num_clauses <= 2 and num_others > 2) or (num_clauses == 3 and num_others <= 2):
            return "hard"
        return "extra"
    return "hard" if num_nested == 1 and num_clauses <= 1 and num_others == 0 else "extra"


def _conditions(query: Query) -> list[Condition]:
    """The conditions of ON, WHERE and HAVING."""
    items = (*query.on[::2], *query.where[::2], *query.having[::2])
    return [item for item in items if isinstance(item, Condition)]


def _num_clauses(query: Query) -> int:
    """Official component 1: clauses, joins, ORs and LIKEs."""
    clauses = (query.where, query.group_by, query.order_by, query.has_limit)
    count = sum(bool(clause) for clause in clauses)
    count += max(0, len(query.tables) - 1)
    for connected in (query.on, query.where, query.having):
        count += connected[1::2].count("or")
    count += sum(condition.operator == "like" for condition in _conditions(query))
    return count


def _num_nested(query: Query) -> int:
    """Official component 2: sub-queries in conditions, and arms of set operators."""
    count = sum(arm is not None for arm in query.arms)
    for condition in _conditions(query):
        count += isinstance(condition.value, Query)
        count += isinstance(condition.high_value, Query)
    return count


def _num_others(query: Query) -> int:
    """Official component 3: how many of these four occur more than once: aggregates, results, items
    of WHERE, grouping columns.

    Connectors are items of WHERE too, so two conditions are three items.
    """
    counts = (_num_aggregates(query), len(query.select), len(query.where), len(query.group_by))
    return sum(count > 1 for count in counts)


def _num_aggregates(query: Query) -> int:
    """Aggregates as the official program counts them.

    Quirk: it counts negated conditions and HAVING's connectors, but no aggregate in a condition.
    """
    count = sum(item.aggregate != "none" for item in query.select)
    for item in query.where[::2] + query.having:
        count += isinstance(item, str) or item.is_negated
    uses = list(query.group_by)
    if query.order_by:
        for expression in query.order_by.expressions:
            uses.append(expression.left)
            if expression.right:
                uses.append(expression.right)
    return count + sum(use.aggregate != "none" for use in uses)
