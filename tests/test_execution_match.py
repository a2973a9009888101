"""Execution match: equal to the official program's verdicts where these are known, else worked out
by hand from its rules."""

import random
import sqlite3
from contextlib import closing
from itertools import permutations
from pathlib import Path

import pytest
import sqlparse
from hypothesis import given
from hypothesis import strategies as st

from helpers.databases import make_database
from helpers.official import all_golds, conformance_pairs, table_rows
from mtsql.judge.execution_match import executed_text, execution_match, results_agree
from mtsql.sql.sandbox import QueryConfig


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shows.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (singer_id INT, name TEXT, age INT);"
            "INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bob', 40), (3, 'Cid', 30);"
        )
    return path


def test_verdicts_are_the_official_ones(shared: Path) -> None:
    wrong = []
    for pair in conformance_pairs(shared):
        is_match = execution_match(pair["pred"], pair["gold"], shared / "data" / pair["db"])
        if int(is_match) != pair["ex"]:
            wrong.append(pair["id"])
    assert wrong == []


@pytest.mark.parametrize("row", table_rows("official_verdicts.tsv"), ids=lambda row: row["what"])
def test_each_rule_gives_the_official_verdict(row: dict[str, str], shared: Path) -> None:
    path = shared / "data" / "database" / row["db_id"] / f"{row['db_id']}.sqlite"
    assert execution_match(row["pred"], row["gold"], path) == bool(int(row["ex"]))


def test_executed_text_is_the_one_that_full_sqlparse_gives(shared: Path) -> None:
    """The code has two shortcuts: no grouping stage, and no call where none is needed."""
    texts = [
        "SELECT 1 ; ; SELECT 2",
        "SELECT 'a;b' ; x",
        "SELECT (1 ; 2) ; 3",
        "SELECT 1 go SELECT 2",
        "SELECT distinct 'distinct' -- distinct",
        "SELECT `distinct` , T.distinct , [distinct]",
        "SELECT CASE WHEN 1 THEN 2 END ; 3",
    ]
    texts += [sql for _, sql in random.Random(0).sample(all_golds(shared), 700)]
    for sql in texts:
        joined = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
        tokens = [token.value for token in sqlparse.parse(joined)[0].flatten()]
        expected = "".join(token for token in tokens if token.lower() != "distinct")
        assert executed_text(sql) == expected


@pytest.mark.parametrize(
    ("pred", "gold", "verdict"),
    [
        ("SELECT age , name FROM singer", "SELECT name , age FROM singer", True),
        ("SELECT age FROM singer GROUP BY age", "SELECT age FROM singer", False),
        ("SELECT DISTINCT age FROM singer", "SELECT age FROM singer", True),
        (
            "SELECT name FROM singer WHERE age > = 40",
            "SELECT name FROM singer WHERE age ! = 30",
            True,
        ),
        ("SELECT name FROM singer ; DROP TABLE singer", "SELECT name FROM singer", True),
        ("DROP TABLE singer", "SELECT name FROM singer WHERE age > 99", False),
        (
            "SELECT name FROM singer ORDER BY name DESC",
            "SELECT name FROM singer ORDER BY name",
            False,
        ),
        (
            "SELECT name FROM singer ORDER BY name DESC",
            "SELECT name FROM singer ORDER  BY name",
            True,
        ),
        ("SELECT YEAR ( curdate() )", "SELECT 2020", True),
        ("SELECT 'value'", "SELECT '1'", True),
        ("SELECT 1 WHERE 0", "SELECT name , age FROM singer WHERE 0", True),
        ("", "SELECT name FROM singer WHERE 0", False),
    ],
)
def test_each_rule_gives_the_verdict_worked_out_by_hand(
    database: Path, pred: str, gold: str, verdict: bool
) -> None:
    assert execution_match(pred, gold, database) == verdict


def test_nothing_matches_a_gold_that_does_not_run(database: Path) -> None:
    assert not execution_match("SELECT 1", "SELECT x", database)


def test_keep_distinct_keeps_distinct_and_all_statements(database: Path) -> None:
    pred = "SELECT DISTINCT age FROM singer"
    gold = "SELECT age FROM singer"
    assert not execution_match(pred, gold, database, keep_distinct=True)
    assert not execution_match(f"{gold} ; SELECT 1", gold, database, keep_distinct=True)


