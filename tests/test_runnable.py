"""The text that SQLite runs for a query."""

from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.shows import SINGERS
from mtsql.sql.runnable import runnable
from mtsql.sql.sandbox import run_query


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
        # The official program leaves two blanks too.
        ("SELECT a FROM t WHERE a >  = 3", "SELECT a FROM t WHERE a >  = 3"),
        ("SELECT value, DISTINCT FROM t", "SELECT value, DISTINCT FROM t"),
        ("", ""),
    ],
)
def test_split_operators_are_joined_outside_of_quotes(written: str, run: str) -> None:
    assert runnable(written) == run
    assert runnable(run) == run


@pytest.mark.parametrize(
    ("sql", "row"),
    [
        ("SELECT name FROM singer WHERE age > = 41 AND name ! = '> ='", ("Bob",)),
        ("SELECT YEAR(CURDATE()) - age FROM singer WHERE id < = 1", (1990,)),
        ("SELECT count(*) FROM singer WHERE name = '> ='", (1,)),
    ],
)
def test_run_query_runs_the_runnable_text(tmp_path: Path, sql: str, row: tuple) -> None:
    db = make_database(tmp_path / "shows.sqlite", SINGERS)
    assert run_query(db, sql).rows == (row,)
