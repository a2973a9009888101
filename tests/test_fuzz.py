"""Random and mutated SQL for everything that reads SQL. The result is always a verdict, never an
exception."""

import random
import sqlite3
import string
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.databases import make_database, snapshot
from mtsql.judge.clause_f1 import clause_f1
from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.judge.guard import Evidence, evidence
from mtsql.judge.hardness import hardness
from mtsql.judge.sql_parser import parse_sql
from mtsql.sql.sandbox import QueryConfig, QueryResult, run_query
from mtsql.sql.schema import schema_from_sqlite

LIMITS = QueryConfig(timeout_secs=0.3, max_rows=2000)
GOLDS = [  # within the official grammar
    "SELECT count(*) FROM singer",
    "SELECT name, age FROM singer WHERE age > 20 ORDER BY age DESC LIMIT 3",
    "SELECT DISTINCT country FROM singer WHERE age BETWEEN 20 AND 40 AND name LIKE '%a%'",
    "SELECT country, count(*) FROM singer GROUP BY country HAVING count(*) >= 2",
    "SELECT T2.name, title FROM concert AS T1 JOIN singer AS T2 ON T1.singer_id = T2.singer_id "
    "WHERE age = 9",
    "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM concert)",
    "SELECT country FROM singer WHERE age > 40 INTERSECT SELECT country FROM singer WHERE age < 30",
    "SELECT name FROM singer EXCEPT "
    "SELECT title FROM concert AS a JOIN singer AS b ON a.singer_id = b.age",
    'SELECT name FROM singer WHERE age = (SELECT max(age) FROM singer) OR country != "France"',
]
QUERIES = GOLDS + [
    "SELECT avg(age), min(age), max(age) - min(age) FROM singer WHERE country = 'Peru' "
    "UNION SELECT 1, 2, 3",
    "SELECT T1.name FROM singer AS T1, concert AS T2 WHERE T1.singer_id = T2.singer_id "
    "GROUP BY T1.name ORDER BY sum(T2.seats) DESC, T1.name ASC LIMIT 1",
    "SELECT sum(x.n) FROM (SELECT count(*) AS n FROM concert GROUP BY year) AS x",
]
WORDS = sorted(
    {word for query in QUERIES for word in query.replace("(", " ( ").replace(")", " ) ").split()}
)
WORDS += "| |\n|\0|'|\"|`|[|;|--|/*|,|.|> =|! =|< =|-|*|%|\ud800".split("|")
WORDS += "NULL|is|WITH|RECURSIVE|CASE WHEN|END|VALUES|PRAGMA|DROP TABLE|ATTACH".split("|")
WORDS += "YEAR(CURDATE())|value|t1.|.name|T9.name|é|\U0001f4a3|1e999|x'00'".split("|")
WORDS += ["9" * 30, "( " * 150, ") " * 150, "NOT " * 80]
SHOWS = """
    CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
    CREATE TABLE concert (concert_id INTEGER PRIMARY KEY, title TEXT, year INTEGER, seats INTEGER,
                          singer_id INTEGER REFERENCES singer (singer_id));
"""


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    """A database of singers and concerts. Its folder must stay the same, byte for byte."""
    path = make_database(tmp_path_factory.mktemp("fuzz") / "shows.sqlite", SHOWS)
    with closing(sqlite3.connect(path)) as connection, connection:
        for i in range(20):
            singer = (i, f"name {i % 7}", ["Peru", "France", None][i % 3], 15 + 2 * i)
            connection.execute("INSERT INTO singer VALUES (?, ?, ?, ?)", singer)
            concert = (i, f"t{i}", 2010 + i % 6, 100 * i, i % 9)
            connection.execute("INSERT INTO concert VALUES (?, ?, ?, ?, ?)", concert)
    before = snapshot(path.parent)
    yield path
    assert snapshot(path.parent) == before


@pytest.fixture(scope="module")
def schema(db):
    return schema_from_sqlite(db)


def mutate(generator: random.Random) -> str:
    """A query with a few words or a character changed, or two queries joined in their middle."""
    words = generator.choice(QUERIES).split(" ")
    for _ in range(generator.randint(0, 6)):
        at = generator.randrange(len(words) + 1)
        kind = generator.randrange(5)
        if kind == 0:
            words.insert(at, generator.choice(WORDS))
        elif kind == 1:
            words[at : at + 1] = [generator.choice(WORDS)]
        elif kind == 2:
            del words[at : at + generator.randint(1, 4)]
        elif kind == 3:
            words[at:] = generator.choice(QUERIES).split(" ")[generator.randrange(8) :]
        else:
            other = generator.randrange(len(words) + 1)
            words[at:at] = words[other : other + 4]
    text = " ".join(words)
    if generator.random() < 0.2 and text:
        at = generator.randrange(len(text))
        char = generator.choice(string.printable + "é\U0001f4a3\0\ud800")
        text = text[:at] + char + text[at + 1 :]
    return text


