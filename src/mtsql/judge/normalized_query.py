"""Remove from parsed queries what exact match ignores: literals, DISTINCT, which of two columns of
a foreign key is named.

SELECT DISTINCT T2.singer_id ... WHERE age > 30   is compared as
SELECT singer.singer_id ... WHERE age > None      if song.singer_id refers to singer.singer_id
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from mtsql.judge.sql_parser import MAX_CACHED, MAX_CACHED_SCHEMAS, Names, parse_sql
from mtsql.judge.sql_query import (
    ColumnName,
    ColumnUse,
    Condition,
    Conditions,
    Expression,
    OrderBy,
    Query,
    SelectItem,
    Value,
)


@lru_cache(maxsize=2 * MAX_CACHED)
def normalized(text: str, names: Names, keeps_values: bool, keeps_distinct: bool) -> Query | None:
    """Parse a text and remove what is not compared.

    None if the text does not parse, or if the official program crashes on it.
    """
    query = parse_sql(text, names.schema)
    if query is None:
        return None
    # Quirk: the tables of the outermost FROM decide for the arms of set operators too.
    renames = {
        column: representative
        for column, representative in _representatives(names).items()
        if column.table in query.tables
    }
    try:
        return _Normalizer(renames, keeps_values, keeps_distinct).outer(query)
    except _OfficialCrash:
        return None


class _OfficialCrash(Exception):
    """The text lacks a connector, so that a connector now stands in the place of a condition."""


@dataclass(frozen=True)
class _Normalizer:
    """Drops literals and DISTINCT, and replaces columns as `renames` says."""

    renames: dict[ColumnName, ColumnName]
    keeps_values: bool
    keeps_distinct: bool

    def outer(self, query: Query) -> Query:
        """The outermost query and the arms of its set operators."""
        self.check_where(query.where)
        order_by = query.order_by
        if order_by:
            expressions = tuple(self.expression(item) for item in order_by.expressions)
            order_by = OrderBy(order_by.direction, expressions)
        return Query(
            is_distinct=query.is_distinct and self.keeps_distinct,
            select=tuple(self.select_item(item) for item in query.select),
            tables=query.tables,
            on=self.conditions(query.on),
            where=self.conditions(query.where),
            group_by=tuple(self.use(use) for use in query.group_by),
            having=self.conditions(query.having),
            order_by=order_by,
            has_limit=query.has_limit,
            intersect=query.intersect and self.outer(query.intersect),
            union=query.union and self.outer(query.union),
            except_=query.except_ and self.outer(query.except_),
        )

    def nested(self, query: Query) -> Query:
        """A query in a condition loses its literals only. Quirk: one in FROM loses nothing."""
        return replace(
            query,
            on=self.conditions(query.on, is_nested=True),
            where=self.conditions(query.where, is_nested=True),
            having=self.conditions(query.having, is_nested=True),
            intersect=query.intersect and self.nested(query.intersect),
            union=query.union and self.nested(query.union),
            except_=query.except_ and self.nested(query.except_),
        )

    def check_where(self, where: Conditions) -> None:
        """Raise if a sub-query stands in the place of a connector: the official program hashes
        what stands there, and it cannot hash a query."""
        for item in where[1::2]:
            if isinstance(item, Condition) and isinstance(item.value, Query):
                raise _OfficialCrash

    def conditions(self, conditions: Conditions, is_nested: bool = False) -> Conditions:
        """The conditions without literals; connectors stay. See Query for the places."""
        found = list(conditions)
        for place in range(0, len(found), 2):
            found[place] = self.condition(conditions[place], is_nested)
        return tuple(found)

    def condition(self, condition: Condition | str, is_nested: bool) -> Condition:
        """One condition without literals."""
        if isinstance(condition, str):
            raise _OfficialCrash
        expression = condition.expression
        if not is_nested:
            expression = self.expression(expression)
        return Condition(
            condition.is_negated,
            condition.operator,
            expression,
            self.value(condition.value),
            self.value(condition.high_value),
        )

    def value(self, value: Value) -> Value:
        """Nothing for a literal or a column; a sub-query without its literals."""
        if self.keeps_values:
            return value
        return self.nested(value) if isinstance(value, Query) else None

    def select_item(self, item: SelectItem) -> SelectItem:
        """The item with its columns replaced."""
        return SelectItem(item.aggregate, self.expression(item.expression))

    def expression(self, expression: Expression) -> Expression:
        """The expression with its columns replaced. It is the same object if nothing changes."""
        left = self.use(expression.left)
        right = expression.right and self.use(expression.right)
        if left is expression.left and right is expression.right:
            return expression
        return Expression(expression.sign, left, right)

    def use(self, use: ColumnUse) -> ColumnUse:
        """The use with its column replaced. It is the same object if nothing changes."""
        column = self.renames.get(use.column, use.column)
        is_distinct = use.is_distinct and self.keeps_distinct
        if column is use.column and is_distinct == use.is_distinct:
            return use
        return ColumnUse(use.aggregate, column, is_distinct)


@lru_cache(maxsize=MAX_CACHED_SCHEMAS)
def _representatives(names: Names) -> dict[ColumnName, ColumnName]:
    """Column -> the first column of the group that foreign keys connect it with.

    Quirk: a pair joins the first group that has one of its columns. Two groups that a later pair
    connects are not merged.
    """
    columns = [
        names.columns[table.name.lower()][column.name.lower()]
        for table in names.schema.tables
        for column in table.columns
    ]
    index_of: dict[ColumnName, int] = {}
    for index, column in enumerate(columns):
        index_of.setdefault(column, index)
    groups: list[set[int]] = []
    for pair in names.schema.foreign_keys:
        ends = {index_of[names.columns[table.lower()][column.lower()]] for table, column in pair}
        group = next((group for group in groups if group & ends), None)
        if group is None:
            groups.append(ends)
        else:
            group |= ends
    found: dict[ColumnName, ColumnName] = {}
    for group in groups:
        first = columns[min(group)]
        found |= {columns[index]: first for index in group}
    return found
