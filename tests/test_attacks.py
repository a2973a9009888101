"""Attacks are made where they need no understanding of the question."""

import pytest

from mtsql.audit.attacks import attacks_on
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus
from mtsql.sql.schema import Column, Schema, Table

SCHEMA = Schema("d", (Table("t", (Column("name", "text"), Column("n", "number"))),))
GOLD = QueryResult(QueryStatus.OK, (("x",), ("it's",), ("x",), (None,)))


def value_attacks(sql: str) -> dict[str, str]:
    """The attacks on a gold that list the values of its result."""
    found = attacks_on(Turn("a:0:0", 0, "d", "?", sql), GOLD, SCHEMA)
    return {name: text for name, text in found if name.startswith("values")}


@pytest.mark.parametrize("sql", ["SELECT name FROM t WHERE n > 3", "SELECT a.name FROM t AS a"])
def test_the_values_of_a_result_become_a_filter(sql: str) -> None:
    assert value_attacks(sql) == {
        "values listed": "SELECT name FROM t WHERE name IN ('x', 'it''s')",
        "values between": "SELECT name FROM t WHERE name BETWEEN 'it''s' AND 'x'",
    }


@pytest.mark.parametrize(
    "sql",
    ["SELECT name FROM t WHERE name = 'x'", "SELECT upper(name) FROM t", "SELECT 1"],
)
def test_the_values_are_no_attack_if_the_gold_filters_by_them_or_returns_no_column(
    sql: str,
) -> None:
    assert value_attacks(sql) == {}
