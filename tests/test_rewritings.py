"""Each rewriting gives the expected text, returns the rows of its query, and is paid."""

from collections import Counter
from pathlib import Path

import pytest

from helpers.databases import make_database
from mtsql.audit.rewritings import REWRITINGS, rewritings_of
from mtsql.judge.agreement import rounded
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.dialogues import Turn
from mtsql.sql.reader import read_sql
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema, schema_from_sqlite
from mtsql.sql.statement import Unreadable

SCRIPT = """
CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER,
                     "home town" TEXT);
CREATE TABLE song (song_id INTEGER PRIMARY KEY, title TEXT, year INTEGER, singer_id INTEGER,
                   sales REAL,
                   FOREIGN KEY (singer_id) REFERENCES singer (singer_id));
CREATE TABLE award (award_id INTEGER PRIMARY KEY, song_id INTEGER, name TEXT,
                    FOREIGN KEY (song_id) REFERENCES song (song_id));
INSERT INTO singer VALUES (1, 'Ann', 'USA', 30, 'Ames'), (2, 'Bob', 'Peru', 25, NULL),
    (3, 'Cid', 'USA', 41, 'Bern'), (4, 'Dan', NULL, 41, 'Bern'), (5, 'Eve', 'Chad', 19, 'Lima');
INSERT INTO song VALUES (1, 'Up', 2001, 1, 1.5), (2, 'On', 2005, 1, 2.25), (3, 'In', 2005, 2, 0.1),
    (4, 'By', 1999, 4, 7.0), (5, 'At', 2010, NULL, 0.7);
INSERT INTO award VALUES (1, 1, 'gold'), (2, 3, 'gold'), (3, 3, 'tin'), (4, 4, 'iron');
"""


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("rewritings") / "shows.sqlite", SCRIPT)


@pytest.fixture(scope="module")
def schema(db: Path) -> Schema:
    return schema_from_sqlite(db)