def test_every_database_must_agree(database: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.executescript(
            "CREATE TABLE singer (name, age); INSERT INTO singer VALUES ('Ann', 50);"
        )
    pred = "SELECT name FROM singer WHERE age < 45"
    gold = "SELECT name FROM singer"
    assert execution_match(pred, gold, database)
    assert not execution_match(pred, gold, [database, other])


def test_a_prediction_that_does_not_end_is_wrong(database: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n"
    assert not execution_match(endless, "SELECT 1", database, limits=QueryConfig(timeout_secs=0.1))


def agree_by_trying(pred: list[tuple], gold: list[tuple], is_ordered: bool) -> bool:
    """The official rule as it is stated: every permutation of the columns is tried."""
    if not pred and not gold:
        return True
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False

    def sort_cells(rows: list[tuple]) -> list[tuple]:
        return [tuple(sorted(row, key=lambda cell: str(cell) + str(type(cell)))) for row in rows]

    sorted_pred = sort_cells(pred)
    sorted_gold = sort_cells(gold)
    if is_ordered and sorted_pred != sorted_gold:
        return False
    if not is_ordered and set(sorted_pred) != set(sorted_gold):
        return False

    def key(row: tuple) -> list[tuple[str, str]]:
        return [("text", cell) if isinstance(cell, str) else ("", str(float(cell))) for cell in row]

    for places in permutations(range(len(gold[0]))):
        moved = [tuple(row[place] for place in places) for row in pred]
        if moved == gold:
            return True
        if not is_ordered and sorted(moved, key=key) == sorted(gold, key=key):
            return True
    return False


@given(st.data(), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_results_agree_as_by_trying_every_permutation(
    data: st.DataObject, num_columns: int, num_rows: int, is_ordered: bool
) -> None:
    cell = st.sampled_from([0, 1, 2, 10, 1.0, 2.0, "1", "a"])
    row = st.tuples(*[cell] * num_columns)
    gold = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    places = data.draw(st.permutations(range(num_columns)))
    pred = [[row[place] for place in places] for row in gold]
    if not is_ordered:
        pred = data.draw(st.permutations(pred))
    changes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), cell), max_size=2)
    for row_at, place, new in data.draw(changes):
        if row_at < len(pred) and place < num_columns:
            pred[row_at][place] = new
    pred = [tuple(row) for row in pred]
    assert results_agree(pred, gold, is_ordered) == agree_by_trying(pred, gold, is_ordered)


def test_many_columns_with_the_same_values_are_mapped_quickly() -> None:
    generator = random.Random(0)
    columns = [generator.sample([0] * 30 + [1] * 30, 60) for _ in range(60)]
    gold = list(zip(*columns, strict=True))
    pred = list(zip(*generator.sample(columns, 60), strict=True))
    generator.shuffle(pred)
    assert results_agree(pred, gold, is_ordered=False)
    pred[0] = tuple(1 - cell for cell in pred[0])
    assert not results_agree(pred, gold, is_ordered=False)


@pytest.mark.parametrize(
    ("pred", "gold", "is_official", "is_set"),
    [
        ("SELECT age FROM singer", "SELECT DISTINCT age FROM singer", True, True),
        ("SELECT age FROM singer GROUP BY age", "SELECT age FROM singer", False, True),
        ("SELECT age, name FROM singer", "SELECT name, age FROM singer", True, False),
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY name DESC", False, True),
        ("SELECT age + 0.0 FROM singer", "SELECT age FROM singer", True, True),
        ("SELECT name FROM singer LIMIT 2", "SELECT name FROM singer", False, False),
        ("SELECT 1 WHERE 0", "SELECT name, age FROM singer WHERE 0", True, True),
        ("SELECT 1; SELECT 2", "SELECT 1", True, False),
        ("SELECT 'value'", "SELECT 'value'", False, True),
        ("SELECT nothing", "SELECT 1", False, False),
        ("SELECT 1", "SELECT nothing", False, False),
        ("DROP TABLE singer", "DROP TABLE singer", False, False),
    ],
)
def test_the_rule_of_bird_compares_sets_of_rows(
    database: Path, pred: str, gold: str, is_official: bool, is_set: bool
) -> None:
    assert execution_match(pred, gold, database) is is_official
    assert execution_match(pred, gold, database, rule="set") is is_set


def test_a_set_must_agree_on_every_database_of_a_suite(database: Path, tmp_path: Path) -> None:
    other = make_database(tmp_path / "other.sqlite", "CREATE TABLE singer (age INT, name TEXT)")
    pred, gold = "SELECT count(*) > 1 FROM singer", "SELECT 1"
    assert execution_match(pred, gold, [database], rule="set")
    assert not execution_match(pred, gold, [database, other], rule="set")
