"""Altered copies keep keys and everything else that a correct answer may rely on, plant the gold's
literals, and are the same each time."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.shows import SHOWS, USA
from helpers.unusual import CODES, NUM_SHOPS, NUMBER_LIKE, make_unusual
from mtsql.judge.altered_copies import altered
from mtsql.judge.content import TableRows, memory_copy
from mtsql.judge.guard import Evidence, evidence, trial_of
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Database, Schema, schema_from_sqlite

LIMITS = QueryConfig()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("altered") / "shows.sqlite", SHOWS)


@pytest.fixture(scope="module")
def schema(db: Path) -> Schema:
    return schema_from_sqlite(db)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Database:
    path = make_unusual(tmp_path_factory.mktemp("altered") / "shops.sqlite")
    return Database(schema_from_sqlite(path), path)


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


def test_new_rows_refer_to_rows_and_repeat_no_unique_value(unusual: Database) -> None:
    new_codes = set()
    new_ids = set()
    for seed in range(20):
        copy = memory_copy(altered(unusual.path, "SELECT name FROM shop", unusual.schema, seed))

        def rows(sql: str, copy=copy) -> tuple:
            return run_query(copy, sql).rows

        lost = "place IS NOT NULL AND place NOT IN (SELECT code FROM place)"
        assert rows(f"SELECT count(*) FROM shop WHERE {lost}") == ((0,),)
        for name in ("id", "name"):
            unique = f"SELECT count(*) = count(DISTINCT {name}), count(*) > 3 FROM shop"
            assert rows(unique) == ((1, 1),)
        assert rows("SELECT count(*) FROM shop WHERE kind NOT IN ('a', 'b')") == ((0,),)
        new_codes |= {code for (code,) in rows("SELECT place FROM shop")} - set(CODES)
        new_ids |= {key for (key,) in rows("SELECT id FROM shop")} - set(range(1, NUM_SHOPS + 1))
    assert len(new_codes) > 5
    assert len(new_ids) > 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        # Views.
        (
            "SELECT name FROM big WHERE grp = 3",
            "SELECT big.name FROM big WHERE NOT grp <> 3 AND grp = 3",
        ),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM big WHERE grp = 3"),
        # Collations of columns, of keys too.
        (
            "SELECT id FROM shop WHERE name = 'Shop 3'",
            "SELECT id FROM shop WHERE name IN ('sHOP 3', 'SHOP 3')",
        ),
        (
            "SELECT name FROM place WHERE code = 'c3'",
            "SELECT name FROM place WHERE code IN ('C3', 'C3')",
        ),
        # A generated column, the row id and an index.
        ("SELECT id FROM shop WHERE twice = 6", "SELECT id FROM shop WHERE grp * 2 = 6"),
        ("SELECT name FROM shop WHERE id = 3", "SELECT name FROM shop WHERE _rowid_ + 0 = 3"),
        (
            "SELECT name FROM shop WHERE grp = 3",
            "SELECT name FROM shop INDEXED BY by_group WHERE grp = 3",
        ),
        # Types.
        (
            "SELECT name FROM shop WHERE zip = '02101'",
            "SELECT name FROM shop WHERE zip LIKE '02101'",
        ),
        (
            "SELECT count(*) FROM strict_one WHERE a = 3",
            "SELECT count(b) FROM strict_one WHERE a + 0 = 3",
        ),
        # A CHECK allows two values.
        ("SELECT name FROM shop WHERE kind = 'a'", "SELECT name FROM shop WHERE kind <> 'b'"),
        # Dates stay dates.
        (
            "SELECT name FROM shop WHERE opened LIKE '2001%'",
            "SELECT name FROM shop WHERE strftime('%Y', opened) = '2001'",
        ),
        # Each reference finds its row.
        (
            "SELECT T1.name FROM shop AS T1 JOIN place AS T2 ON T1.place = T2.code",
            "SELECT name FROM shop",
        ),
        *[
            (
                f"SELECT count(*) FROM fact WHERE {name} = '{value}'",
                f"SELECT count(*) FROM fact WHERE {name} || '' = '{value}'",
            )
            for name in "kv"
            for value in NUMBER_LIKE
        ],
    ],
)
def test_copies_keep_what_a_correct_answer_may_rely_on(
    unusual: Database, gold: str, answer: str
) -> None:
    assert trial_of(gold, unusual.schema, unusual.path, LIMITS).is_telling
    assert evidence(answer, gold, unusual.schema, unusual.path, LIMITS) is Evidence.AGREES


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM shop", "SELECT name FROM shop LIMIT 120"),
        ("SELECT name FROM place", "SELECT name FROM place LIMIT 8"),
        (
            "SELECT name FROM shop WHERE grp = 3 AND kind = 'a'",
            "SELECT name FROM shop WHERE grp = 3 AND kind = 'a' AND id > 0 LIMIT 17",
        ),
        (
            "SELECT name FROM shop WHERE zip = '02101' AND grp = 1",
            "SELECT name FROM shop WHERE zip = '02101'",
        ),
        (
            "SELECT count(*) FROM shop WHERE place = 'c3'",
            "SELECT count(DISTINCT grp) FROM shop WHERE place = 'c3'",
        ),
    ],
)
def test_copies_have_more_rows_and_rows_that_just_miss_a_condition(
    unusual: Database, gold: str, answer: str
) -> None:
    """Each answer agrees with its gold on the database itself."""
    assert evidence(answer, gold, unusual.schema, unusual.path, LIMITS) is Evidence.DIFFERS


def test_a_wide_database_is_copied_in_bounded_time(tmp_path: Path) -> None:
    """It took 11 s of processor time before columns were summed up once, and takes less than a
    second now."""
    path = tmp_path / "wide.sqlite"
    columns = ", ".join(f"c{i} INT" for i in range(1200))
    rows = [(i, *((i * 7 + j) % 51 for j in range(1200))) for i in range(600)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE w (id INTEGER PRIMARY KEY, {columns})")
        connection.executemany(f"INSERT INTO w VALUES ({', '.join('?' * 1201)})", rows)
        for k in range(20):
            names = ", ".join(f"c{k}_{i} INT" for i in range(20))
            connection.execute(f"CREATE TABLE t{k} ({names})")
        connection.execute(f"CREATE TABLE spam (a INT, b TEXT DEFAULT '{'check(' * 3000}')")
    schema = schema_from_sqlite(path)
    start = time.process_time()
    assert trial_of("SELECT count(*) FROM w WHERE c5 > 25", schema, path, LIMITS).is_telling
    assert time.process_time() - start < 8