JOIN = "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id"
CASES = [
    (
        "aliases renamed",
        "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id "
        "WHERE T2.year > 2000",
        "SELECT r1.name FROM singer AS r1 JOIN song AS r2 ON r1.singer_id = r2.singer_id "
        "WHERE r2.year > 2000",
    ),
    (
        "aliases renamed",
        "SELECT r1.name FROM singer r1, song WHERE r1.singer_id = song.singer_id AND title != 'r2'",
        "SELECT r2.name FROM singer r2, song WHERE r2.singer_id = song.singer_id AND title != 'r2'",
    ),
    (
        "aliases renamed",
        "SELECT T1.* FROM singer AS T1 WHERE age > (SELECT avg(T1.age) FROM singer AS T1)",
        "SELECT r1.* FROM singer AS r1 WHERE age > (SELECT avg(r2.age) FROM singer AS r2)",
    ),
    (
        "aliases renamed",
        "SELECT name FROM singer",
        None,
    ),
    (
        "aliases added",
        "SELECT name, count(*) FROM singer GROUP BY name ORDER BY age",
        "SELECT r1.name, count(*) FROM singer AS r1 GROUP BY r1.name ORDER BY r1.age",
    ),
    (
        "aliases added",
        "SELECT singer.name, title FROM singer JOIN song ON singer.singer_id = song.singer_id",
        "SELECT r1.name, r2.title FROM singer AS r1 JOIN song AS r2 ON r1.singer_id = r2.singer_id",
    ),
    (
        "aliases added",
        "SELECT max(age) AS age FROM singer GROUP BY country ORDER BY age",
        "SELECT max(r1.age) AS age FROM singer AS r1 GROUP BY r1.country ORDER BY age",
    ),
    (
        "aliases added",
        "SELECT count(*) FROM (SELECT name FROM singer GROUP BY name)",
        "SELECT count(*) FROM (SELECT r2.name FROM singer AS r2 GROUP BY r2.name) AS r1",
    ),
    (
        "aliases added",
        'SELECT "name" FROM singer WHERE country = "USA"',
        'SELECT r1."name" FROM singer AS r1 WHERE r1.country = "USA"',
    ),
    (
        "aliases added",
        "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song WHERE year = age)",
        "SELECT r1.name FROM singer AS r1 WHERE r1.singer_id IN (SELECT r2.singer_id "
        "FROM song AS r2 WHERE r2.year = r1.age)",
    ),
    (
        "join order",
        "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id",
        "SELECT T1.name FROM song AS T2 JOIN singer AS T1 ON T1.singer_id = T2.singer_id",
    ),
    (
        "join order",
        "SELECT a.name FROM singer AS a JOIN song AS b ON a.singer_id = b.singer_id "
        "JOIN award AS c ON b.song_id = c.song_id",
        "SELECT a.name FROM award AS c JOIN song AS b ON b.song_id = c.song_id "
        "JOIN singer AS a ON a.singer_id = b.singer_id",
    ),
    (
        "join order",
        "SELECT b.title FROM song AS b JOIN singer AS a ON a.singer_id = b.singer_id "
        "JOIN award AS c ON b.song_id = c.song_id",
        "SELECT b.title FROM award AS c JOIN song AS b ON b.song_id = c.song_id "
        "JOIN singer AS a ON a.singer_id = b.singer_id",
    ),
    (
        "join order",
        "SELECT a.name FROM singer AS a JOIN song AS b ON a.singer_id = b.singer_id "
        "JOIN award AS c ON b.song_id = b.song_id",
        "SELECT a.name FROM award AS c JOIN song AS b ON b.song_id = b.song_id "
        "JOIN singer AS a ON a.singer_id = b.singer_id",
    ),
    (
        "join order",
        "SELECT * FROM singer AS a JOIN song AS b ON a.singer_id = b.singer_id",
        None,
    ),
    (
        "join order",
        "SELECT a.name FROM singer AS a LEFT JOIN song AS b ON a.singer_id = b.singer_id",
        None,
    ),
    (
        "conditions in brackets",
        "SELECT name FROM singer WHERE age > 20 AND country = 'USA' OR age BETWEEN 1 AND 19",
        "SELECT name FROM singer WHERE (age > 20) AND (country = 'USA') OR (age BETWEEN 1 AND 19)",
    ),
    (
        "WHERE in brackets",
        "SELECT name FROM singer WHERE age > 20 OR country = 'USA' ORDER BY name",
        "SELECT name FROM singer WHERE (age > 20 OR country = 'USA') ORDER BY name",
    ),
    (
        "WHERE in brackets",
        "SELECT name FROM singer WHERE age BETWEEN 1 AND 20",
        None,
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song WHERE year = 2005)",
        "SELECT r1.name FROM singer AS r1 WHERE EXISTS (SELECT 1 FROM song AS r2 "
        "WHERE r2.year = 2005 AND r1.singer_id = r2.singer_id)",
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE age > 20 AND singer_id IN (SELECT singer_id FROM song "
        "WHERE year = 1 OR year = 2005)",
        "SELECT r1.name FROM singer AS r1 WHERE r1.age > 20 AND EXISTS (SELECT 1 "
        "FROM song AS r2 WHERE (r2.year = 1 OR r2.year = 2005) "
        "AND r1.singer_id = r2.singer_id)",
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM song)",
        None,
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE age IN (SELECT max(age) FROM singer)",
        None,
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE age IN (SELECT age FROM singer "
        "GROUP BY age HAVING count(*) > 1)",
        None,
    ),
    (
        "EXISTS for IN",
        "SELECT name FROM singer WHERE age IN (SELECT age FROM singer ORDER BY age LIMIT 1)",
        None,
    ),
    (
        "IN for EXISTS",
        "SELECT name FROM singer AS a WHERE EXISTS (SELECT * FROM song AS b "
        "WHERE b.year = 2005 AND a.singer_id = b.singer_id)",
        "SELECT r1.name FROM singer AS r1 WHERE r1.singer_id IN (SELECT r2.singer_id "
        "FROM song AS r2 WHERE r2.year = 2005)",
    ),
    (
        "IN for EXISTS",
        "SELECT name FROM singer AS a WHERE EXISTS (SELECT count(*) FROM song AS b "
        "WHERE a.singer_id = b.singer_id)",
        None,
    ),
    (
        "IN for EXISTS",
        "SELECT name FROM singer AS a WHERE EXISTS (SELECT * FROM song AS b "
        "WHERE a.singer_id = b.singer_id AND b.year > a.age)",
        None,
    ),
    (
        "IN for EXISTS",
        "SELECT name FROM singer AS a WHERE NOT EXISTS (SELECT * FROM song AS b "
        "WHERE a.singer_id = b.singer_id)",
        None,
    ),
    (
        'names in "quotes"',
        'SELECT T1.name, "home town" FROM singer AS T1 WHERE country = "USA" AND T1.age > 3',
        'SELECT "T1"."name", "home town" FROM "singer" AS "T1" WHERE "country" = "USA" '
        'AND "T1"."age" > 3',
    ),
    (
        "names in `quotes`",
        "SELECT count(name) AS n FROM singer GROUP BY country ORDER BY n",
        "SELECT count(`name`) AS `n` FROM `singer` GROUP BY `country` ORDER BY `n`",
    ),
    (
        "names in [brackets]",
        "SELECT max([home town]) FROM singer",
        "SELECT max([home town]) FROM [singer]",
    ),
    (
        "IN for =",
        "SELECT name FROM singer WHERE age=30 OR country = 'Peru' OR age > 40",
        "SELECT name FROM singer WHERE age IN (30) OR country IN ('Peru') OR age > 40",
    ),
    (
        "IN for =",
        "SELECT name FROM singer WHERE age + 1 = 31",
        None,
    ),
    (
        "sides swapped",
        "SELECT name FROM singer WHERE age >= 30 AND country ! = 'USA' AND age < -1 + 50",
        "SELECT name FROM singer WHERE 30 <= age AND 'USA' != country AND age < -1 + 50",
    ),
    (
        "BETWEEN split",
        "SELECT name FROM singer WHERE age BETWEEN 20 AND 30 AND country = 'USA'",
        "SELECT name FROM singer WHERE age >= 20 AND age <= 30 AND country = 'USA'",
    ),
    (
        "BETWEEN split",
        "SELECT name FROM singer WHERE age NOT BETWEEN 20 AND 30",
        None,
    ),
    (
        "BETWEEN split",
        "SELECT name FROM singer WHERE NOT age BETWEEN 20 AND 30",
        None,
    ),
    (
        "AND reordered",
        "SELECT name FROM singer WHERE age > 20 AND country = 'USA' OR age BETWEEN 1 AND 20 "
        "AND name = 'Eve'",
        "SELECT name FROM singer WHERE country = 'USA' AND age > 20 OR name = 'Eve' "
        "AND age BETWEEN 1 AND 20",
    ),
    (
        "upper case",
        "select count(distinct country) from singer where name like '%or%'",
        "SELECT COUNT(DISTINCT country) FROM singer WHERE name LIKE '%or%'",
    ),
    (
        "lower case",
        "SELECT Count(*) FROM singer WHERE age NOT IN (30)",
        "select count(*) from singer where age not in (30)",
    ),
    (
        "lower case",
        "select 1 from singer",
        None,
    ),
]


