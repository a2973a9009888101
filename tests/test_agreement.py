"""Two queries agree if they return the same rows as they are written, in the order that the gold
fixes."""

import time
from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.shows import SINGERS
from helpers.unusual import make_unusual
from mtsql.judge.agreement import (
    agrees_but_for_ties,
    is_ordered,
    rows_agree,
    selects_distinct,
    stable_order,
    tie_breakers,
    written_match,
)
from mtsql.judge.execution_match import execution_match
from mtsql.judge.guard import Evidence, evidence
from mtsql.sql.runnable import runnable
from mtsql.sql.sandbox import QueryConfig
from mtsql.sql.schema import schema_from_sqlite

LIMITS = QueryConfig()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("agreement") / "shows.sqlite", SINGERS)


@pytest.mark.parametrize(
    ("sql", "answer"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("SELECT a FROM t order\nby a LIMIT 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT a FROM t WHERE b = (SELECT b FROM t ORDER BY b LIMIT 1)", False),
        ("SELECT a FROM t WHERE b = 'order by'", False),
        ("SELECT a FROM t -- order by a", False),
        ("SELECT a FROM t UNION SELECT a FROM u ORDER BY 1", True),
        ("SELECT sum(a) OVER (ORDER BY b) FROM t", False),
        ("SELECT a AS border FROM t GROUP BY a", False),
    ],
)
def test_only_the_outermost_order_by_orders_a_result(sql: str, answer: bool) -> None:
    assert is_ordered(sql) is answer


@pytest.mark.parametrize(
    ("sql", "answer"),
    [
        ("select  DISTINCT a FROM t", True),
        ("SELECT a FROM (SELECT distinct a FROM t)", True),
        ("SELECT 'select distinct' FROM t", False),
        ("SELECT count(DISTINCT a) FROM t WHERE a IS NOT DISTINCT FROM 3", False),
    ],
)
def test_select_distinct_is_found_outside_of_quotes(sql: str, answer: bool) -> None:
    assert selects_distinct(sql) is answer


def test_tie_breakers_are_put_behind_the_order_of_the_gold() -> None:
    assert tie_breakers("SELECT a, b FROM t ORDER BY a LIMIT 3", 2) == (
        "SELECT a, b FROM t ORDER BY a , 1 ASC, 2 ASC LIMIT 3",
        "SELECT a, b FROM t ORDER BY a , 1 DESC, 2 DESC LIMIT 3",
    )
    assert tie_breakers("SELECT a FROM t", 1) is None


def test_long_texts_take_linear_time() -> None:
    start = time.perf_counter()
    for piece in ("'", '"', "[", "/*", "--", "`", "> =", "(", "order ", "'' ", "\n"):
        text = f"SELECT > = {piece * 5000}"
        for read in (runnable, is_ordered, selects_distinct):
            read(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("gold", "answer", "official", "written"),
    [
        ("SELECT value FROM singer", "SELECT value FROM singer", False, True),
        ("SELECT name FROM singer", "SELECT name AS value FROM singer", False, True),
        (
            "SELECT name FROM singer WHERE age = 30",
            "SELECT name FROM singer WHERE age IS NOT DISTINCT FROM 30",
            False,
            True,
        ),
        ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer", True, False),
        ("SELECT DISTINCT country FROM singer", "SELECT country FROM singer", True, False),
        ("SELECT name FROM singer", "SELECT name FROM singer; and so on", True, False),
        (
            "SELECT name FROM singer ORDER  BY age",
            "SELECT name FROM singer ORDER BY name DESC",
            True,
            False,
        ),
        (
            "SELECT name FROM singer WHERE age = "
            "(SELECT age FROM singer ORDER BY age DESC LIMIT 1)",
            "SELECT name FROM singer WHERE age = 41 ORDER BY name",
            False,
            True,
        ),
        (
            "SELECT name FROM singer WHERE age > = 30",
            "SELECT name FROM singer WHERE age>=30",
            True,
            True,
        ),
    ],
)
def test_the_written_match_differs_from_the_official_one(
    db: Path, gold: str, answer: str, official: bool, written: bool
) -> None:
    assert execution_match(answer, gold, db) is official
    assert written_match(answer, gold, db, LIMITS) is written


@pytest.mark.parametrize(
    ("order", "is_met"),
    [
        (" ORDER BY age DESC, name DESC", True),
        (" ORDER BY age DESC, name", True),
        (" ORDER BY age", False),
        ("", False),
        (" ORDER BY name", False),
    ],
)
def test_tied_rows_may_come_in_any_order_and_no_others(db: Path, order: str, is_met: bool) -> None:
    gold = "SELECT name FROM singer ORDER BY age DESC"
    assert written_match(f"SELECT name FROM singer{order}", gold, db, LIMITS) is is_met


@pytest.mark.parametrize(
    "order",
    [
        "age",
        '"age"',
        "`age`",
        "[age]",
        "age -- by age",
        "age /* so */ ;",
        "age LIMIT 4",
        "'x', age",
    ],
)
def test_ties_are_found_behind_any_end_of_the_text(db: Path, order: str) -> None:
    gold = f"SELECT name FROM singer ORDER BY {order}"
    assert written_match("SELECT name FROM singer ORDER BY age, name DESC", gold, db, LIMITS)
    assert written_match("SELECT name FROM singer ORDER BY age, name", gold, db, LIMITS)
    assert not written_match("SELECT name FROM singer ORDER BY age DESC", gold, db, LIMITS)


