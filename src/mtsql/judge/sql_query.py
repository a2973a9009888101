"""The parsed form of a query: frozen records that can be compared and hashed.

SELECT max(a) FROM t WHERE b > 3
Query(select=(SelectItem("max", a),), tables=("t",), where=(Condition(b, ">", 3.0),), ...)
"""

from dataclasses import dataclass

SET_OPERATORS = ("intersect", "union", "except")
"""The set operators, in the order of `Query.arms`."""


@dataclass(frozen=True, slots=True)
class ColumnName:
    """A column and the real name of its table, both in lower case; `*` is ALL_COLUMNS."""

    table: str
    name: str


ALL_COLUMNS = ColumnName("", "*")


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """A column, possibly in an aggregate, as in `max(distinct a)`; without one, it is "none"."""

    aggregate: str
    column: ColumnName
    is_distinct: bool


@dataclass(frozen=True, slots=True)
class Expression:
    """One column (`a`: sign "none", no right side) or two with a sign (`a - b`)."""

    sign: str
    left: ColumnUse
    right: ColumnUse | None


@dataclass(frozen=True, slots=True)
class SelectItem:
    """One result column. In SELECT the aggregate stands here; elsewhere it is in the ColumnUse."""

    aggregate: str
    expression: Expression


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison, such as `a not between 1 and 2`.

    A value is a Query, a ColumnUse, a number, a text in double quotes, or None. Only BETWEEN has
    a high_value.
    """

    is_negated: bool
    operator: str
    expression: Expression
    value: "Value"
    high_value: "Value"


@dataclass(frozen=True, slots=True)
class OrderBy:
    """The ORDER BY clause."""

    direction: str  # quirk: the last direction in the text holds for all expressions
    expressions: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """One SELECT with the arm that a set operator connects to it.

    Tables and conditions keep the order of the text. A condition list alternates conditions and
    connectors: `(a > 1, "and", b = 2, "or", c = 3)`. So `[::2]` takes the conditions and `[1::2]`
    the connectors. Quirk: where the text leaves a connector out, two conditions are neighbours,
    and these places no longer hold what they should.
    """

    is_distinct: bool
    select: tuple[SelectItem, ...]
    tables: "tuple[str | Query, ...]"
    on: "Conditions"
    where: "Conditions"
    group_by: tuple[ColumnUse, ...]
    having: "Conditions"
    order_by: OrderBy | None
    has_limit: bool
    intersect: "Query | None"
    union: "Query | None"
    except_: "Query | None"

    @property
    def arms(self) -> "tuple[Query | None, Query | None, Query | None]":
        """The queries behind INTERSECT, UNION and EXCEPT; at most one is not None."""
        return self.intersect, self.union, self.except_


Value = Query | ColumnUse | float | str | None
Conditions = tuple[Condition | str, ...]
