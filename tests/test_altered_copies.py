"""Altered copies keep keys whole, plant the gold's literals, and are the same each time."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from helpers.shows import SHOWS, USA, make_database
from mtsql.judge.altered_copies import altered
from mtsql.judge.content import TableRows
from mtsql.sql.schema import Schema, schema_from_sqlite


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("altered") / "shows.sqlite", SHOWS)


@pytest.fixture(scope="module")
def schema(db: Path) -> Schema:
    return schema_from_sqlite(db)


def column(table: TableRows, name: str) -> list:
    place = table.columns.index(name)
    return [row[place] for row in table.rows]


def test_copies_keep_keys_and_unique_values(db: Path, schema: Schema) -> None:
    for seed in range(12):
        singer, song = altered(db, USA, schema, seed).tables
        ids = column(singer, "singer_id")
        names = column(singer, "name")
        assert len(set(ids)) == len(ids) > 0
        assert set(ids) & {1, 2, 3, 4, 5}
        assert len(set(names)) == len(names)
        assert song.rows
        assert set(column(song, "singer_id")) <= set(ids)


def test_a_copy_depends_on_its_arguments_only(db: Path, schema: Schema) -> None:
    for seed in range(12):
        assert altered(db, USA, schema, seed) == altered(db, USA, schema, seed)
    assert altered(db, USA, schema, 0) != altered(db, USA, schema, 1)


def test_planted_literals_break_no_key_and_repeat_no_unique_value(db: Path, schema: Schema) -> None:
    gold = "SELECT * FROM song JOIN singer ON song.singer_id = singer.singer_id "
    gold += "WHERE song.singer_id = 77 AND name = 'Zoe'"
    all_names = []
    for seed in range(30):
        singer, song = altered(db, gold, schema, seed).tables
        ids = set(column(singer, "singer_id"))
        names = column(singer, "name")
        assert set(column(song, "singer_id")) <= ids
        assert 77 not in ids
        assert len(set(names)) == len(names)
        all_names += names
    assert "Zoe" in all_names


def test_some_rows_meet_a_literal_and_others_just_miss_it(db: Path, schema: Schema) -> None:
    gold = "SELECT name FROM singer "
    gold += "WHERE country LIKE '%Chile%' OR age BETWEEN 90 AND 95 AND sales > 1e300"
    rows = [row for seed in range(60) for row in altered(db, gold, schema, seed).tables[0].rows]
    countries = {row[2] for row in rows}
    assert {"Chile", "xChilex", "USA"} < countries
    assert len(countries) > 20  # among them those that just miss the pattern
    assert {89, 90, 91, 94, 95, 96} <= {row[3] for row in rows}
    assert 1e300 in {row[4] for row in rows}


def test_big_tables_are_sampled_with_the_rows_they_refer_to(tmp_path: Path) -> None:
    path = tmp_path / "big.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY, x TEXT)")
        # The references are texts, and the keys are numbers.
        connection.execute("CREATE TABLE b (id INTEGER PRIMARY KEY, a_id TEXT REFERENCES a (id))")
        numbers = range(3000)
        connection.executemany("INSERT INTO a VALUES (?, ?)", [(i, f"x{i}") for i in numbers])
        references = [(i, str(i * 7 % 3000)) for i in numbers]
        connection.executemany("INSERT INTO b VALUES (?, ?)", references)
    schema = schema_from_sqlite(path)
    a, b = altered(path, "SELECT id FROM a WHERE x = 'x1234'", schema, 0).tables
    assert 50 < len(b.rows) <= 225
    assert 50 < len(a.rows) <= 450
    assert set(column(b, "a_id")) <= {str(key) for key in column(a, "id")}
    gold = "SELECT x FROM a WHERE id = 1234"
    copies = [altered(path, gold, schema, seed).tables[0] for seed in range(3)]
    assert any(1234 in column(table, "id") for table in copies)