@pytest.mark.parametrize(("kind", "sql", "rewritten"), CASES)
def test_a_rewriting_gives_this_text_or_does_not_apply(
    schema: Schema, kind: str, sql: str, rewritten: str | None
) -> None:
    assert rewritings_of(sql, schema).get(kind) == rewritten


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, _, rewritten in CASES if rewritten} == REWRITINGS.keys()


def test_exists_and_in_are_rewritten_into_each_other(schema: Schema) -> None:
    sql = (
        "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song WHERE year = 2005)"
    )
    exists = rewritings_of(sql, schema)["EXISTS for IN"]
    back = rewritings_of(exists, schema)["IN for EXISTS"]
    assert rewritings_of(back, schema)["EXISTS for IN"].count("EXISTS") == 1


GOLDS = sorted({sql for _, sql, _ in CASES}) + [
    f"{JOIN} WHERE T2.year > 2000 GROUP BY T1.name HAVING count(*) >= 1 ORDER BY T1.name LIMIT 3",
    "SELECT country FROM singer WHERE age > 20 INTERSECT SELECT country FROM singer WHERE age < 35",
    "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song) "
    "EXCEPT SELECT name FROM singer WHERE age = 25",
    "SELECT title FROM song WHERE sales > (SELECT avg(sales) FROM song) "
    "AND year BETWEEN 1990 AND 2004;",
]


@pytest.mark.parametrize("sql", GOLDS)
def test_a_rewriting_returns_the_rows_of_its_query_and_is_paid(
    db: Path, schema: Schema, sql: str
) -> None:
    gold = run_query(db, sql)
    assert gold.is_ok, gold.message
    rows = rounded(gold.rows)
    turn = Turn("train:0:0", 0, "shows", "?", sql)
    ex, _ = answer_scores(sql, turn, schema, db, RewardConfig(), QueryConfig())
    for kind, text in rewritings_of(sql, schema).items():
        result = run_query(db, text)
        assert result.is_ok, (kind, text, result.message)
        others = rounded(result.rows)
        if "order by" in sql.lower():
            assert others == rows, (kind, text)
        assert Counter(others) == Counter(rows), (kind, text)
        if ex and not gold.is_empty:
            scores = answer_scores(text, turn, schema, db, RewardConfig(), QueryConfig())
            assert scores[0] == 1, (kind, text)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name FROM singer -- a comment",
        "SELECT name FROM singer; SELECT 1",
        "SELECT nothing FROM singer",
        "SELECT T9.name FROM singer AS T1",
        # An ambiguous column.
        "SELECT singer_id FROM singer JOIN song ON singer.singer_id = song.singer_id",
        "SELECT rowid FROM singer",
        "SELECT name FROM singer NATURAL JOIN song",
        "SELECT name FROM singer JOIN song USING (singer_id)",
        "SELECT CASE WHEN age > 1 THEN 2 END FROM singer",
        "SELECT name FROM singer UNION SELECT title FROM song ORDER BY name",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT name FROM (SELECT name FROM singer",
        "SELECT name FROM singer WHERE",
        "SELECT name FROM singer WHERE name = 'open",
        "SELECT" + " * FROM (SELECT" * 200 + " 1" + ")" * 200,
        "SELECT, FROM",
        "",
        "(",
        "PRAGMA table_info(singer)",
    ],
)
def test_a_query_that_is_not_read_with_certainty_has_no_rewritings(
    schema: Schema, sql: str
) -> None:
    with pytest.raises(Unreadable):
        read_sql(sql, schema)
    assert rewritings_of(sql, schema) == {}
