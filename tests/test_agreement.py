"""The judge of the rewards: SQL as it was written, in the order that the gold fixes, and the text that SQLite runs."""

import sqlite3
import time
from contextlib import closing

import pytest

from mtsql.judge.agreement import (
    agrees_but_for_ties,
    is_ordered,
    rows_agree,
    selects_distinct,
    written_match,
)
from mtsql.judge.execution_match import execution_match
from mtsql.judge.guard import Copied, copied_from_history, has_same_program
from mtsql.sql.runnable import runnable
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import schema_from_sqlite

LIMITS = QueryConfig()


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    path = tmp_path_factory.mktemp("agreement") / "shows.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            """
            CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INT, value INT);
            CREATE TABLE song (id INTEGER PRIMARY KEY, singer_id INT REFERENCES singer, length REAL);
            INSERT INTO singer VALUES (1, 'Ann', 'USA', 30, 1), (2, 'Bob', 'Peru', 41, 2), (3, 'Cid', 'USA', 25, 3),
                                      (4, '> =', 'Peru', 41, 4);
            INSERT INTO song VALUES (1, 1, 0.1), (2, 1, 0.2), (3, 2, 0.3), (4, 3, 0.7), (5, 3, 1e-9);
            """
        )
    return path


@pytest.fixture(scope="module")
def schema(db):
    return schema_from_sqlite(db)


@pytest.mark.parametrize(
    ("written", "run"),
    [
        (
            "SELECT a FROM t WHERE a > = 3 AND b < = 4 AND c ! = 5",
            "SELECT a FROM t WHERE a >= 3 AND b <= 4 AND c != 5",
        ),
        (
            "SELECT '> =', \"< =\", `! =`, [> =] FROM t WHERE a > = 'it''s < ='",
            "SELECT '> =', \"< =\", `! =`, [> =] FROM t WHERE a >= 'it''s < ='",
        ),
        (
            "SELECT a -- > =\nFROM t /* < = */ WHERE a ! = 1",
            "SELECT a -- > =\nFROM t /* < = */ WHERE a != 1",
        ),
        ("SELECT year( CurDate ( ) ) - 3", "SELECT 2020 - 3"),
        (
            "SELECT a FROM t WHERE a >  = 3",
            "SELECT a FROM t WHERE a >  = 3",
        ),  # the official program leaves it, too
        ("SELECT value, DISTINCT FROM t", "SELECT value, DISTINCT FROM t"),
        ("", ""),
    ],
)
def test_the_text_that_runs(written, run):
    assert runnable(written) == run
    assert runnable(run) == run


def test_every_query_runs_as_that_text(db):
    assert run_query(db, "SELECT name FROM singer WHERE age > = 41 AND name ! = '> ='").rows == (
        ("Bob",),
    )
    assert run_query(db, "SELECT YEAR(CURDATE()) - age FROM singer WHERE id < = 1").rows == (
        (1990,),
    )
    assert run_query(db, "SELECT count(*) FROM singer WHERE name = '> ='").rows == ((1,),)


def test_a_long_text_takes_no_time():
    start = time.perf_counter()
    for piece in ("'", '"', "[", "/*", "--", "`", "> =", "(", "order ", "'' ", "\n"):
        text = f"SELECT > = {piece * 5000}"
        runnable(text), is_ordered(text), selects_distinct(text)
    assert time.perf_counter() - start < 2


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
def test_only_the_outermost_order_counts(sql, answer):
    assert is_ordered(sql) is answer


def test_select_distinct_is_seen_outside_of_quotes():
    assert selects_distinct("select  DISTINCT a FROM t") and selects_distinct(
        "SELECT a FROM (SELECT distinct a FROM t)"
    )
    assert not selects_distinct("SELECT 'select distinct' FROM t")
    assert not selects_distinct("SELECT count(DISTINCT a) FROM t WHERE a IS NOT DISTINCT FROM 3")


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
            "SELECT name FROM singer WHERE age = (SELECT age FROM singer ORDER BY age DESC LIMIT 1)",
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
def test_where_the_official_verdict_is_another_one(db, gold, answer, official, written):
    assert execution_match(answer, gold, db) is official
    assert written_match(answer, gold, db, LIMITS) is written


def test_ties_may_come_in_any_order_and_nothing_else(db):
    gold = "SELECT name FROM singer ORDER BY age DESC"
    assert written_match("SELECT name FROM singer ORDER BY age DESC, name DESC", gold, db, LIMITS)
    assert written_match("SELECT name FROM singer ORDER BY age DESC, name", gold, db, LIMITS)
    assert not written_match("SELECT name FROM singer ORDER BY age", gold, db, LIMITS)
    assert not written_match("SELECT name FROM singer", gold, db, LIMITS)
    assert not written_match("SELECT name FROM singer ORDER BY name", gold, db, LIMITS)


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
def test_ties_are_found_whatever_ends_the_text(db, order):
    gold = f"SELECT name FROM singer ORDER BY {order}"
    assert written_match("SELECT name FROM singer ORDER BY age, name DESC", gold, db, LIMITS)
    assert written_match("SELECT name FROM singer ORDER BY age, name", gold, db, LIMITS)
    assert not written_match("SELECT name FROM singer ORDER BY age DESC", gold, db, LIMITS)


def test_columns_change_places_in_all_blocks_alike():
    rows = [(1, 2), (2, 1), (3, 4)]
    assert not agrees_but_for_ties([(2, 1), (1, 2), (3, 4)], rows, rows)
    assert agrees_but_for_ties([(2, 1), (1, 2), (4, 3)], rows, rows)


def test_blocks_of_ties():
    gold, mirrored = [(1,), (2,), (3,), (4,)], [(2,), (1,), (3,), (4,)]
    assert agrees_but_for_ties([(1,), (2,), (3,), (4,)], gold, mirrored)
    assert agrees_but_for_ties([(2,), (1,), (3,), (4,)], gold, mirrored)
    for wrong in ([(1,), (3,), (2,), (4,)], [(1,), (2,), (4,), (3,)], [(1,), (2,), (3,)]):
        assert not agrees_but_for_ties(wrong, gold, mirrored)
    assert agrees_but_for_ties([(4,), (3,), (2,), (1,)], gold, gold[::-1])  # all tie


def test_last_digits_of_floats_do_not_count():
    assert rows_agree([(0.1 + 0.2,)], [(0.3,)]) and not rows_agree([(0.3001,)], [(0.3,)])
    assert rows_agree([(1, 0.1 + 0.2), (2, 0.5)], [(2, 0.5), (1, 0.3)])
    assert not rows_agree([(1,)], [("1",)]) and not rows_agree([], [(0.5,)])


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (
            "SELECT name FROM singer WHERE age > 3",
            'select ( s."name" ) as n from [singer] s where ((s.age) > (3))',
            True,
        ),
        (
            "SELECT name FROM singer WHERE country IN ('USA')",
            "SELECT name FROM singer WHERE country = 'USA'",
            True,
        ),
        ("SELECT name FROM singer WHERE age > 3", "SELECT name FROM singer WHERE age > 4", False),
        ("SELECT name FROM singer LIMIT 3", "SELECT name FROM singer LIMIT 4", False),
        ("SELECT name FROM singer", "SELECT country FROM singer", False),
        ("SELECT nope FROM singer", "SELECT nope FROM singer", False),
    ],
)
def test_the_same_program_is_the_same_query(db, one, other, is_same):
    assert has_same_program(one, other, db, LIMITS) is is_same


EARLIER = "SELECT name, country FROM singer WHERE age > 26"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (EARLIER, Copied.QUERY),
        (f"{EARLIER} ;", Copied.QUERY),
        (EARLIER.replace("name, country", "country, name"), Copied.QUERY),
        (EARLIER.replace("SELECT", "SELECT DISTINCT"), Copied.QUERY),
        (f"SELECT * FROM ({EARLIER})", Copied.QUERY),
        (f"select x.* from (SELECT * FROM ({EARLIER}) AS y) x;", Copied.QUERY),
        ("SELECT T1.name, T1.country FROM singer AS T1 WHERE T1.age > 26", Copied.QUERY),
        (EARLIER.replace("26", "27"), Copied.STRUCTURE),
        (EARLIER.replace("26", "40"), Copied.NO),  # the gold
        ("SELECT T1.country, T1.name FROM singer AS T1 WHERE T1.age > 40", Copied.NO),
        ("SELECT name, country FROM singer WHERE age >= 41", Copied.NO),
        ("SELECT name FROM singer", Copied.NO),
    ],
)
def test_an_earlier_query_is_known_in_disguise(db, schema, answer, found):
    gold = EARLIER.replace("26", "40")
    assert (
        copied_from_history(answer, [("?", "SELECT 1"), ("?", EARLIER)], gold, schema, db, LIMITS)
        is found
    )
    assert copied_from_history(answer, [("?", EARLIER)], EARLIER, schema, db, LIMITS) in (
        Copied.NO,
        Copied.STRUCTURE,
    )


def test_limits_and_distinct_tell_a_gold_from_an_earlier_query(db, schema):
    top = "SELECT name FROM singer ORDER BY age LIMIT 1"
    three = top.replace("1", "3")
    assert copied_from_history(top, [("?", top)], three, schema, db, LIMITS) is Copied.QUERY
    assert copied_from_history(three, [("?", top)], three, schema, db, LIMITS) is Copied.NO
    plain, distinct = "SELECT country FROM singer", "SELECT DISTINCT country FROM singer"
    assert copied_from_history(plain, [("?", plain)], distinct, schema, db, LIMITS) is Copied.QUERY
    assert copied_from_history(distinct, [("?", plain)], distinct, schema, db, LIMITS) is Copied.NO


def test_a_result_of_many_columns_is_compared():
    rows = [tuple(range(2000)), tuple(range(5, 2005))]
    turned = [row[::-1] for row in rows[::-1]]
    assert rows_agree(turned, rows) and not rows_agree([turned[0], turned[0]], rows)
