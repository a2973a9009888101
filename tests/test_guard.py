"""What a policy could be paid for without having answered; each rule with the honest answers it must not hurt."""

import json
import os
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from mtsql.judge import content
from mtsql.judge.agreement import stable_order, written_match
from mtsql.judge.altered_copies import altered
from mtsql.judge.content import Content, TableRows, content_of, memory_copy
from mtsql.judge.guard import Copied, Evidence, copied_from_history, evidence, trial_of
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import DatabaseFileError, Mirror, QueryConfig, clear_result_cache, run_query
from mtsql.sql.schema import load_schemas, schema_from_sqlite
from mtsql.sql.worker_pool import the_pool

LIMITS = QueryConfig()
USA = "SELECT name FROM singer WHERE country = 'USA'"


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    path = tmp_path_factory.mktemp("guard") / "shows.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER, sales REAL,
                                 planet TEXT DEFAULT 'Earth');
            CREATE TABLE song (song_id INTEGER PRIMARY KEY, title TEXT, year INTEGER,
                               singer_id INTEGER REFERENCES singer (singer_id));
            INSERT INTO singer (singer_id, name, country, age, sales) VALUES (1, 'Ann', 'USA', 30, 0.1), (2, 'Bob', 'France', 41, 0.2),
                (3, 'Cid', 'USA', 25, 0.3), (4, 'Dan', 'Peru', 52, 0.7), (5, 'Eve', 'France', 33, NULL);
            INSERT INTO song VALUES (1, 'Up', 2001, 1), (2, 'Down', 2003, 1), (3, 'On', 2001, 2), (4, 'Off', 2010, 4),
                (5, 'In', 2003, 4);
            """
        )
    return path


@pytest.fixture(scope="module")
def schema(db):
    return schema_from_sqlite(db)


@pytest.fixture(scope="module")
def paid(db, schema):
    def scores(sql, gold, history=(), guard=True):
        turn = Turn(
            "train:0:0", len(history), "shows", "?", gold, tuple(("?", sql) for sql in history)
        )
        return answer_scores(sql, turn, schema, db, RewardConfig(guard=guard), LIMITS)

    return scores


COUNT = "SELECT count(*) FROM singer WHERE country = 'USA'"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (COUNT, "SELECT 2"),
        (COUNT, "SELECT 2 FROM singer LIMIT 1"),
        (COUNT, "SELECT 2 FROM singer WHERE name = 'Ann'"),
        (COUNT, "SELECT max(2) FROM singer"),
        (COUNT, "SELECT singer_id FROM singer WHERE name = 'Bob'"),
        (COUNT, "SELECT count(*) FROM singer WHERE country = 'France'"),
        ("SELECT max(age) FROM singer", "SELECT 52"),
        ("SELECT country FROM singer WHERE name = 'Ann'", "SELECT 'USA' FROM singer LIMIT 1"),
        ("SELECT name FROM singer ORDER BY age LIMIT 1", "SELECT 'Cid'"),
        (
            "SELECT planet FROM singer WHERE country = 'Peru'",
            "SELECT 'Earth'",
        ),  # the column has one value only
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer WHERE singer_id = 3",
        ),
    ],
)
def test_constants_earn_nothing(paid, gold, answer):
    assert paid(answer, gold, guard=False)[0] == 1
    assert paid(answer, gold)[0] == 0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (
            "SELECT name FROM singer WHERE age > 20",
            "SELECT name FROM singer",
        ),  # the filter keeps all
        (
            "SELECT name FROM singer WHERE age > 26 AND country = 'USA'",
            "SELECT name FROM singer WHERE name LIKE '%nn'",
        ),
        ("SELECT name FROM singer WHERE age > 26", "SELECT name FROM singer WHERE age >= 26"),
        (
            "SELECT name FROM singer WHERE age > 26",
            "SELECT name FROM singer WHERE age > 27",
        ),  # em is met
        ("SELECT count(*) FROM song", "SELECT count(*) FROM singer"),
        ("SELECT min(singer_id) FROM song", "SELECT min(singer_id) FROM singer"),
        ("SELECT name FROM singer ORDER BY singer_id", "SELECT name FROM singer ORDER BY name"),
        (
            "SELECT title FROM song WHERE year = 2001 OR year = 2003",
            "SELECT title FROM song WHERE year < 2010",
        ),
        (
            "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id WHERE T2.year = 2010",
            "SELECT name FROM singer WHERE country = 'Peru'",
        ),
    ],
)
def test_agreement_by_accident_earns_nothing(paid, gold, answer):
    assert paid(answer, gold, guard=False)[0] == 1
    assert paid(answer, gold)[0] == 0


JOINED = "SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id WHERE T2.year = 2010"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (COUNT, "select COUNT(singer_id) from singer s where s.country in ('USA')"),
        (
            JOINED,
            "SELECT name FROM singer WHERE singer_id IN (SELECT singer_id FROM song WHERE year = 2010)",
        ),
        (
            JOINED,
            "SELECT s.name FROM song g, singer s WHERE g.year IN (2010) AND s.singer_id = g.singer_id",
        ),
        (
            "SELECT count(*) FROM song",
            "SELECT count(*) FROM song JOIN singer ON song.singer_id = singer.singer_id",
        ),
        ("SELECT max(age) FROM singer", "SELECT age FROM singer ORDER BY age DESC LIMIT 1"),
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer WHERE age = (SELECT min(age) FROM singer)",
        ),
        (
            "SELECT country, count(*) FROM singer GROUP BY country",
            "SELECT count(*), country FROM singer GROUP BY 2",
        ),
        ("SELECT avg(sales) FROM singer", "SELECT sum(sales) / count(sales) FROM singer"),
        (
            "SELECT sum(sales) FROM singer",
            "SELECT sum(sales) FROM (SELECT sales FROM singer ORDER BY sales DESC)",
        ),
        ("SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE NOT age <= 20"),
        (
            "SELECT title FROM song WHERE year >= 2010 ORDER BY year LIMIT 1",  # with a tie on some copies
            "SELECT title FROM song WHERE year >= 2010 ORDER BY year, title DESC LIMIT 1",
        ),
        (
            "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM song)",
            "SELECT name FROM singer EXCEPT SELECT T1.name FROM singer T1 JOIN song T2 ON T1.singer_id = T2.singer_id",
        ),
    ],
)
def test_other_ways_to_say_the_same_are_paid(paid, gold, answer):
    assert paid(answer, gold) == (1, 0)


def test_an_empty_gold_result_is_not_met_by_any_empty_result(paid):
    gold = "SELECT name FROM singer WHERE country = 'usa'"
    other = "SELECT title FROM song WHERE year = 1900"
    assert paid(other, gold, guard=False) == (1, 0) and paid(other, gold) == (0, 0)
    assert paid("SELECT name FROM singer WHERE NOT country <> 'usa'", gold) == (
        1,
        0,
    )  # copies have rows
    assert paid(gold, gold) == (1, 1)
    two, swapped = (
        f"{gold} AND age > 99",
        "SELECT name FROM singer WHERE age > 99 AND country = 'usa'",
    )
    assert paid(swapped, two) == (1, 1)
    assert paid("SELECT T1.name FROM singer AS T1 WHERE T1.country = 'usa'", gold) == (1, 1)
    assert paid(gold.replace("usa", "chile"), gold) == (
        0,
        1,
    )  # right in structure, another question
    null = "SELECT max(age) FROM singer WHERE country = 'usa'"
    assert paid("SELECT NULL", null, guard=False) == (1, 0) and paid("SELECT NULL", null) == (0, 0)


def test_an_answer_that_compiles_to_the_same_is_paid_where_no_copy_can_tell(paid):
    gold = 'SELECT name FROM singer WHERE country = "nowhere" LIMIT 1'
    assert paid(gold.replace('= "nowhere"', 'IN ("nowhere")'), gold)[0] == 1
    every = "SELECT song_id, title, year, singer_id FROM song"
    assert (
        paid(
            'SELECT "song_id", `title`, [year], singer_id FROM "song"',
            every,
            ["SELECT * FROM song"],
        )[0]
        == 1
    )


def test_an_earlier_turns_query_earns_nothing_again(paid):
    france = USA.replace("USA", "France")
    copied = "select  T1.name FROM singer AS T1 WHERE T1.country = 'USA';"
    for answer in (USA, copied):
        assert paid(answer, france, [USA], guard=False) == (0, 1)  # exact match disregards values
        assert paid(answer, france, [USA]) == (0, 0)
        assert paid(answer, france, [USA, "SELECT name FROM singer"]) == (0, 0)
    plain = "SELECT country FROM singer"
    distinct = plain.replace("country", "DISTINCT country")
    assert paid(plain, distinct, [plain], guard=False) == (0, 1)  # exact match disregards DISTINCT
    assert paid(plain, distinct, [plain]) == (0, 0)
    assert paid(plain, distinct) == (0, 1)


def test_a_turn_that_repeats_the_query_is_paid(paid):
    assert paid(USA, USA, [USA]) == (1, 1)
    assert paid(USA + ";", USA.replace("name", "singer.name"), [USA]) == (1, 1)


def test_copies_that_do_not_parse_are_compared_as_text(db, schema):
    odd = "SELECT CASE WHEN age > 3 THEN 1 END FROM singer"
    copied = copied_from_history(f" {odd.upper()} ; ", [("?", odd)], USA, schema, db, LIMITS)
    assert copied is Copied.QUERY
    assert copied_from_history(odd, [("?", odd)], odd.lower(), schema, db, LIMITS) is Copied.NO


def test_a_gold_that_no_copy_can_tell_needs_the_structure(paid, db, schema):
    gold = "SELECT count(*) FROM (SELECT * FROM singer LIMIT 1)"  # 1, as long as there are singers
    answer = "SELECT 1 FROM singer LIMIT 1"
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.NONE
    assert paid(answer, gold) == (0, 0) and paid(answer, gold, guard=False) == (1, 0)
    assert paid(gold.replace("count", "COUNT"), gold) == (1, 1)
    outside = "SELECT CASE WHEN 1 THEN 1 END FROM singer LIMIT 1"  # of the official grammar
    assert paid(f"{outside};", outside) == (1, 0)


def test_an_answer_that_fails_on_a_copy_differs(db, schema):
    gold = "SELECT count(*) FROM singer"
    answer = "SELECT count(*) FROM singer WHERE NOT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'nothing') "
    assert evidence(answer, gold, schema, db, LIMITS) is Evidence.AGREES
    indexed = "SELECT count(*) FROM singer INDEXED BY nothing"
    assert evidence(indexed, gold, schema, db, LIMITS) is Evidence.DIFFERS


def test_copies_keep_keys_and_are_the_same_each_time(db, schema):
    for seed in range(12):
        tables = {
            t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows]
            for t in altered(db, USA, schema, seed).tables
        }
        assert altered(db, USA, schema, seed) == altered(db, USA, schema, seed)
        ids = [row["singer_id"] for row in tables["singer"]]
        assert len(set(ids)) == len(ids) > 0 and set(ids) & {1, 2, 3, 4, 5}
        assert tables["song"] and {row["singer_id"] for row in tables["song"]} <= set(ids)
        assert len({row["name"] for row in tables["singer"]}) == len(ids)
    assert altered(db, USA, schema, 0) != altered(db, USA, schema, 1)


def test_literals_break_no_key_and_repeat_no_unique_value(db, schema):
    gold = "SELECT * FROM song JOIN singer ON song.singer_id = singer.singer_id "
    gold += "WHERE song.singer_id = 77 AND name = 'Zoe'"
    names = []
    for seed in range(30):
        singer, song = altered(db, gold, schema, seed).tables
        assert {row[3] for row in song.rows} <= {row[0] for row in singer.rows} and 77 not in {
            row[0] for row in singer.rows
        }
        assert len({row[1] for row in singer.rows}) == len(singer.rows)
        names += [row[1] for row in singer.rows]
    assert "Zoe" in names


def test_planted_literals_are_met_and_missed(db, schema):
    gold = "SELECT name FROM singer WHERE country LIKE '%Chile%' OR age BETWEEN 90 AND 95 AND sales > 1e300"
    rows = [row for seed in range(60) for row in altered(db, gold, schema, seed).tables[0].rows]
    found = {row[2] for row in rows}
    assert {"Chile", "xChilex", "USA"} < found and len(found) > 20  # and what just misses them
    assert {89, 90, 91, 94, 95, 96} <= {row[3] for row in rows}
    assert 1e300 in {row[4] for row in rows}


def test_big_tables_are_sampled_with_the_rows_they_refer_to(tmp_path):
    path = tmp_path / "big.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY, x TEXT)")
        connection.execute(
            "CREATE TABLE b (id INTEGER PRIMARY KEY, a_id TEXT REFERENCES a (id))"
        )  # keys as text
        connection.executemany("INSERT INTO a VALUES (?, ?)", [(i, f"x{i}") for i in range(3000)])
        connection.executemany(
            "INSERT INTO b VALUES (?, ?)", [(i, str(i * 7 % 3000)) for i in range(3000)]
        )
    a, b = altered(path, "SELECT id FROM a WHERE x = 'x1234'", schema_from_sqlite(path), 0).tables
    assert 50 < len(b.rows) <= 225 and 50 < len(a.rows) <= 450
    assert {row[1] for row in b.rows} <= {str(row[0]) for row in a.rows}
    gold = "SELECT x FROM a WHERE id = 1234"
    copies = [altered(path, gold, schema_from_sqlite(path), seed).tables[0] for seed in range(3)]
    assert any(row[0] == 1234 for table in copies for row in table.rows)


def test_copies_are_the_tables_they_are_made_of(db):
    content = content_of(db)
    assert [t.name for t in content.tables] == ["singer", "song"] and len(
        content.tables[1].rows
    ) == 5
    create = 'CREATE TABLE "a ""b" ("c d", "order" varchar(3), e "int ) ; --")'
    odd = TableRows('a "b', create, ("c d", "order", "e"), ((b"\0", None, 1), (2**60, "é", 2)))
    both = Content((*content.tables, odd))
    copy, mirror = memory_copy(both), memory_copy(both, is_reversed=True)
    for table in both.tables:
        quoted = table.name.replace('"', '""')
        names = ", ".join('"' + name + '"' for name in table.columns)
        assert run_query(copy, f'SELECT {names} FROM "{quoted}"').rows == table.rows
        assert run_query(mirror, f'SELECT {names} FROM "{quoted}"').rows == table.rows[::-1]
    assert run_query(Mirror(db), "SELECT * FROM song").rows == content.tables[1].rows[::-1]
    assert memory_copy(both) == copy != mirror


def test_order_that_the_gold_fixes():
    ordered = "SELECT a FROM t ORDER BY a"
    assert stable_order([(1,), (2,)], [(1,), (2,)], ordered) is True
    assert stable_order([(1,), (2,)], [(2,), (1,)], ordered) is False  # a tie: any order will do
    assert stable_order([(1,), (2,)], [(2,), (1,)], "SELECT a FROM t") is False
    assert stable_order([(1,)], [(2,)], ordered) is None
    assert stable_order([(0.1 + 0.2,)], [(0.3,)], "SELECT sum(a) FROM t") is False


def test_copies_on_which_the_gold_itself_varies_are_not_used(db, schema):
    trial = trial_of("SELECT title FROM song LIMIT 1", schema, db, LIMITS)
    for copy in trial.copies:
        assert run_query(copy.database, "SELECT count(DISTINCT title) FROM song").rows == ((1,),)


def test_copies_need_no_files(db, schema, tmp_path, monkeypatch):
    """Nothing can be cleaned away, and no disk can be full; a fork and a new worker know them,
    too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", None)
    answer = "SELECT singer.name FROM singer WHERE country IN ('USA')"
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES
    the_pool().stop()
    the_pool().resume()
    clear_result_cache()
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(evidence(answer, USA, schema, db, LIMITS) is not Evidence.AGREES)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert evidence(answer, USA, schema, db, LIMITS) is Evidence.AGREES


