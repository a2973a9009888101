"""The dialogue memory: what it recalls of earlier turns, and the clauses of a query."""

import pytest

from helpers.episodes import GOLD, singers
from mtsql.agent.memory import MemoryEntry, clauses_of, recall
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig


@pytest.mark.parametrize("with_results", [True, False])
def test_recall_gives_the_earlier_turns_oldest_first(tmp_path, with_results):
    database = singers(tmp_path / "shows.sqlite")
    history = (("who ?", "SELECT name FROM singer"), ("how old ?", "SELECT agee FROM singer"))
    turn = Turn("dev:0:2", 2, "shows", "and now ?", "the gold is never read", history)
    names = (("Ann",), ("Bob",)) if with_results else None
    assert recall(turn, database.path, QueryConfig(), with_results) == [
        MemoryEntry("who ?", "SELECT name FROM singer", ("select", "from"), names),
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
