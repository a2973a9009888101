"""Altered copies: they have the file's own tables, keys, indexes and views, and values that the file does not have."""

import random
import sqlite3
from contextlib import closing

import pytest

from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.content import content_of, memory_copy
from mtsql.sql.dialogues import Turn
from mtsql.sql.guard import Evidence, evidence, trial_of
from mtsql.sql.new_values import new_rows, new_value
from mtsql.sql.sandbox import Mirror, QueryConfig, run_query
from mtsql.sql.schema import schema_from_sqlite
from mtsql.sql.variants import altered

LIMITS = QueryConfig()
SCRIPT = """
    CREATE TABLE place (code TEXT PRIMARY KEY COLLATE NOCASE, name TEXT) WITHOUT ROWID;
    CREATE TABLE shop (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT COLLATE NOCASE, place TEXT REFERENCES place,
                       zip TEXT, grp INT, twice INT AS (grp * 2), opened TEXT, kind TEXT CHECK (kind IN ('a', 'b')));
    CREATE INDEX by_group ON shop (grp);
    CREATE UNIQUE INDEX by_name ON shop (name);
    CREATE VIEW big AS SELECT name, grp, zip FROM shop WHERE grp > 1;
    CREATE TABLE strict_one (a INT, b TEXT) STRICT;
    CREATE TABLE fact (k TEXT, v);
"""


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    path = tmp_path_factory.mktemp("copies") / "shops.sqlite"
    rng = random.Random(0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCRIPT)
        codes = [f"c{i}" for i in range(8)]
        connection.executemany("INSERT INTO place VALUES (?, ?)", [(c, f"Place {c}") for c in codes])
        connection.executemany(
            "INSERT INTO shop (name, place, zip, grp, opened, kind) VALUES (?, ?, ?, ?, ?, ?)",
            [(f"Shop {i}", rng.choice(codes), f"{2100 + i % 40:05}", i % 7, f"20{i % 20:02}-0{1 + i % 9}-11", "ab"[i % 2])
             for i in range(120)],
        )  # fmt: skip
        connection.executemany("INSERT INTO strict_one VALUES (?, ?)", [(i % 9, f"t{i % 5}") for i in range(40)])
        values = ["1e5", "1_000", "Infinity", " 42", "02139", "nan"]
        connection.executemany("INSERT INTO fact VALUES (?, ?)", [(values[i % 6], values[i % 6]) for i in range(60)])
    return path


@pytest.fixture(scope="module")
def schema(db):
    return schema_from_sqlite(db)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM big WHERE grp = 3", "SELECT big.name FROM big WHERE NOT grp <> 3 AND grp = 3"),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM big WHERE grp = 3"),
        ("SELECT id FROM shop WHERE name = 'Shop 3'", "SELECT id FROM shop WHERE name IN ('sHOP 3', 'SHOP 3')"),
        ("SELECT name FROM place WHERE code = 'c3'", "SELECT name FROM place WHERE code IN ('C3', 'C3')"),
        ("SELECT id FROM shop WHERE twice = 6", "SELECT id FROM shop WHERE grp * 2 = 6"),
        ("SELECT name FROM shop WHERE id = 3", "SELECT name FROM shop WHERE _rowid_ + 0 = 3"),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM shop INDEXED BY by_group WHERE grp = 3"),
        ("SELECT name FROM shop WHERE zip = '02101'", "SELECT name FROM shop WHERE zip LIKE '02101'"),
        ("SELECT count(*) FROM strict_one WHERE a = 3", "SELECT count(b) FROM strict_one WHERE a + 0 = 3"),
        ("SELECT name FROM shop WHERE kind = 'a'", "SELECT name FROM shop WHERE kind <> 'b'"),  # its CHECK says so
        ("SELECT name FROM shop WHERE opened LIKE '2001%'", "SELECT name FROM shop WHERE strftime('%Y', opened) = '2001'"),
        ("SELECT T1.name FROM shop AS T1 JOIN place AS T2 ON T1.place = T2.code", "SELECT name FROM shop"),
        *[(f"SELECT count(*) FROM fact WHERE {column} = '{value}'",
           f"SELECT count(*) FROM fact WHERE {column} || '' = '{value}'")
          for column in "kv" for value in ("1e5", "1_000", "Infinity", " 42", "02139", "nan")],
    ],
)  # fmt: skip
def test_what_a_query_leans_on_is_in_the_copies(db, schema, gold, answer):
    assert trial_of(gold, schema, db, LIMITS).is_telling
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.AGREES


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM place", "SELECT name FROM place WHERE name IN ({name})"),
        ("SELECT code FROM place", "SELECT code FROM place WHERE code IN ({code})"),
        ("SELECT code FROM place", "SELECT code FROM place WHERE code BETWEEN 'c0' AND 'c7'"),
        ("SELECT id FROM shop", "SELECT id FROM shop WHERE id BETWEEN 1 AND 120"),
        ("SELECT DISTINCT grp FROM shop", "SELECT DISTINCT grp FROM shop WHERE grp IN (0, 1, 2, 3, 4, 5, 6)"),
        ("SELECT grp FROM shop", "SELECT grp FROM shop WHERE grp BETWEEN 0 AND 6"),
        ("SELECT DISTINCT place FROM shop", "SELECT DISTINCT place FROM shop WHERE place IN ({code})"),
        ("SELECT opened FROM shop", "SELECT opened FROM shop WHERE opened BETWEEN '2000-01-11' AND '2019-09-11'"),
        ("SELECT max(grp) FROM shop", "SELECT 6"),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM shop WHERE name IN ({threes})"),
    ],
)
def test_a_list_of_the_values_seen_earns_nothing(db, schema, gold, answer):
    def seen(sql):
        return ", ".join(f"'{cell}'" for (cell,) in run_query(db, sql).rows)

    lists = {"name": "SELECT name FROM place", "code": "SELECT code FROM place",
             "threes": "SELECT name FROM shop WHERE grp = 3"}  # fmt: skip
    answer = answer.format(**{key: seen(sql) for key, sql in lists.items()})
    turn = Turn("x:0:0", 0, "shops", "?", gold)
    assert answer_scores(answer, turn, schema, db, RewardConfig(guard=False), LIMITS)[0] == 1
    assert answer_scores(answer, turn, schema, db, RewardConfig(), LIMITS)[0] == 0


