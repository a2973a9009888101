"""Classes of wrong answers: which part of the query went wrong first.

The classes are those of the paper's error analysis (section 5.5), which does not define them; the
definitions are ours. A wrong answer belongs to one class: the first that applies, in the order in
which a query is built (columns, tables, aggregates, conditions). So the shares add up to 100 %. The
comparison is that of exact match, except that literals count, and so does what follows ON.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from mtsql.judge.normalized_query import normalized
from mtsql.judge.sql_parser import names_of, parse_sql
from mtsql.judge.sql_query import (
    ColumnName,
    ColumnUse,
    Condition,
    Conditions,
    Expression,
    Query,
    Value,
)
from mtsql.sql.schema import Schema

ErrorClass = Literal[
    "no_answer",
    "execution",
    "schema_linking",
    "join_path",
    "aggregation_drift",
    "constraint",
    "other",
]
ERROR_CLASSES: tuple[ErrorClass, ...] = get_args(ErrorClass)
ERROR_DEFINITIONS: dict[str, str] = {
    "no_answer": "the episode ended without an answer",
    "execution": "the answer does not run",
    "schema_linking": "it shows, orders by or filters on another column, or reads another table",
    "join_path": "its columns are right, but it joins other tables, or by other columns",
    "aggregation_drift": "its aggregates, GROUP BY or HAVING differ",
    "constraint": "its conditions, their literals, ORDER BY or LIMIT differ",
    "other": "set operators or nesting differ, or only what the judge's parser does not read, or "
    "one of the two queries does not parse",
}
"""What each class means. A class applies if none before it does."""

_ORDER_WORDS = re.compile(r"\bdesc\b|\blimit\s+\d+(?:\s*(?:,|offset)\s*\d+)?", re.IGNORECASE)
"""What the parsed query does not hold: the direction of each expression, the number of LIMIT."""


def error_class(
    pred_sql: str | None, gold_sql: str, schema: Schema, *, has_run: bool
) -> ErrorClass:
    """The class of an answer that EX counts as wrong. None means that there is no answer.

    has_run: whether the answer runs on the database. It is not run here.
    """
    if pred_sql is None:
        return "no_answer"
    if not has_run:
        return "execution"
    names = names_of(schema)
    pred = normalized(pred_sql, names, True, True)
    gold = normalized(gold_sql, names, True, True)
    if pred is None or gold is None:
        return "other"
    preds = list(_queries(pred))
    golds = list(_queries(gold))
    if _has_other_columns(preds, golds):
        return "schema_linking"
    pred_tables = _tables(preds)
    gold_tables = _tables(golds)
    if pred_tables != gold_tables:
        is_one = len(pred_tables) == len(gold_tables) == 1
        return "schema_linking" if is_one else "join_path"
    if _joins(pred_sql, schema) != _joins(gold_sql, schema):
        return "join_path"
    if _aggregation(preds) != _aggregation(golds):
        return "aggregation_drift"
    if _constraints(preds, pred_sql) != _constraints(golds, gold_sql):
        return "constraint"
    return "other"


def _queries(query: Query) -> Iterator[Query]:
    """The query and all queries inside it."""
    yield query
    inner: list[Value] = [*query.tables, *query.arms]
    for condition in _conditions(query.on, query.where, query.having):
        inner += [condition.value, condition.high_value]
    for one in inner:
        if isinstance(one, Query):
            yield from _queries(one)


def _conditions(*clauses: Conditions) -> list[Condition]:
    return [item for clause in clauses for item in clause if isinstance(item, Condition)]


def _columns(expressions: Iterable[Expression]) -> list[ColumnName]:
    """The columns of expressions, without their aggregates."""
    found = []
    for expression in expressions:
        found.append(expression.left.column)
        if expression.right is not None:
            found.append(expression.right.column)
    return found


def _has_other_columns(preds: list[Query], golds: list[Query]) -> bool:
    """Whether the prediction names a column in place of another one.

    A condition or an ORDER BY that only one of the two queries has is no other column: it is a
    condition too many or too few.
    """
    if _shown(preds) != _shown(golds):
        return True
    for columns in (_filtered, _ordered):
        pred = Counter(columns(preds))
        gold = Counter(columns(golds))
        if pred - gold and gold - pred:
            return True
    return False


def _shown(queries: list[Query]) -> set[ColumnName]:
    """The columns of SELECT. A column that is only counted is left out, because `count(*)` and
    `count(column)` differ in the aggregate."""
    items = [item for query in queries for item in query.select]
    return set(_columns(item.expression for item in items if item.aggregate != "count"))


def _filtered(queries: list[Query]) -> list[ColumnName]:
    """The columns of the conditions in WHERE."""
    conditions = [one for query in queries for one in _conditions(query.where)]
    return _columns(condition.expression for condition in conditions)


def _ordered(queries: list[Query]) -> list[ColumnName]:
    """The columns of ORDER BY, without those in aggregates."""
    expressions = [e for query in queries if query.order_by for e in query.order_by.expressions]
    return _columns(e for e in expressions if e.left.aggregate == "none")


def _tables(queries: list[Query]) -> set[str]:
    """The tables of FROM."""
    return {table for query in queries for table in query.tables if isinstance(table, str)}


def _joins(sql: str, schema: Schema) -> set[frozenset[ColumnName]]:
    """The pairs of columns behind ON, before columns of a foreign key are made equal."""
    query = parse_sql(sql, schema)
    pairs = set()
    for inner in _queries(query) if query is not None else ():
        for condition in _conditions(inner.on):
            if isinstance(condition.value, ColumnUse):
                pairs.add(frozenset((condition.expression.left.column, condition.value.column)))
    return pairs


def _aggregation(queries: list[Query]) -> tuple:
    """Aggregates with their columns, in SELECT and ORDER BY; GROUP BY; HAVING."""
    aggregates: Counter = Counter()
    for query in queries:
        for item in query.select:
            uses = [item.expression.left, item.expression.right]
            aggregates.update(("select", item.aggregate, use) for use in uses if use)
        for expression in query.order_by.expressions if query.order_by else ():
            for use in (expression.left, expression.right):
                if use is not None and use.aggregate != "none":
                    aggregates["order", use.aggregate, use.column] += 1
    groups = Counter(use.column for query in queries for use in query.group_by)
    having = Counter(item for query in queries for item in query.having)
    return aggregates, groups, having


def _constraints(queries: list[Query], sql: str) -> tuple:
    """Conditions with their literals, what connects them, ORDER BY, LIMIT.

    The order of conditions counts only where AND and OR are mixed.
    """
    where = Counter(_without_queries(item) for query in queries for item in query.where)
    mixed = [
        tuple(map(_without_queries, query.where))
        for query in queries
        if {"and", "or"} <= set(query.where[1::2])
    ]
    orders = Counter(query.order_by for query in queries)
    words = sorted(" ".join(found.lower().split()) for found in _ORDER_WORDS.findall(sql))
    return where, mixed, orders, words


def _without_queries(item: Condition | str) -> object:
    """A condition whose sub-query counts only as one: what is in it is compared by itself."""
    if isinstance(item, str):
        return item
    values = (item.value, item.high_value)
    kept = tuple("query" if isinstance(value, Query) else value for value in values)
    return item.is_negated, item.operator, item.expression, kept
