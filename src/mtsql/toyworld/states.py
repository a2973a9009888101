"""What a conversation of the embedded world asks for, and how that is written as SQL.

A conversation is a state (table, columns, filters, ...) that each turn changes. `to_sql` writes a
state as SQL in one canonical form.
"""

import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace

ABOVE_AVERAGE = "above average"
"""The operator of a filter that compares a column with its average, in a nested query."""
OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
"""Operator -> the operator that selects the other rows."""


@dataclass(frozen=True)
class RunQuery:
    """Runs queries on one database."""

    connection: sqlite3.Connection

    def __call__(self, sql: str) -> list[tuple] | None:
        """Its rows; None if it fails."""
        try:
            return self.connection.execute(sql).fetchall()
        except sqlite3.Error:
            return None

    def missing_column(self, sql: str) -> str:
        """The column, without a table, that the error of a query names because there is none of
        that name; empty if the query does not fail so."""
        try:
            self.connection.execute(sql)
        except sqlite3.Error as error:
            found = re.fullmatch(r"no such column: (?:\w+\.)?(\w+)", str(error))
            return found[1] if found else ""
        return ""


@dataclass(frozen=True)
class Domain:
    """One database of two tables: each `child` row belongs to a `parent` row.

    spelling[table, column]: a value as people say it -> the value as the database spells it.
    values[table, column]: the values of the column, as people say them; those of `name` too.
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

    said: how the question says a text value, which is not how the database spells it; empty if the
    question quotes it, and for numbers and values of results. guess:
    what somebody writes who has not seen the earlier result that shows the value; None if the
    question says the value. of_row: compare with that column of the row whose name is `value`, in
    a nested query. negated: in a query about parents, those without such a child.
    """

    table: str
    column: str
    op: str
    value: object
    said: str = ""
    guess: object = None
    of_row: bool = False
    negated: bool = False


@dataclass(frozen=True)
class State:
    """What the conversation asks for now.

    limit: only the first row of the order. group: the column to group by, of `group_table` (empty:
    of `table`). most: only the largest group. excluded: rows removed by EXCEPT. also: a second
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
    group_table: str = ""
    having: int = 0
    most: bool = False
    with_parent: bool = False
    excluded: Filter | None = None
    also: Filter | None = None
    childless: bool = False

    @property
    def is_of_named_row(self) -> bool:
        """Whether it asks about the row with a given name."""
        return any((f.table, f.column) == (self.table, "name") for f in self.filters)

    @property
    def is_list(self) -> bool:
        """Whether the result is a list of rows of the table, in the order of the table or not."""
        is_one = self.aggregate or self.group or self.limit or self.is_of_named_row
        return not (is_one or self.excluded or self.also or self.childless)

    @property
    def is_summary(self) -> bool:
        """Whether the result is a number, or a number for each group."""
        return bool(self.aggregate or self.group) and not (self.having or self.most)

    def all_filters(self) -> tuple[Filter, ...]:
        """The filters with those of EXCEPT and INTERSECT."""
        further = (self.excluded, self.also)
        return (*self.filters, *(f for f in further if f is not None))

    def has_filter_on(self, table: str, column: str) -> bool:
        """Whether a filter is on this column."""
        return any((f.table, f.column) == (table, column) for f in self.filters)

    def with_filter(self, new: Filter) -> "State":
        """The state with this filter, in the place of one on the same column if there is one."""
        filters = [
            new if (f.table, f.column) == (new.table, new.column) else f for f in self.filters
        ]
        if new not in filters:
            filters.append(new)
        return replace(self, filters=tuple(filters))


def is_joined(state: State, domain: Domain) -> bool:
    """Whether the query joins both tables."""
    if state.with_parent or state.group_table:
        return True
    return state.table == domain.child and any(f.table == domain.parent for f in state.filters)


def to_sql(
    state: State, domain: Domain, literal: Callable[[Filter], object] = lambda f: f.value
) -> str:
    """The state in the canonical form. `literal` may spell a filter's value differently."""
    joined = is_joined(state, domain)

    def full_name(table: str, column: str) -> str:
        if not joined:
            return column
        return f"{'T1' if table == domain.child else 'T2'}.{column}"

    def condition(f: Filter) -> str:
        value = literal(f)
        text = repr(value) if isinstance(value, str) else value
        if f.of_row:
            text = f"(SELECT {f.column} FROM {f.table} WHERE name = {text})"
        if f.table == domain.child and state.table == domain.parent:
            return (
                f"id {'NOT IN' if f.negated else 'IN'} (SELECT {domain.parent}_id "
                f"FROM {domain.child} WHERE {f.column} {f.op} {text})"
            )
        column = full_name(f.table, f.column)
        if f.op == ABOVE_AVERAGE:
            return f"{column} > (SELECT avg({f.column}) FROM {f.table})"
        return f"{column} {f.op} {text}"

    grouped = full_name(state.group_table or state.table, state.group)
    source = state.table
    if joined:
        key = f"T1.{domain.parent}_id = T2.id"
        source = f"{domain.child} AS T1 JOIN {domain.parent} AS T2 ON {key}"
    sql = f"SELECT {' , '.join(_selected(state, full_name, grouped))} FROM {source}"

    if state.childless:
        return f"{sql} WHERE id NOT IN (SELECT {domain.parent}_id FROM {domain.child})"
    if state.filters:
        sql += " WHERE " + " AND ".join(condition(f) for f in state.filters)
    if state.group:
        sql += f" GROUP BY {grouped}"
    if state.having:
        sql += f" HAVING count(*) > {state.having}"
    if state.most:
        sql += " ORDER BY count(*) DESC LIMIT 1"
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


def _selected(state: State, full_name: Callable[[str, str], str], grouped: str) -> list[str]:
    """What stands after SELECT."""
    if state.group:
        return [grouped] if state.having or state.most else [grouped, "count(*)"]
    if state.aggregate == "count":
        return ["count(*)"]
    columns = [full_name(state.table, column) for column in state.columns]
    if state.aggregate == "avg":
        return [f"avg({columns[0]})"]
    return [*columns, "T2.name"] if state.with_parent else columns


def say(f: Filter) -> str:
    """A filter in words."""
    if f.op == ABOVE_AVERAGE:
        return f"{f.column} above the average"
    if f.of_row:
        how = {"=": "the same", ">": "higher", "<": "lower"}[f.op]
        return f"{how} {f.column}"
    words = {
        "=": "is",
        "!=": "is not",
        "<": "below",
        ">": "above",
        "<=": "not above",
        ">=": "not below",
    }
    quoted = repr(f.value) if isinstance(f.value, str) else f.value
    return f"{f.column} {words[f.op]} {f.said or quoted}"