def test_what_cannot_be_read_is_left_out_of_the_copies(tmp_path):
    """A module that is not loaded, names that are not UTF-8, a damaged page, an odd type: the
    answer is judged."""
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT hex(randomblob(99)) FROM n"
    for name, script, patch in (
        ("module", "CREATE VIRTUAL TABLE notes USING fts5(body)", (b"USING fts5", b"USING fxx9")),
        ("column", 'CREATE TABLE t ("cafA" TEXT); INSERT INTO t VALUES (1)', (b"cafA", b"caf\xe9")),
        ("table", 'CREATE TABLE "cafA" (a TEXT)', (b"cafA", b"caf\xe9")),
        ("type", "CREATE TABLE t (a [int ) ; --], b INT); INSERT INTO t VALUES (1, 2)", (b"", b"")),
        ("page", f"CREATE TABLE z (a); INSERT INTO z {rows}", None),
        ("wide", f"CREATE TABLE w ({', '.join(f'c{i}' for i in range(1200))})", (b"", b"")),
    ):
        path = tmp_path / f"{name}.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(
                "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INT);"
                f"INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bob', 41), (3, 'Cid', 25); {script};"
            )
        content = path.read_bytes()
        if patch is None:
            content = content[: 4096 * 20] + b"\xa5" * 4096 + content[4096 * 21 :]
        else:
            content = content.replace(*patch) if patch[0] else content
        path.write_bytes(content)
        gold, answer = (
            "SELECT count(*) FROM singer WHERE age > 26",
            "SELECT count(id) FROM singer WHERE age > 26",
        )
        found = schema_from_sqlite(path)
        assert "singer" in {table.name for table in found.tables}
        assert evidence(answer, gold, found, path, LIMITS) is Evidence.AGREES, name
        assert evidence("SELECT 2", gold, found, path, LIMITS) is Evidence.DIFFERS, name


