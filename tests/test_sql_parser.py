"""The official grammar, rule by rule: names, clauses, and what makes a text unreadable."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.official import conformance_pairs
from mtsql.judge.execution_match import official_prediction
from mtsql.judge.sql_parser import parse_sql
from mtsql.judge.sql_query import (
    ALL_COLUMNS,
    ColumnName,
    ColumnUse,
    Condition,
    Expression,
    OrderBy,
    Query,
    SelectItem,
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


def use(table: str, name: str) -> ColumnUse:
    return ColumnUse("none", ColumnName(table, name), False)


def bare(table: str, name: str) -> Expression:
    return Expression("none", use(table, name), None)


def test_each_clause_of_a_query_is_read() -> None:
    query = parsed(
        "SELECT DISTINCT Age , count(*) "
        "FROM Singer AS T1 JOIN Song AS T2 ON T1.Singer_ID = T2.Singer_ID "
        "WHERE Age NOT BETWEEN 1 AND 2.5 OR T2.Name LIKE 'X%' GROUP BY Age HAVING max(Age) > 3 "
        "ORDER BY Age - Singer_ID ASC , Name DESC LIMIT 3 EXCEPT SELECT * FROM Song ;"
    )
    age = use("singer", "age")
    star = Expression("none", ColumnUse("none", ALL_COLUMNS, False), None)
    max_age = Expression("none", ColumnUse("max", age.column, False), None)
    nothing = Query(False, (), (), (), (), (), (), None, False, None, None, None)
    assert query == Query(
        is_distinct=True,
        select=(
            SelectItem("none", Expression("none", age, None)),
            SelectItem("count", star),
        ),
        tables=("singer", "song"),
        on=(Condition(False, "=", bare("singer", "singer_id"), use("song", "singer_id"), None),),
        where=(
            Condition(True, "between", bare("singer", "age"), 1.0, 2.5),
            "or",
            Condition(False, "like", bare("song", "name"), '"X%"', None),
        ),
        group_by=(age,),
        having=(Condition(False, ">", max_age, 3.0, None),),
        order_by=OrderBy(
            "desc", (Expression("-", age, use("singer", "singer_id")), bare("singer", "name"))
        ),
        has_limit=True,
        intersect=None,
        union=None,
        except_=dataclasses.replace(nothing, select=(SelectItem("none", star),), tables=("song",)),
    )


# Each line breaks one rule.
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
def test_a_text_outside_the_grammar_gives_none(text: str) -> None:
    assert parsed(text) is None


# Quirks: each text is read as the indented text below it.
SAME = """
SELECT Name Age FROM Singer
    SELECT Name , Age FROM Singer
SELECT Name FROM Singer Song
    SELECT Name FROM Singer JOIN Song
SELECT Name FROM Singer ORDER BY Age WHERE Age > 3
    SELECT Name FROM Singer ORDER BY Age
SELECT Name FROM Singer ORDER BY Age COLLATE x LIMIT 3
    SELECT Name FROM Singer ORDER BY Age
SELECT Name FROM Singer LIMIT 3 OFFSET 5
    SELECT Name FROM Singer LIMIT 1
SELECT Name FROM Singer ) as you like
    SELECT Name FROM Singer
SELECT Name FROM Singer WHERE Age > Singer_ID OR Age = 3
    SELECT Name FROM Singer WHERE Age > Singer_ID
SELECT Name FROM Singer WHERE Age > Age + 1 AND Age < 5
    SELECT Name FROM Singer WHERE Age > Age AND Age < 5
SELECT Name FROM Singer WHERE Name IN ('a')
    SELECT Name FROM Singer WHERE Name IN 'a'
SELECT Name FROM Singer ORDER BY Age DESC , Name ASC
    SELECT Name FROM Singer ORDER BY Age , Name
SELECT none(Name) FROM Singer ORDER BY none(Age)
    SELECT Name FROM Singer ORDER BY Age
(SELECT Age FROM Singer ;) ; UNION SELECT * FROM Song
    SELECT Age FROM Singer UNION SELECT * FROM Song
SELECT Age FROM (Singer) (JOIN Song AS T2 ON T2.Name = 3)
    SELECT Age FROM Singer JOIN Song ON Song.Name = 3
SELECT (Age) FROM Singer GROUP BY (Age)
    SELECT Age FROM Singer GROUP BY Age
"""
SAME_LINES = SAME.strip().split("\n")
SAME_PAIRS = list(zip(SAME_LINES[::2], SAME_LINES[1::2], strict=True))


@pytest.mark.parametrize(("text", "other"), SAME_PAIRS)
def test_a_quirk_is_read_as_the_regular_text(text: str, other: str) -> None:
    assert parsed(text) == parsed(other) is not None


def test_an_alias_that_is_defined_twice_means_the_last_table() -> None:
    query = parsed("SELECT T1.Age FROM Song AS T1 JOIN Singer AS T1")
    assert query.select[0].expression == bare("singer", "age")
    assert query.tables == ("song", "singer")


def test_an_unqualified_name_belongs_to_the_first_table_that_has_it() -> None:
    assert parsed("SELECT Name FROM Song JOIN Singer").select[0].expression == bare("song", "name")
    assert parsed("SELECT Age FROM Song JOIN Singer").select[0].expression == bare("singer", "age")


def test_a_missing_connector_leaves_two_conditions_side_by_side() -> None:
    assert len(parsed("SELECT Name FROM Singer WHERE Age > 3 Age < 5").where) == 2


def test_a_set_operator_takes_all_that_follows_as_its_arm() -> None:
    query = parsed(
        "SELECT Name FROM Singer UNION SELECT Name FROM Song EXCEPT SELECT Age FROM Singer"
    )
    assert query.except_ is None
    assert query.union.except_.select[0].expression == bare("singer", "age")


@pytest.mark.parametrize(("depth", "is_read"), [(40, True), (60, False), (5000, False)])
def test_deep_nesting_is_unparseable_and_overflows_no_stack(depth: int, is_read: bool) -> None:
    nested = "SELECT count(*) FROM ( " * depth + "SELECT Name FROM Singer" + " )" * depth
    chained = " UNION ".join(["SELECT Name FROM Singer"] * depth)
    assert (parsed(nested) is not None) == is_read
    assert (parsed(chained) is not None) == is_read


WORDS = (
    "select from where ( ) , * Name Age Singer Song = 'a' 3 and order group by join on as union ;"
).split()


@given(st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_gives_a_query_or_none(text: str) -> None:
    assert isinstance(parsed(text), Query | None)


def test_a_text_parses_if_the_official_program_can_read_it(shared: Path) -> None:
    schemas = load_schemas(shared / "data" / "tables.json")
    for pair in conformance_pairs(shared):
        schema = schemas[pair["db_id"]]
        assert parse_sql(pair["gold"], schema) is not None
        is_parsed = parse_sql(official_prediction(pair["pred"]), schema) is not None
        assert is_parsed == pair["parsed"], pair["id"]
