"""What a conversation of the embedded world asks for, and how that is written as SQL.

A conversation is a state (table, columns, filters, ...) that each turn changes. `to_sql` writes a
state as SQL in one canonical form.
"""

from collections.abc import Callable
from dataclasses import dataclass

ABOVE_AVERAGE = "above average"
"""The operator of a filter that compares a column with its average, in a nested query."""

RunQuery = Callable[[str], list[tuple] | None]
"""A function from a query to its rows, or to None if the query fails."""


@dataclass(frozen=True)
class Domain:
    """One database of two tables: each `child` row belongs to a `parent` row.

    spelling[table, column]: a value as people say it -> the value as the database spells it.
    values[table, column]: the values of the column, as people say them.
    """

    db_id: str
    child: str
    parent: str
    child_categories: tuple[str, ...]
    child_numbers: tuple[str, ...]
    parent_category: str
    parent_number: str
    spelling: dict[tuple[str, str], dict[str, str]]
    values: dict[tuple[str, str], tuple]

    def categories(self, table: str) -> tuple[str, ...]:
        """The text columns of a table that filters may use."""
        return self.child_categories if table == self.child else (self.parent_category,)

    def numbers(self, table: str) -> tuple[str, ...]:
        """The number columns of a table."""
        return self.child_numbers if table == self.child else (self.parent_number,)

    def other_table(self, table: str) -> str:
        """The parent for the child, and the child for the parent."""
        return self.parent if table == self.child else self.child


@dataclass(frozen=True)
class Filter:
    """The condition `column op value`, or a comparison with the average (`ABOVE_AVERAGE`).

    said: how the question spells a text value; empty for numbers.
    """

    table: str
    column: str
    op: str
    value: object
    said: str = ""


@dataclass(frozen=True)
class State:
    """What the conversation asks for now.

    limit: only the first row of the order. excluded: rows removed by EXCEPT. also: a second
    condition, connected by INTERSECT. childless: parents without a child.
    """

    table: str
    columns: tuple[str, ...] = ("name",)
    aggregate: str = ""
    filters: tuple[Filter, ...] = ()
    order: str = ""
    direction: str = "DESC"
    limit: bool = False
    group: str = ""
    having: int = 0
    with_parent: bool = False
    excluded: Filter | None = None
    also: Filter | None = None
    childless: bool = False

    @property
    def is_joined(self) -> bool:
        """Whether the query needs both tables."""
        return self.with_parent or any(f.table != self.table for f in self.filters)


def to_sql(
    state: State, domain: Domain, literal: Callable[[Filter], object] = lambda f: f.value
) -> str:
    """The state in the canonical form. `literal` may spell a filter's value differently."""

    def full_name(table: str, column: str) -> str:
        if not state.is_joined:
            return column
        alias = "T1" if table == state.table else "T2"
        return f"{alias}.{column}"

    def condition(f: Filter) -> str:
        column = full_name(f.table, f.column)
        if f.op == ABOVE_AVERAGE:
            return f"{column} > (SELECT avg({f.column}) FROM {f.table})"
        value = literal(f)
        text = repr(value) if isinstance(value, str) else value
        return f"{column} {f.op} {text}"

    columns = [full_name(state.table, column) for column in state.columns]
    if state.aggregate == "count":
        columns = ["count(*)"]
    elif state.aggregate == "avg":
        columns = [f"avg({columns[0]})"]
    if state.group:
        columns = [full_name(state.table, state.group)]
        if not state.having:
            columns.append("count(*)")
    if state.with_parent and not state.aggregate and not state.group:
        columns.append("T2.name")

    source = state.table
    if state.is_joined:
        key = f"T1.{domain.parent}_id = T2.id"
        source = f"{domain.child} AS T1 JOIN {domain.parent} AS T2 ON {key}"
    sql = f"SELECT {' , '.join(columns)} FROM {source}"

    if state.childless:
        return f"{sql} WHERE id NOT IN (SELECT {domain.parent}_id FROM {domain.child})"
    if state.filters:
        sql += " WHERE " + " AND ".join(condition(f) for f in state.filters)
    if state.group:
        sql += f" GROUP BY {full_name(state.table, state.group)}"
    if state.having:
        sql += f" HAVING count(*) > {state.having}"
    if state.order:
        sql += f" ORDER BY {full_name(state.table, state.order)} {state.direction}"
        if state.limit:
            sql += " LIMIT 1"

    second_query = f"SELECT {' , '.join(state.columns)} FROM {state.table}"
    if state.excluded:
        sql += f" EXCEPT {second_query} WHERE {condition(state.excluded)}"
    if state.also:
        sql += f" INTERSECT {second_query} WHERE {condition(state.also)}"
    return sql


def say(f: Filter) -> str:
    """A filter in words."""
    if f.op == ABOVE_AVERAGE:
        return f"{f.column} above the average"
    words = {"=": "is", "!=": "is not", "<": "below", ">": "above"}[f.op]
    return f"{f.column} {words} {f.said or f.value}"