def test_a_database_that_takes_for_ever_to_read_takes_nothing_away(tmp_path, monkeypatch, caplog):
    """Reading has a clock of its own, and is tried once."""
    path, other = tmp_path / "costly.sqlite", tmp_path / "other.sqlite"
    for file in (path, other):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute(
                "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT)"
            )
            connection.execute(
                f"INSERT INTO singer VALUES (1, 'Ann', 'USA'), (2, 'Bob', '{file.stem}')"
            )
    num_read = 0

    def too_slow(db_path, *_):
        nonlocal num_read
        num_read += 1
        raise DatabaseFileError(f"{db_path}: cannot be read within 20 seconds")

    schema, answer = schema_from_sqlite(path), "SELECT name FROM singer WHERE country || '' = 'USA'"
    assert evidence(answer, USA, schema, other, LIMITS) is Evidence.AGREES
    monkeypatch.setattr("mtsql.judge.content.read_tables", too_slow)
    assert [evidence(answer, USA, schema, path, LIMITS) for _ in range(3)] == [Evidence.UNKNOWN] * 3
    assert num_read == 1 and caplog.text.count("cannot be read within 20 seconds") == 1


def test_an_answer_that_does_not_end_on_a_copy_differs(db, schema):
    """The gold ends there. Otherwise an answer could choose to be judged on the database alone."""
    gold = "SELECT count(*) FROM singer"
    trial = trial_of(gold, schema, db, QueryConfig(max_vm_steps=100_000))
    assert trial.copies
    slow = "SELECT count(*) FROM singer WHERE 0 = (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n LIMIT 1 OFFSET 99999)"
    assert evidence(slow, gold, schema, db, QueryConfig(max_vm_steps=100_000)) is Evidence.DIFFERS


