"""The official grammar, rule by rule: tokens, names, clauses, and what makes a text unreadable."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtsql.judge.sql_parser import (
    ALL_COLUMNS,
    ColumnName,
    ColumnUse,
    Condition,
    Expression,
    OrderBy,
    Query,
    SelectItem,
    parse_sql,
    tokenize,
)
from mtsql.sql.schema import Column, Schema, Table, load_schemas

SHOWS = Schema(
    "shows",
    (
        Table(
            "Singer",
            (Column("Singer_ID", "number"), Column("Name", "text"), Column("Age", "number")),
        ),
        Table(
            "Song",
            (Column("Song_ID", "number"), Column("Singer_ID", "number"), Column("Name", "text")),
        ),
    ),
)


def parsed(text: str) -> Query | None:
    return parse_sql(text, SHOWS)


def bare(table: str, name: str) -> Expression:
    return Expression("none", ColumnUse("none", ColumnName(table, name), False), None)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("SELECT A.b,c FROM t", ["select", "a.b", ",", "c", "from", "t"]),
        ("a >= 3 b > = 4 c ! = 5", ["a", ">=", "3", "b", ">=", "4", "c", "!=", "5"]),
        ("a>= 3", ["a", ">=", "3"]),
        ("a >=3", ["a", ">", "=3"]),
        ("a=3 b>3", ["a=3", "b", ">", "3"]),
        ("a <> 3 == 4", ["a", "<", ">", "3", "==", "4"]),
        ("a = 'It is' AND b = \"X\"", ["a", "=", '"It is"', "and", "b", "=", '"X"']),
        ("'O''Brien'", ["__val_1____val_3__"]),
        ('a ="x"', ["a", "=__val_1__"]),
        ("in (1,2 ,3)", ["in", "(", "1,2", ",3", ")"]),
        ("a:b,", ["a", ":", "b", ","]),
        ("count(*)--x [y] `z`", ["count", "(", "*", ")", "--", "x", "[", "y", "]", "`", "z", "`"]),
        ("a..b c...d -1 --- e", ["a", "..", "b", "c", "...", "d", "-1", "--", "-", "e"]),
        ("a > 3.", ["a", ">", "3", "."]),
        ("(a > 3.)", ["(", "a", ">", "3", ".", ")"]),
        ("a > 3. AND b", ["a", ">", "3", ".", "and", "b"]),
        ("a > 3. and b", ["a", ">", "3.", "and", "b"]),
        (
            "cannot T1.gonna wanna 'cannot'",
            ["can", "not", "t1.", "gon", "na", "wan", "na", '"cannot"'],
        ),
        ("« a » — b ‘c’", ["«", "a", "»", "—", "b", "‘", "c", "’"]),
        ("", []),
    ],
)
def test_tokens(text, tokens):
    assert tokenize(text) == tokens


def test_a_whole_query():
    query = parsed(
        "SELECT DISTINCT Age , count(*) FROM Singer AS T1 JOIN Song AS T2 ON T1.Singer_ID = T2.Singer_ID "
        "WHERE Age NOT BETWEEN 1 AND 2.5 OR T2.Name LIKE 'X%' GROUP BY Age HAVING max(Age) > 3 "
        "ORDER BY Age - Singer_ID ASC , Name DESC LIMIT 3 EXCEPT SELECT * FROM Song ;"
    )
    age = ColumnName("singer", "age")
    nothing = Query(False, (), (), (), (), (), (), None, False, None, None, None)
    assert query == Query(
        is_distinct=True,
        select=(
            SelectItem("none", Expression("none", ColumnUse("none", age, False), None)),
            SelectItem("count", Expression("none", ColumnUse("none", ALL_COLUMNS, False), None)),
        ),
        tables=("singer", "song"),
        on=(
            Condition(
                False,
                "=",
                bare("singer", "singer_id"),
                ColumnUse("none", ColumnName("song", "singer_id"), False),
                None,
            ),
        ),
        where=(
            Condition(True, "between", bare("singer", "age"), 1.0, 2.5),
            "or",
            Condition(False, "like", bare("song", "name"), '"X%"', None),
        ),
        group_by=(ColumnUse("none", age, False),),
        having=(
            Condition(
                False, ">", Expression("none", ColumnUse("max", age, False), None), 3.0, None
            ),
        ),
        order_by=OrderBy(
            "desc",
            (
                Expression(
                    "-",
                    ColumnUse("none", age, False),
                    ColumnUse("none", ColumnName("singer", "singer_id"), False),
                ),
                bare("singer", "name"),
            ),
        ),
        has_limit=True,
        intersect=None,
        union=None,
        except_=dataclasses.replace(
            nothing,
            select=(
                SelectItem("none", Expression("none", ColumnUse("none", ALL_COLUMNS, False), None)),
            ),
            tables=("song",),
        ),
    )


# One text a line; each breaks one rule.
UNPARSEABLE = """
SELECT count(*) AS n FROM Singer
SELECT count(1) FROM Singer
SELECT max(Age) - min(Age) FROM Singer
SELECT Age * 2 FROM Singer
SELECT T1.* FROM Singer AS T1
SELECT T1. Name FROM Singer AS T1
SELECT Name
SELECT Name FROM Singer T1
SELECT Name FROM Singer , Song
SELECT Name FROM Singer LEFT JOIN Song
SELECT Name FROM Nowhere
SELECT Shoe FROM Singer
SELECT T9.Name FROM Singer
SELECT T1.Song_ID FROM Singer AS T1
SELECT Song.Name FROM Singer AS Song
SELECT Name FROM Singer AS
SELECT Name FROM (SELECT Name FROM Singer)
SELECT count(*) FROM (SELECT Name FROM Singer) AS T1
SELECT Name FROM Singer HAVING Age > 3
SELECT Name FROM Singer WHERE Age <> 3
SELECT Name FROM Singer WHERE Age=3
SELECT Name FROM Singer WHERE Name = "O'Brien"
SELECT Name FROM Singer WHERE (Age > 3 AND Age < 5)
SELECT Name FROM Singer WHERE NOT Age > 3
SELECT Name FROM Singer WHERE Age IS NULL
SELECT Name FROM Singer WHERE EXISTS (SELECT Name FROM Song)
SELECT Name FROM Singer WHERE Name IN ('a', 'b')
SELECT Name FROM Singer WHERE Age > avg(Age)
SELECT Name FROM Singer WHERE Age > (Singer_ID)
SELECT Name FROM Singer WHERE Age > GROUP BY Age
SELECT Name FROM Singer GROUP Age
SELECT Name FROM Singer ORDER BY 1
SELECT Name FROM Singer LIMIT
SELECT Name FROM Singer UNION ALL SELECT Name FROM Song
(SELECT Name FROM Singer
I do not know
"""


@pytest.mark.parametrize("text", [*UNPARSEABLE.strip().split("\n"), "", "("])
def test_unparseable(text):
    assert parsed(text) is None


# Quirks: the text on the left is read as the text on the right.
SAME = """
SELECT Name Age FROM Singer | SELECT Name , Age FROM Singer
SELECT Name FROM Singer Song | SELECT Name FROM Singer JOIN Song
SELECT Name FROM Singer ORDER BY Age WHERE Age > 3 | SELECT Name FROM Singer ORDER BY Age
SELECT Name FROM Singer ORDER BY Age COLLATE x LIMIT 3 | SELECT Name FROM Singer ORDER BY Age
SELECT Name FROM Singer LIMIT 3 OFFSET 5 | SELECT Name FROM Singer LIMIT 1
SELECT Name FROM Singer ) as you like | SELECT Name FROM Singer
SELECT Name FROM Singer WHERE Age > Singer_ID OR Age = 3 | SELECT Name FROM Singer WHERE Age > Singer_ID
SELECT Name FROM Singer WHERE Age > Age + 1 AND Age < 5 | SELECT Name FROM Singer WHERE Age > Age AND Age < 5
SELECT Name FROM Singer WHERE Name IN ('a') | SELECT Name FROM Singer WHERE Name IN 'a'
SELECT Name FROM Singer ORDER BY Age DESC , Name ASC | SELECT Name FROM Singer ORDER BY Age , Name
SELECT none(Name) FROM Singer ORDER BY none(Age) | SELECT Name FROM Singer ORDER BY Age
SELECT T1.Age FROM Song AS T1 JOIN Singer AS T1 | SELECT Singer.Age FROM Singer JOIN Singer
(SELECT Age FROM Singer ;) ; UNION SELECT * FROM Song | SELECT Age FROM Singer UNION SELECT * FROM Song
SELECT Age FROM (Singer) (JOIN Song AS T2 ON T2.Name = 3) | SELECT Age FROM Singer JOIN Song ON Song.Name = 3
SELECT (Age) FROM Singer GROUP BY (Age) | SELECT Age FROM Singer GROUP BY Age
"""


@pytest.mark.parametrize("pair", SAME.strip().split("\n"))
def test_read_as(pair):
    left, right = map(parsed, pair.split(" | "))
    if (
        "FROM Song AS T1 JOIN" in pair
    ):  # the tables stay as they are written; the alias means the last one
        left, right = left.select, right.select
    assert left == right is not None


def test_unqualified_names_belong_to_the_first_table_that_has_them():
    assert parsed("SELECT Name FROM Song JOIN Singer").select[0].expression == bare("song", "name")
    assert parsed("SELECT Age FROM Song JOIN Singer").select[0].expression == bare("singer", "age")


def test_a_missing_connector_leaves_two_conditions_side_by_side():
    assert len(parsed("SELECT Name FROM Singer WHERE Age > 3 Age < 5").where) == 2


def test_set_operators_lean_right():
    query = parsed(
        "SELECT Name FROM Singer UNION SELECT Name FROM Song EXCEPT SELECT Age FROM Singer"
    )
    assert query.except_ is None
    assert query.union.except_.select[0].expression == bare("singer", "age")


def test_deep_nesting_is_unparseable_and_not_an_overflow():
    for depth, is_read in ((40, True), (60, False), (5000, False)):
        text = "SELECT count(*) FROM ( " * depth + "SELECT Name FROM Singer" + " )" * depth
        assert (parsed(text) is not None) == is_read
        assert (parsed(" UNION ".join(["SELECT Name FROM Singer"] * depth)) is not None) == is_read


WORDS = "select from where ( ) , * Name Age Singer Song = 'a' 3 and order group by join on as union ;".split()


@given(st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_is_a_query_or_none(text):
    assert isinstance(parsed(text), Query | None)


def test_official_examples_parse_or_not(shared):
    schemas = load_schemas(shared / "data" / "tables.json")
    for line in (shared / "conformance" / "metrics_examples.jsonl").read_text().splitlines():
        pair = json.loads(line)
        schema = schemas[pair["db_id"]]
        assert parse_sql(pair["gold"], schema) is not None
        assert (parse_sql(pair["pred"].replace("value", "1"), schema) is not None) == pair[
            "parsed"
        ], pair["id"]
