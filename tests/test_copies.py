"""Altered copies: they have the file's own tables, keys, indexes and views, and values that the file does not have."""

import random
import sqlite3
import time
from contextlib import closing

import pytest

from mtsql.judge.altered_copies import altered
from mtsql.judge.content import content_of, memory_copy
from mtsql.judge.guard import Evidence, evidence, trial_of
from mtsql.judge.new_values import NewValues, new_rows
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import Mirror, QueryConfig, run_query
from mtsql.sql.schema import schema_from_sqlite

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
        connection.executemany(
            "INSERT INTO place VALUES (?, ?)", [(c, f"Place {c}") for c in codes]
        )
        connection.executemany(
            "INSERT INTO shop (name, place, zip, grp, opened, kind) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    f"Shop {i}",
                    rng.choice(codes),
                    f"{2100 + i % 40:05}",
                    i % 7,
                    f"20{i % 20:02}-0{1 + i % 9}-11",
                    "ab"[i % 2],
                )
                for i in range(120)
            ],
        )
        connection.executemany(
            "INSERT INTO strict_one VALUES (?, ?)", [(i % 9, f"t{i % 5}") for i in range(40)]
        )
        values = ["1e5", "1_000", "Infinity", " 42", "02139", "nan"]
        connection.executemany(
            "INSERT INTO fact VALUES (?, ?)", [(values[i % 6], values[i % 6]) for i in range(60)]
        )
    return path


@pytest.fixture(scope="module")
def schema(db):
    return schema_from_sqlite(db)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (
            "SELECT name FROM big WHERE grp = 3",
            "SELECT big.name FROM big WHERE NOT grp <> 3 AND grp = 3",
        ),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM big WHERE grp = 3"),
        (
            "SELECT id FROM shop WHERE name = 'Shop 3'",
            "SELECT id FROM shop WHERE name IN ('sHOP 3', 'SHOP 3')",
        ),
        (
            "SELECT name FROM place WHERE code = 'c3'",
            "SELECT name FROM place WHERE code IN ('C3', 'C3')",
        ),
        ("SELECT id FROM shop WHERE twice = 6", "SELECT id FROM shop WHERE grp * 2 = 6"),
        ("SELECT name FROM shop WHERE id = 3", "SELECT name FROM shop WHERE _rowid_ + 0 = 3"),
        (
            "SELECT name FROM shop WHERE grp = 3",
            "SELECT name FROM shop INDEXED BY by_group WHERE grp = 3",
        ),
        (
            "SELECT name FROM shop WHERE zip = '02101'",
            "SELECT name FROM shop WHERE zip LIKE '02101'",
        ),
        (
            "SELECT count(*) FROM strict_one WHERE a = 3",
            "SELECT count(b) FROM strict_one WHERE a + 0 = 3",
        ),
        (
            "SELECT name FROM shop WHERE kind = 'a'",
            "SELECT name FROM shop WHERE kind <> 'b'",
        ),  # its CHECK says so
        (
            "SELECT name FROM shop WHERE opened LIKE '2001%'",
            "SELECT name FROM shop WHERE strftime('%Y', opened) = '2001'",
        ),
        (
            "SELECT T1.name FROM shop AS T1 JOIN place AS T2 ON T1.place = T2.code",
            "SELECT name FROM shop",
        ),
        *[
            (
                f"SELECT count(*) FROM fact WHERE {column} = '{value}'",
                f"SELECT count(*) FROM fact WHERE {column} || '' = '{value}'",
            )
            for column in "kv"
            for value in ("1e5", "1_000", "Infinity", " 42", "02139", "nan")
        ],
    ],
)
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
        (
            "SELECT DISTINCT grp FROM shop",
            "SELECT DISTINCT grp FROM shop WHERE grp IN (0, 1, 2, 3, 4, 5, 6)",
        ),
        ("SELECT grp FROM shop", "SELECT grp FROM shop WHERE grp BETWEEN 0 AND 6"),
        (
            "SELECT DISTINCT place FROM shop",
            "SELECT DISTINCT place FROM shop WHERE place IN ({code})",
        ),
        (
            "SELECT opened FROM shop",
            "SELECT opened FROM shop WHERE opened BETWEEN '2000-01-11' AND '2019-09-11'",
        ),
        ("SELECT max(grp) FROM shop", "SELECT 6"),
        ("SELECT name FROM shop WHERE grp = 3", "SELECT name FROM shop WHERE name IN ({threes})"),
    ],
)
def test_a_list_of_the_values_seen_earns_nothing(db, schema, gold, answer):
    def seen(sql):
        return ", ".join(f"'{cell}'" for (cell,) in run_query(db, sql).rows)

    lists = {
        "name": "SELECT name FROM place",
        "code": "SELECT code FROM place",
        "threes": "SELECT name FROM shop WHERE grp = 3",
    }
    answer = answer.format(**{key: seen(sql) for key, sql in lists.items()})
    turn = Turn("x:0:0", 0, "shops", "?", gold)
    assert answer_scores(answer, turn, schema, db, RewardConfig(guard=False), LIMITS)[0] == 1
    assert answer_scores(answer, turn, schema, db, RewardConfig(), LIMITS)[0] == 0