def test_a_copy_and_its_mirror_hold_the_same_in_opposite_orders(db):
    copy, mirror = memory_copy(content_of(db)), memory_copy(content_of(db), is_reversed=True)
    for table in ("place", "shop", "strict_one", "fact"):
        forward, backward, reversed_file, own = (
            run_query(source, f"SELECT * FROM {table}").rows for source in (copy, mirror, Mirror(db), db)
        )
        assert forward == own == backward[::-1] == reversed_file[::-1] and len(own) > 1
    for name in ("by_group", "by_name"):
        indexed = f"SELECT count(*) FROM shop INDEXED BY {name} WHERE grp > 2 AND name > 'Shop 4'"
        assert run_query(copy, indexed).rows == run_query(mirror, indexed).rows == run_query(db, indexed).rows
    assert run_query(mirror, "SELECT count(*), sum(twice) FROM shop").rows == run_query(db, "SELECT count(*), sum(twice) FROM shop").rows


def test_new_rows_refer_to_rows_and_break_no_unique_column(db, schema):
    new_codes, new_ids = set(), set()
    for seed in range(20):
        copy = memory_copy(altered(db, "SELECT name FROM shop", schema, seed))
        lost = "SELECT count(*) FROM shop WHERE place IS NOT NULL AND place NOT IN (SELECT code FROM place)"
        assert run_query(copy, lost).rows == ((0,),)
        for column in ("id", "name"):
            assert run_query(copy, f"SELECT count(*) = count(DISTINCT {column}), count(*) > 3 FROM shop").rows == ((1, 1),)
        new_codes |= {code for (code,) in run_query(copy, "SELECT place FROM shop").rows} - {f"c{i}" for i in range(8)}
        new_ids |= {row for (row,) in run_query(copy, "SELECT id FROM shop").rows} - set(range(1, 121))
        assert run_query(copy, "SELECT count(*) FROM shop WHERE kind NOT IN ('a', 'b')").rows == ((0,),)
    assert len(new_codes) > 5 and len(new_ids) > 20


def test_new_values_look_like_those_of_the_column():
    rng = random.Random(1)
    for values, is_like in (
        (["2001-02-03", "1999-12-31"], lambda v: len(v) == 10 and v[4:] in ("-02-03", "-12-31")),
        (["USA", "Peru"], lambda v: len(v) in (3, 4) and v.isalpha() and v[0].isupper()),
        (["02139", "10001"], lambda v: len(v) == 5 and v.isdigit()),
        ([1, 2, 3, 50], lambda v: type(v) is int and 0 <= v <= 60),
        ([0, 5], lambda v: v > 0),
        ([-5, 5], lambda v: -15 <= v <= 15),
        ([1.5, 2.25], lambda v: isinstance(v, float) and v >= 0),
        ([None, "a", "b"], lambda v: len(v) == 1 and v.islower()),
    ):
        found = [value for _ in range(200) if (value := new_value(values, rng)) is not None]
        assert len(found) > 100 and not set(found) & set(values)
        assert all(map(is_like, found)), (values, found[:20])
        kinds = [v for v in values if v is not None]
        assert max(found) > max(kinds) and (min(found) < min(kinds) or min(kinds) in (0, "a", 1))
    for values in ([], [None, None], [b"x"], ['{"a": 1}', "[1]"], ["", " "], ["?", "!"]):
        assert new_value(values, rng) is None


def test_a_new_row_that_cannot_be_made_is_left_out():
    rng = random.Random(0)
    rows = [(1, 1), (2, 2)]
    assert new_rows(rows, frozenset(), frozenset({0, 1}), {0: [], 1: []}, (0,), frozenset(), rng) == []  # no new parents
    [row] = new_rows(rows, frozenset(), frozenset({0, 1}), {0: [7], 1: [9]}, (0,), frozenset(), rng)
    assert row == (7, 9)
    for row in new_rows([(1, 2), (1, 3), (2, 2)] * 10, frozenset(), frozenset(), {0: [], 1: []}, (0, 1), frozenset(), rng):
        raise AssertionError(f"{row} repeats a key")


def test_what_could_not_be_copied_takes_nothing_away(tmp_path):
    """A table whose CREATE statement needs a function that is not there."""
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.create_function("here_only", 1, lambda x: x, deterministic=True)
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a INT)")
        connection.executemany("INSERT INTO t (a) VALUES (?)", [(i % 5,) for i in range(50)])
        connection.execute("CREATE INDEX i ON t (here_only(a))")
        connection.execute("CREATE INDEX j ON t (a)")
    schema, gold = schema_from_sqlite(path), "SELECT id FROM t WHERE a = 3"
    for answer in ("SELECT id FROM t INDEXED BY j WHERE a = 3 AND id > 0", "SELECT id FROM t WHERE a + 0 = 3"):
        if run_query(path, answer).is_ok:
            assert evidence(answer, gold, schema, path, LIMITS) in (Evidence.AGREES, Evidence.UNKNOWN)
    assert evidence("SELECT id FROM t WHERE id < 11", gold, schema, path, LIMITS) is Evidence.DIFFERS