def test_no_database_gives_no_evidence(schema, tmp_path):
    assert evidence("SELECT 1", USA, schema, tmp_path / "gone.sqlite", LIMITS) is Evidence.UNKNOWN


def test_large_values_are_cut_where_copies_are_made(tmp_path):
    path = tmp_path / "photos.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE p (id INTEGER PRIMARY KEY, photo)")
        connection.executemany(
            "INSERT INTO p VALUES (?, zeroblob(3000000))", [(i,) for i in range(20)]
        )
    [table] = content_of(path).tables
    assert len(table.rows) == 20 and {len(photo) for _, photo in table.rows} == {
        content.MAX_CELL_BYTES
    }


def test_published_predictions(shared):
    """The examples that the official program calls right: few lose their pay, and those that do
    agree by accident."""
    data, counts = shared / "data", Counter()
    schemas = load_schemas(data / "tables.json")
    for line in (shared / "conformance" / "metrics_examples.jsonl").read_text().splitlines():
        pair = json.loads(line)
        if pair["ex"]:
            found = evidence(
                pair["pred"], pair["gold"], schemas[pair["db_id"]], data / pair["db"], LIMITS
            )
            # Official verdicts disregard DISTINCT and `value`, which rewards do not.
            is_met = written_match(pair["pred"], pair["gold"], data / pair["db"], LIMITS)
            counts["em" if pair["em"] else "ex only", found if is_met else "not met"] += 1
    assert sum(counts.values()) == 159
    assert (
        counts["em", Evidence.AGREES] >= 75 and counts["em", Evidence.DIFFERS] <= 6
    )  # their literals are wrong
    assert counts["ex only", Evidence.AGREES] >= 52 and counts["ex only", Evidence.DIFFERS] >= 9
