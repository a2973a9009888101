"""The class of a wrong answer, by examples."""

import pytest

from helpers.databases import make_database
from helpers.shows import SHOWS
from mtsql.judge.error_classes import ERROR_CLASSES, ERROR_DEFINITIONS, error_class
from mtsql.sql.schema import schema_from_sqlite

JOIN = "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id"


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "shows.sqlite"
    return schema_from_sqlite(make_database(path, SHOWS))


@pytest.mark.parametrize(
    ("gold", "pred", "expected"),
    [
        ("SELECT name FROM singer", "SELECT country FROM singer", "schema_linking"),
        ("SELECT name FROM singer", "SELECT name, age FROM singer", "schema_linking"),
        ("SELECT max(age) FROM singer", "SELECT max(sales) FROM singer", "schema_linking"),
        (
            "SELECT name FROM singer WHERE country = 'USA'",
            "SELECT name FROM singer WHERE planet = 'USA'",
            "schema_linking",
        ),
        (
            "SELECT name FROM singer ORDER BY age",
            "SELECT name FROM singer ORDER BY sales",
            "schema_linking",
        ),
        ("SELECT count(*) FROM singer", "SELECT count(*) FROM song", "schema_linking"),
        (JOIN, "SELECT name FROM singer", "join_path"),
        (JOIN, JOIN.replace("T2.singer_id", "T2.song_id"), "join_path"),
        (
            "SELECT count(*) FROM song",
            "SELECT count(*) FROM song AS T1 JOIN singer AS T2 ON T1.singer_id = T2.singer_id",
            "join_path",
        ),
        ("SELECT max(age) FROM singer", "SELECT min(age) FROM singer", "aggregation_drift"),
        ("SELECT count(*) FROM singer", "SELECT count(sales) FROM singer", "aggregation_drift"),
        (
            "SELECT country FROM singer GROUP BY country HAVING count(*) > 1",
            "SELECT country FROM singer GROUP BY country HAVING count(*) > 2",
            "aggregation_drift",
        ),
        (
            "SELECT country FROM singer GROUP BY country ORDER BY count(*)",
            "SELECT country FROM singer GROUP BY country ORDER BY sum(age)",
            "aggregation_drift",
        ),
        (
            "SELECT name FROM singer WHERE country = 'USA'",
            "SELECT name FROM singer WHERE country = 'usa'",
            "constraint",
        ),
        ("SELECT name FROM singer WHERE age > 30", "SELECT name FROM singer", "constraint"),
        (
            "SELECT name FROM singer WHERE age > 30",
            "SELECT name FROM singer WHERE age > 30 AND country = 'USA'",
            "constraint",
        ),
        (
            "SELECT name FROM singer WHERE age > 30 AND sales > 1 OR country = 'USA'",
            "SELECT name FROM singer WHERE age > 30 OR sales > 1 AND country = 'USA'",
            "constraint",
        ),
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer ORDER BY age DESC LIMIT 1",
            "constraint",
        ),
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer ORDER BY age LIMIT 2",
            "constraint",
        ),
        (
            "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song)",
            "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM song)",
            "constraint",
        ),
        (
            "SELECT age FROM singer UNION SELECT singer_id FROM singer",
            "SELECT age FROM singer EXCEPT SELECT singer_id FROM singer",
            "other",
        ),
        ("SELECT name FROM singer", "SELECT upper(name) FROM singer", "other"),
    ],
)
def test_a_wrong_answer_belongs_to_the_first_class_that_applies(schema, gold, pred, expected):
    assert error_class(pred, gold, schema, has_run=True) == expected


def test_an_answer_that_is_missing_or_does_not_run_has_a_class_of_its_own(schema):
    assert error_class(None, "SELECT name FROM singer", schema, has_run=False) == "no_answer"
    for pred in ("SELECT nope FROM singer", "SELECT name FROM singer"):
        assert error_class(pred, "SELECT age FROM singer", schema, has_run=False) == "execution"


def test_a_column_counts_before_the_join_and_the_condition_that_come_with_it(schema):
    pred = f"{JOIN.replace('T1.name', 'T2.title')} WHERE T2.year > 2000"
    assert error_class(pred, "SELECT name FROM singer", schema, has_run=True) == "schema_linking"
    pred = f"{JOIN} WHERE T2.year > 2000"
    assert error_class(pred, "SELECT name FROM singer", schema, has_run=True) == "join_path"


def test_every_class_is_defined():
    assert tuple(ERROR_DEFINITIONS) == ERROR_CLASSES