def test_a_copy_and_its_mirror_hold_the_same_in_opposite_orders(db):
    copy, mirror = memory_copy(content_of(db)), memory_copy(content_of(db), is_reversed=True)
    for table in ("place", "shop", "strict_one", "fact"):
        forward, backward, reversed_file, own = (
            run_query(source, f"SELECT * FROM {table}").rows
            for source in (copy, mirror, Mirror(db), db)
        )
        assert forward == own == backward[::-1] == reversed_file[::-1] and len(own) > 1
    for name in ("by_group", "by_name"):
        indexed = f"SELECT count(*) FROM shop INDEXED BY {name} WHERE grp > 2 AND name > 'Shop 4'"
        assert (
            run_query(copy, indexed).rows
            == run_query(mirror, indexed).rows
            == run_query(db, indexed).rows
        )
    assert (
        run_query(mirror, "SELECT count(*), sum(twice) FROM shop").rows
        == run_query(db, "SELECT count(*), sum(twice) FROM shop").rows
    )


def test_new_rows_refer_to_rows_and_break_no_unique_column(db, schema):
    new_codes, new_ids = set(), set()
    for seed in range(20):
        copy = memory_copy(altered(db, "SELECT name FROM shop", schema, seed))
        lost = "SELECT count(*) FROM shop WHERE place IS NOT NULL AND place NOT IN (SELECT code FROM place)"
        assert run_query(copy, lost).rows == ((0,),)
        for column in ("id", "name"):
            assert run_query(
                copy, f"SELECT count(*) = count(DISTINCT {column}), count(*) > 3 FROM shop"
            ).rows == ((1, 1),)
        new_codes |= {code for (code,) in run_query(copy, "SELECT place FROM shop").rows} - {
            f"c{i}" for i in range(8)
        }
        new_ids |= {row for (row,) in run_query(copy, "SELECT id FROM shop").rows} - set(
            range(1, 121)
        )
        assert run_query(copy, "SELECT count(*) FROM shop WHERE kind NOT IN ('a', 'b')").rows == (
            (0,),
        )
    assert len(new_codes) > 5 and len(new_ids) > 5


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
        ([None, "a", "b"], lambda v: len(v) in (1, 2) and v.islower()),
    ):
        found = [value for _ in range(200) if (value := NewValues(values).draw(rng)) is not None]
        assert len(found) > 100 and not set(found) & set(values)
        assert all(map(is_like, found)), (values, found[:20])
        kinds = [v for v in values if v is not None]
        assert max(found) > max(kinds) and (min(found) < min(kinds) or min(kinds) in (0, "a", 1))
    for values, is_like in (
        (["北京", "上海"], lambda v: len(v) == 3),
        (["?", "!"], lambda v: len(v) == 2),
        ([b"x", b"y"], lambda v: isinstance(v, bytes)),
        ([2**60, 2**61], lambda v: 2**60 - 10 <= v < 2**63),
    ):
        found = [NewValues(values).draw(rng) for _ in range(50)]
        assert not set(found) & set(values) and all(map(is_like, filter(None, found)))
    for values in ([], [None, None], ['{"a": 1}', "[1]"], ["", " "]):
        assert NewValues(values).draw(rng) is None


def test_a_new_row_that_cannot_be_made_is_left_out():
    rng = random.Random(0)
    rows = [(1, 1), (2, 2)]
    assert (
        new_rows(rows, frozenset(), frozenset({0, 1}), {0: [], 1: []}, (0,), frozenset(), 0.1, rng)
        == []
    )  # no new parents
    [row] = new_rows(
        rows, frozenset(), frozenset({0, 1}), {0: [7], 1: [9]}, (0,), frozenset(), 0.1, rng
    )
    assert row == (7, 9)
    for row in new_rows(
        [(1, 2), (1, 3), (2, 2)] * 10,
        frozenset(),
        frozenset(),
        {0: [], 1: []},
        (0, 1),
        frozenset(),
        0.1,
        rng,
    ):
        raise AssertionError(f"{row} repeats a key")


