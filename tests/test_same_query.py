"""Two texts are the same query, or an answer repeats the SQL of an earlier turn."""

from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.shows import SINGERS, USA
from mtsql.judge.same_query import Copied, copied_from_history, has_same_program
from mtsql.sql.sandbox import QueryConfig
from mtsql.sql.schema import Schema, schema_from_sqlite

LIMITS = QueryConfig()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("same_query") / "shows.sqlite", SINGERS)


@pytest.fixture(scope="module")
def schema(db: Path) -> Schema:
    return schema_from_sqlite(db)


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
def test_queries_that_compile_to_the_same_steps_have_the_same_program(
    db: Path, one: str, other: str, is_same: bool
) -> None:
    assert has_same_program(one, other, db, LIMITS) is is_same


EARLIER = "SELECT name, country FROM singer WHERE age > 26"
GOLD = EARLIER.replace("26", "40")


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
        (GOLD, Copied.NO),
        ("SELECT T1.country, T1.name FROM singer AS T1 WHERE T1.age > 40", Copied.NO),
        ("SELECT name, country FROM singer WHERE age >= 41", Copied.NO),
        ("SELECT name FROM singer", Copied.NO),
    ],
)
def test_an_earlier_query_is_found_in_another_form(
    db: Path, schema: Schema, answer: str, found: Copied
) -> None:
    history = [("?", "SELECT 1"), ("?", EARLIER)]
    assert copied_from_history(answer, history, GOLD, schema, db, LIMITS) is found
    # If the gold is the earlier query itself, no answer is a copy of it.
    again = copied_from_history(answer, [("?", EARLIER)], EARLIER, schema, db, LIMITS)
    assert again in (Copied.NO, Copied.STRUCTURE)


@pytest.mark.parametrize(
    ("earlier", "gold"),
    [
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer ORDER BY age LIMIT 3",
        ),
        ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer"),
    ],
)
def test_limit_and_distinct_distinguish_a_gold_from_an_earlier_query(
    db: Path, schema: Schema, earlier: str, gold: str
) -> None:
    history = [("?", earlier)]
    assert copied_from_history(earlier, history, gold, schema, db, LIMITS) is Copied.QUERY
    assert copied_from_history(gold, history, gold, schema, db, LIMITS) is Copied.NO


def test_queries_that_do_not_parse_are_compared_as_text(db: Path, schema: Schema) -> None:
    odd = "SELECT CASE WHEN age > 3 THEN 1 END FROM singer"
    history = [("?", odd)]
    copied = copied_from_history(f" {odd.upper()} ; ", history, USA, schema, db, LIMITS)
    assert copied is Copied.QUERY
    assert copied_from_history(odd, history, odd.lower(), schema, db, LIMITS) is Copied.NO
