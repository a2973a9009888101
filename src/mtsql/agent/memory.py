"""The dialogue memory: every earlier turn with its question, its SQL, what each clause of the query
reads, and its result."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mtsql.judge.sql_parser import parse_sql
from mtsql.judge.sql_query import SET_OPERATORS, ColumnUse, Condition, Expression, Query
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Database, Schema

CLAUSES = (
    "select",
    "from",
    "where",
    "group by",
    "having",
    "order by",
    "limit",
    "intersect",
    "union",
    "except",
)


@dataclass(frozen=True)
class MemoryEntry:
    """One earlier turn. `result` is None if the query did not run or failed. `clauses` are those of
    `parsed_clauses`."""

    question: str
    sql: str
    clauses: tuple[str, ...]
    result: tuple[tuple, ...] | None


def recall(
    turn: Turn,
    database: Database,
    config: QueryConfig,
    with_results: bool,
    meter: WorkMeter | None = None,
) -> list[MemoryEntry]:
    """The turn's history, oldest first. Its SQL is the gold SQL in training and the agent's own
    under predicted history.

    The earlier queries run only if `with_results`. The current turn's gold SQL is never read.
    """
    entries = []
    for question, sql in turn.history:
        result = run_query(database.path, sql, config, meter) if with_results else None
        rows = result.rows if result is not None and result.is_ok else None
        entries.append(MemoryEntry(question, sql, parsed_clauses(sql, database.schema), rows))
    return entries


def parsed_clauses(sql: str, schema: Schema) -> tuple[str, ...]:
    """The clauses of a query with the tables or columns that each reads, in the order of
    `CLAUSES`: `("select singer.name", "from singer", "where singer.age")`. The names are those of
    the schema, whatever aliases the query has, and values and aggregates are left out, as in the
    memory of the released code.

    If the parser of the official evaluator cannot read the query, only the names of its clauses.
    """
    query = parse_sql(sql, schema)
    return clauses_of(sql) if query is None else tuple(_parsed(query))


def _parsed(query: Query) -> Iterator[str]:
    """The clauses of a parsed query as texts."""
    yield _clause("select", (use for item in query.select for use in _uses(item.expression)))
    tables = [_sub_query(one) if isinstance(one, Query) else one for one in query.tables]
    yield f"from {', '.join(dict.fromkeys(tables))}"
    if query.where:
        yield _clause("where", _compared(query.where))
    if query.group_by:
        yield _clause("group by", query.group_by)
    if query.having:
        yield _clause("having", _compared(query.having))
    if query.order_by:
        expressions = query.order_by.expressions
        columns = _clause("order by", (use for one in expressions for use in _uses(one)))
        yield f"{columns} {query.order_by.direction}"
    if query.has_limit:
        yield "limit"
    for operator, arm in zip(SET_OPERATORS, query.arms, strict=True):
        if arm is not None:
            yield f"{operator} {_sub_query(arm)}"


def _clause(name: str, uses: Iterable[ColumnUse]) -> str:
    """A clause with each of its columns once, in the order of the text."""
    columns = (f"{use.column.table}.{use.column.name}".lstrip(".") for use in uses)
    return f"{name} {', '.join(dict.fromkeys(columns))}"


def _compared(conditions: Iterable[Condition | str]) -> Iterator[ColumnUse]:
    """The columns of the conditions on the left of their operators."""
    for condition in conditions:
        if isinstance(condition, Condition):
            yield from _uses(condition.expression)


def _uses(expression: Expression) -> Iterator[ColumnUse]:
    yield expression.left
    if expression.right is not None:
        yield expression.right


def _sub_query(query: Query) -> str:
    return f"({'; '.join(_parsed(query))})"


def clauses_of(sql: str) -> tuple[str, ...]:
    """The clauses whose words stand in a query, in the order of `CLAUSES`."""
    text = f" {' '.join(sql.lower().split())} "
    return tuple(clause for clause in CLAUSES if f" {clause} " in text)