def test_what_could_not_be_copied_takes_nothing_away(tmp_path):
    """An index of two columns, one of them by a function that only the file's writer has."""
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a INT, integer INT)")
        connection.executemany(
            "INSERT INTO t (a, integer) VALUES (?, 1)", [(i % 5,) for i in range(50)]
        )
        connection.execute("CREATE INDEX j ON t (a)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX j ON t (a) -- ' || x'ff' WHERE name = 'j'"
        )
        connection.execute("ANALYZE")
    schema, gold = schema_from_sqlite(path), "SELECT id FROM t WHERE a = 3 AND integer = 1"
    named = "SELECT id FROM t INDEXED BY j WHERE a = 3"
    assert run_query(path, named).is_ok
    assert evidence(named, gold, schema, path, LIMITS) is Evidence.UNKNOWN
    assert (
        evidence("SELECT id FROM t WHERE a + 0 = 3", gold, schema, path, LIMITS) is Evidence.DIFFERS
    )  # new values
    assert (
        evidence("SELECT id FROM t WHERE a + 0 = 3 AND 1 = integer", gold, schema, path, LIMITS)
        is Evidence.AGREES
    )
    for table in ("sqlite_stat1", "main.sqlite_stat1", '"sqlite_stat1"'):
        answer = f"SELECT 10 FROM {table} LIMIT 1"
        assert run_query(path, answer).rows == ((10,),)
        assert (
            evidence(answer, "SELECT count(*) FROM t WHERE a = 3", schema, path, LIMITS)
            is Evidence.DIFFERS
        )


@pytest.mark.parametrize(
    "otherwise",
    [
        "zeroblob(1000000000)",
        "json_extract('{}', 'no such table')",
        "abs(-9223372036854775807 - 1)",
        "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n)",
        "length(trim(hex(zeroblob(15000)), '1' || hex(zeroblob(15000)))) + random()",
    ],
)
def test_an_answer_that_fails_where_it_finds_other_rows_differs(db, schema, otherwise):
    """It knows the file by its number of rows, and does something else on a copy."""
    gold = "SELECT count(*) FROM shop WHERE grp = 3"
    count = run_query(db, gold).rows[0][0]
    answer = f"SELECT CASE WHEN (SELECT count(*) FROM shop) = 120 THEN {count} ELSE {otherwise} END"
    assert run_query(db, answer).rows == ((count,),)
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.DIFFERS


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
def test_agreement_that_more_rows_or_near_misses_undo(db, schema, gold, answer):
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.DIFFERS


MOST = "SELECT place FROM shop GROUP BY place ORDER BY count(*) DESC LIMIT 1"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (
            MOST,
            "SELECT place FROM shop GROUP BY place HAVING count(*) = (SELECT max(c) FROM (SELECT count(*) AS c FROM shop GROUP BY place))",
        ),
        (MOST, MOST.replace("GROUP BY place", "GROUP BY place, place")),
        (
            MOST,
            "SELECT place FROM (SELECT place, rank() OVER (ORDER BY count(*) DESC) AS r FROM shop GROUP BY place) WHERE r = 1",
        ),
        ("SELECT name FROM shop ORDER BY grp", "SELECT name FROM shop ORDER BY grp, id DESC"),
        (
            "SELECT name FROM shop WHERE id < 20 ORDER BY grp -- so",
            "SELECT name FROM shop WHERE id < 20 ORDER BY grp, name DESC",
        ),
        (
            "SELECT max(grp) FROM shop WHERE zip = '02101'",
            "SELECT grp FROM shop WHERE zip = '02101' ORDER BY grp DESC LIMIT 1",
        ),
    ],
)
def test_ties_take_nothing_from_an_honest_answer(db, schema, gold, answer):
    turn = Turn("x:0:0", 0, "shops", "?", gold)
    assert answer_scores(answer, turn, schema, db, RewardConfig(), LIMITS)[0] == 1
    if "ORDER" in gold:
        wrong = answer.replace(" DESC", "") if gold is MOST else answer.replace("grp", "-grp")
        assert (
            answer_scores(wrong, turn, schema, db, RewardConfig(), LIMITS)[0] == 0
            or wrong == answer
        )


def test_names_that_differ_in_letters_beyond_ascii_are_judged(tmp_path):
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            'CREATE TABLE "É" (a INT); CREATE TABLE "é" (b INT); INSERT INTO "É" VALUES (1), (2);'
        )
    turn = Turn("x:0:0", 0, "x", "?", 'SELECT a FROM "É"')
    assert (
        answer_scores(turn.sql, turn, schema_from_sqlite(path), path, RewardConfig(), LIMITS)[0]
        == 1
    )


def test_a_wide_database_is_copied_in_bounded_time(tmp_path):
    """11 s of processor time before columns were summed up once; under a second now."""
    path = tmp_path / "wide.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            f"CREATE TABLE w (id INTEGER PRIMARY KEY, {', '.join(f'c{i} INT' for i in range(1200))})"
        )
        rows = [(i, *((i * 7 + j) % 51 for j in range(1200))) for i in range(600)]
        connection.executemany(f"INSERT INTO w VALUES ({', '.join('?' * 1201)})", rows)
        for k in range(20):
            connection.execute(
                f"CREATE TABLE t{k} ({', '.join(f'c{k}_{i} INT' for i in range(20))})"
            )
        connection.execute(f"CREATE TABLE spam (a INT, b TEXT DEFAULT '{'check(' * 3000}')")
    start = time.process_time()
    assert trial_of(
        "SELECT count(*) FROM w WHERE c5 > 25", schema_from_sqlite(path), path, LIMITS
    ).is_telling
    assert time.process_time() - start < 8
