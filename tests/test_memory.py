"""The dialogue memory: what it recalls of earlier turns, and the clauses of a query."""

import pytest

from helpers.episodes import GOLD, singers
from mtsql.agent.memory import MemoryEntry, clauses_of, parsed_clauses, recall
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig


@pytest.mark.parametrize("with_results", [True, False])
def test_recall_gives_the_earlier_turns_oldest_first(tmp_path, with_results):
    database = singers(tmp_path / "shows.sqlite")
    history = (("who ?", "SELECT name FROM singer"), ("how old ?", "SELECT agee FROM singer"))
    turn = Turn("dev:0:2", 2, "shows", "and now ?", "the gold is never read", history)
    names = (("Ann",), ("Bob",)) if with_results else None
    assert recall(turn, database, QueryConfig(), with_results) == [
        MemoryEntry(
            "who ?", "SELECT name FROM singer", ("select singer.name", "from singer"), names
        ),
        MemoryEntry("how old ?", "SELECT agee FROM singer", ("select", "from"), None),
    ]


@pytest.mark.parametrize(
    ("sql", "clauses"),
    [
        (GOLD, ("select", "from", "where")),
        ("select a from b\nGroup\n By a HAVING a order by a LIMIT 1",)
        + (("select", "from", "group by", "having", "order by", "limit"),),
        ("SELECT a EXCEPT SELECT b", ("select", "except")),
        ("SELECT fromage", ("select",)),
        ("", ()),
    ],
)
def test_clauses_of_a_query_stand_in_a_fixed_order(sql, clauses):
    assert clauses_of(sql) == clauses


@pytest.mark.parametrize(
    ("sql", "clauses"),
    [
        ("SELECT count(*) FROM singer", ("select *", "from singer")),
        (
            "SELECT T1.name, max(T1.age) FROM Singer AS T1 WHERE T1.age > 3 AND T1.age < 9 "
            "GROUP BY T1.name HAVING sum(T1.age) > 3 ORDER BY T1.age - T1.name DESC LIMIT 1",
            ("select singer.name, singer.age", "from singer", "where singer.age")
            + ("group by singer.name", "having singer.age")
            + ("order by singer.age, singer.name desc", "limit"),
        ),
        (
            "SELECT name FROM singer EXCEPT SELECT name FROM singer WHERE age = 3",
            ("select singer.name", "from singer")
            + ("except (select singer.name; from singer; where singer.age)",),
        ),
        (
            "SELECT count(*) FROM (SELECT age FROM singer)",
            ("select *", "from (select singer.age; from singer)"),
        ),
        ("SELECT nothing FROM singer", ("select", "from")),  # the parser knows no such column
        ("", ()),
    ],
)
def test_clauses_name_the_columns_that_they_read(sql, clauses, tmp_path):
    assert parsed_clauses(sql, singers(tmp_path / "shows.sqlite").schema) == clauses