MOST = "SELECT place FROM shop GROUP BY place ORDER BY count(*) DESC LIMIT 1"


@pytest.mark.parametrize(
    ("gold", "answer", "wrong"),
    [
        (
            MOST,
            "SELECT place FROM shop GROUP BY place HAVING count(*) = "
            "(SELECT max(c) FROM (SELECT count(*) AS c FROM shop GROUP BY place))",
            None,
        ),
        (MOST, MOST.replace("GROUP BY place", "GROUP BY place, place"), MOST.replace("DESC", "")),
        (
            MOST,
            "SELECT place FROM (SELECT place, rank() OVER (ORDER BY count(*) DESC) AS r "
            "FROM shop GROUP BY place) WHERE r = 1",
            None,
        ),
        (
            "SELECT name FROM shop ORDER BY grp",
            "SELECT name FROM shop ORDER BY grp, id DESC",
            "SELECT name FROM shop ORDER BY -grp, id DESC",
        ),
        (
            "SELECT name FROM shop WHERE id < 20 ORDER BY grp -- so",
            "SELECT name FROM shop WHERE id < 20 ORDER BY grp, name DESC",
            "SELECT name FROM shop WHERE id < 20 ORDER BY -grp, name DESC",
        ),
        (
            "SELECT max(grp) FROM shop WHERE zip = '02101'",
            "SELECT grp FROM shop WHERE zip = '02101' ORDER BY grp DESC LIMIT 1",
            "SELECT -grp FROM shop WHERE zip = '02101' ORDER BY grp DESC LIMIT 1",
        ),
    ],
)
def test_ties_take_nothing_from_an_answer_with_the_same_meaning(
    tmp_path_factory: pytest.TempPathFactory, gold: str, answer: str, wrong: str | None
) -> None:
    path = make_unusual(tmp_path_factory.mktemp("ties") / "shops.sqlite")
    schema = schema_from_sqlite(path)

    def is_right(sql: str) -> bool:
        is_match = written_match(sql, gold, path, LIMITS)
        return is_match and evidence(sql, gold, schema, path, LIMITS) is Evidence.AGREES

    assert is_right(answer)
    if wrong:
        assert not is_right(wrong)


def test_columns_change_places_in_all_blocks_of_ties_alike() -> None:
    rows = [(1, 2), (2, 1), (3, 4)]
    assert not agrees_but_for_ties([(2, 1), (1, 2), (3, 4)], rows, rows)
    assert agrees_but_for_ties([(2, 1), (1, 2), (4, 3)], rows, rows)


def test_rows_change_places_within_a_block_of_ties_only() -> None:
    gold = [(1,), (2,), (3,), (4,)]
    mirrored = [(2,), (1,), (3,), (4,)]  # 1 and 2 tie
    assert agrees_but_for_ties([(1,), (2,), (3,), (4,)], gold, mirrored)
    assert agrees_but_for_ties([(2,), (1,), (3,), (4,)], gold, mirrored)
    for wrong in ([(1,), (3,), (2,), (4,)], [(1,), (2,), (4,), (3,)], [(1,), (2,), (3,)]):
        assert not agrees_but_for_ties(wrong, gold, mirrored)
    assert agrees_but_for_ties([(4,), (3,), (2,), (1,)], gold, gold[::-1])  # all tie


def test_stable_order_tells_whether_the_gold_fixes_order_rows_or_nothing() -> None:
    ordered = "SELECT a FROM t ORDER BY a"
    assert stable_order([(1,), (2,)], [(1,), (2,)], ordered) is True
    assert stable_order([(1,), (2,)], [(2,), (1,)], ordered) is False  # the rows tie
    assert stable_order([(1,), (2,)], [(2,), (1,)], "SELECT a FROM t") is False
    assert stable_order([(1,)], [(2,)], ordered) is None
    assert stable_order([(0.1 + 0.2,)], [(0.3,)], "SELECT sum(a) FROM t") is False


def test_the_last_digits_of_floats_do_not_count() -> None:
    assert rows_agree([(0.1 + 0.2,)], [(0.3,)])
    assert not rows_agree([(0.3001,)], [(0.3,)])
    assert rows_agree([(1, 0.1 + 0.2), (2, 0.5)], [(2, 0.5), (1, 0.3)])
    assert not rows_agree([(1,)], [("1",)])
    assert not rows_agree([], [(0.5,)])


def test_results_of_many_columns_are_compared() -> None:
    rows = [tuple(range(2000)), tuple(range(5, 2005))]
    mirrored = [row[::-1] for row in rows[::-1]]
    assert rows_agree(mirrored, rows)
    assert not rows_agree([mirrored[0], mirrored[0]], rows)


def test_the_reward_compares_as_bird_does_if_its_ex_does(db: Path) -> None:
    pred, gold = "SELECT DISTINCT age FROM singer", "SELECT age FROM singer"
    assert written_match(pred, gold, db, LIMITS, "set")
    assert not written_match(pred, gold, db, LIMITS)