def nested(generator: random.Random) -> str:
    """One construct inside itself, or after itself, up to 3,000 times."""
    times = generator.choice((1, 2, 10, 50, 400, 3000))
    text = generator.choice(
        [
            "SELECT " + "(" * times + "1" + ")" * times,
            "SELECT name FROM singer WHERE age IN (" * times + "1" + ")" * times,
            "SELECT * FROM (" * times + "SELECT 1" + ")" * times,
            " UNION ".join([generator.choice(QUERIES)] * times),
            "SELECT name FROM singer WHERE " + " AND ".join(["age > 1"] * times),
            "SELECT name FROM singer WHERE " + "NOT " * times + "age > 1",
            "SELECT " + ", ".join(["count(*)"] * times) + " FROM singer",
            "SELECT count(*) FROM singer AS a" + " JOIN concert AS b" * times,
            "SELECT " + "max(" * times + "age" + ")" * times + " FROM singer",
            "SELECT '" * times,
            "SELECT age" + " - age" * times + " FROM singer",
            "SELECT " + "CASE WHEN 1 THEN " * times + "1" + " END" * times,
            "SELECT " + ", ".join(["1"] * times) + " FROM singer, concert",
            ";".join(["SELECT 1"] * times),
        ]
    )
    return generator.choice((text, text + ";", text.replace("SELECT", "SELECT DISTINCT")))


sql_texts = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join),
    st.randoms(use_true_random=False).map(mutate),
    st.randoms(use_true_random=False).map(nested),
)
quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
long = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))


def check_database(db, sql):
    result = run_query(db, sql, LIMITS)
    assert isinstance(result, QueryResult)
    assert result.is_ok == (result.message == "") and (result.is_ok or result.rows == ())
    assert result.secs < LIMITS.timeout_secs + 1
    if result.is_ok:
        assert all(len(row) == len(result.columns) for row in result.rows)


def check_metrics(db, schema, pred, gold):
    assert parse_sql(pred, schema) == parse_sql(pred, schema)
    assert hardness(pred, schema) in (None, "easy", "medium", "hard", "extra")
    assert exact_match(pred, gold, schema) in (True, False)
    assert 0 <= clause_f1(pred, gold, schema) <= 1
    assert execution_match(pred, gold, db, limits=LIMITS) in (True, False)
    assert execution_match(gold, pred, db, limits=LIMITS) in (True, False)
    verdict = exact_match(gold, pred, schema)
    assert verdict in (True, False)
    if parse_sql(pred, schema) is None:  # here as the gold query, which can match nothing then
        assert not verdict


def check_guard(db, schema, pred, gold):
    assert isinstance(evidence(pred, gold, schema, db, LIMITS), Evidence)
    assert evidence(gold, gold, schema, db, LIMITS) is Evidence.AGREES


@quick
@given(sql=sql_texts)
def test_database_gives_a_verdict(db, sql):
    check_database(db, sql)


@pytest.mark.slow
@long
@given(sql=sql_texts)
def test_database_gives_a_verdict_at_length(db, sql):
    check_database(db, sql)


@quick
@given(pred=sql_texts, gold=st.sampled_from(GOLDS))
def test_metrics_give_a_verdict(db, schema, pred, gold):
    check_metrics(db, schema, pred, gold)


@pytest.mark.slow
@long
@given(pred=sql_texts, gold=st.sampled_from(GOLDS))
def test_metrics_give_a_verdict_at_length(db, schema, pred, gold):
    check_metrics(db, schema, pred, gold)


@quick
@given(pred=sql_texts, gold=st.one_of(st.sampled_from(GOLDS), sql_texts))
def test_guard_gives_a_verdict(db, schema, pred, gold):
    check_guard(db, schema, pred, gold)


@pytest.mark.slow
@settings(long, max_examples=3000)
@given(pred=sql_texts, gold=st.one_of(st.sampled_from(GOLDS), sql_texts))
def test_guard_gives_a_verdict_at_length(db, schema, pred, gold):
    check_guard(db, schema, pred, gold)


@pytest.mark.parametrize("gold", GOLDS)
def test_a_query_matches_itself(db, schema, gold):
    assert parse_sql(gold, schema) and hardness(gold, schema)
    assert exact_match(gold, gold, schema) and execution_match(gold, gold, db)
    assert clause_f1(gold, gold, schema) == 1
