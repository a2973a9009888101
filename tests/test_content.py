"""The content of a database is read within limits, and copies hold what was read."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from helpers.databases import make_database
from helpers.shows import SHOWS, USA
from helpers.unusual import make_unusual
from mtsql.judge import content
from mtsql.judge.content import Content, TableRows, content_of, memory_copy
from mtsql.judge.guard import Evidence, evidence
from mtsql.sql.sandbox import DatabaseFileError, Mirror, QueryConfig, run_query
from mtsql.sql.schema import schema_from_sqlite

LIMITS = QueryConfig()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("content") / "shows.sqlite", SHOWS)


def test_a_copy_holds_the_tables_and_its_mirror_holds_them_in_opposite_order(db: Path) -> None:
    read = content_of(db)
    assert [table.name for table in read.tables] == ["singer", "song"]
    assert len(read.tables[1].rows) == 5
    create = 'CREATE TABLE "a ""b" ("c d", "order" varchar(3), e "int ) ; --")'
    odd = TableRows('a "b', create, ("c d", "order", "e"), ((b"\0", None, 1), (2**60, "é", 2)))
    both = Content((*read.tables, odd))
    copy = memory_copy(both)
    mirror = memory_copy(both, is_reversed=True)
    for table in both.tables:
        quoted = table.name.replace('"', '""')
        names = ", ".join(f'"{name}"' for name in table.columns)
        assert run_query(copy, f'SELECT {names} FROM "{quoted}"').rows == table.rows
        assert run_query(mirror, f'SELECT {names} FROM "{quoted}"').rows == table.rows[::-1]
    assert run_query(Mirror(db), "SELECT * FROM song").rows == read.tables[1].rows[::-1]
    assert memory_copy(both) == copy != mirror


def test_copies_of_any_kind_of_table_have_its_rows_and_indexes(tmp_path: Path) -> None:
    path = make_unusual(tmp_path / "shops.sqlite")
    copy = memory_copy(content_of(path))
    mirror = memory_copy(content_of(path), is_reversed=True)
    for table in ("place", "shop", "strict_one", "fact"):
        own = run_query(path, f"SELECT * FROM {table}").rows
        assert len(own) > 1
        for source, expected in ((copy, own), (mirror, own[::-1]), (Mirror(path), own[::-1])):
            assert run_query(source, f"SELECT * FROM {table}").rows == expected
    condition = "WHERE grp > 2 AND name > 'Shop 4'"
    for sql in (
        f"SELECT count(*) FROM shop INDEXED BY by_group {condition}",
        f"SELECT count(*) FROM shop INDEXED BY by_name {condition}",
        "SELECT count(*), sum(twice) FROM shop",
    ):
        result = run_query(path, sql)
        assert result.is_ok
        assert run_query(copy, sql).rows == run_query(mirror, sql).rows == result.rows


def test_large_values_are_truncated(tmp_path: Path) -> None:
    path = tmp_path / "photos.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE p (id INTEGER PRIMARY KEY, photo)")
        rows = [(number,) for number in range(20)]
        connection.executemany("INSERT INTO p VALUES (?, zeroblob(3000000))", rows)
    [table] = content_of(path).tables
    assert len(table.rows) == 20
    assert {len(photo) for _, photo in table.rows} == {content.MAX_CELL_BYTES}


MANY_ROWS = """WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)
SELECT hex(randomblob(99)) FROM n"""
WIDE = ", ".join(f"c{i}" for i in range(1200))
PAGE_BYTES = 4096


def damaged_page(data: bytes) -> bytes:
    """A database file whose twenty-first page is garbage."""
    start = PAGE_BYTES * 20
    return data[:start] + b"\xa5" * PAGE_BYTES + data[start + PAGE_BYTES :]


@pytest.mark.parametrize(
    ("script", "damage"),
    [
        pytest.param(
            "CREATE VIRTUAL TABLE notes USING fts5(body)",
            lambda data: data.replace(b"USING fts5", b"USING fxx9"),
            id="a module that is not loaded",
        ),
        pytest.param(
            'CREATE TABLE t ("cafA" TEXT); INSERT INTO t VALUES (1)',
            lambda data: data.replace(b"cafA", b"caf\xe9"),
            id="the name of a column that is not UTF-8",
        ),
        pytest.param(
            'CREATE TABLE "cafA" (a TEXT)',
            lambda data: data.replace(b"cafA", b"caf\xe9"),
            id="the name of a table that is not UTF-8",
        ),
        pytest.param(
            "CREATE TABLE t (a [int ) ; --], b INT); INSERT INTO t VALUES (1, 2)",
            lambda data: data,
            id="an odd type",
        ),
        pytest.param(
            f"CREATE TABLE z (a); INSERT INTO z {MANY_ROWS}", damaged_page, id="a damaged page"
        ),
        pytest.param(f"CREATE TABLE w ({WIDE})", lambda data: data, id="very many columns"),
    ],
)
def test_an_answer_is_judged_although_a_table_cannot_be_read(
    tmp_path: Path, script: str, damage: Callable[[bytes], bytes]
) -> None:
    singers = (
        "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INT);"
        "INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bob', 41), (3, 'Cid', 25);"
    )
    path = make_database(tmp_path / "odd.sqlite", f"{singers} {script};")
    path.write_bytes(damage(path.read_bytes()))
    gold = "SELECT count(*) FROM singer WHERE age > 26"
    answer = "SELECT count(id) FROM singer WHERE age > 26"
    schema = schema_from_sqlite(path)
    assert "singer" in {table.name for table in schema.tables}
    assert evidence(answer, gold, schema, path, LIMITS) is Evidence.AGREES
    assert evidence("SELECT 2", gold, schema, path, LIMITS) is Evidence.DIFFERS


def test_an_index_that_cannot_be_copied_takes_nothing_from_other_answers(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a INT, integer INT)")
        rows = [(i % 5,) for i in range(50)]
        connection.executemany("INSERT INTO t (a, integer) VALUES (?, 1)", rows)
        connection.execute("CREATE INDEX j ON t (a)")
        # The text of the index is not UTF-8.
        odd_text = "'CREATE INDEX j ON t (a) -- ' || x'ff'"
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(f"UPDATE sqlite_master SET sql = {odd_text} WHERE name = 'j'")
        connection.execute("ANALYZE")
    schema = schema_from_sqlite(path)

    def found(answer: str, gold: str = "SELECT id FROM t WHERE a = 3 AND integer = 1") -> Evidence:
        assert run_query(path, answer).is_ok
        return evidence(answer, gold, schema, path, LIMITS)

    assert found("SELECT id FROM t WHERE a + 0 = 3 AND 1 = integer") is Evidence.AGREES
    assert found("SELECT id FROM t INDEXED BY j WHERE a = 3") is Evidence.UNKNOWN
    # The column `integer` has a single value, but gets others on copies.
    assert found("SELECT id FROM t WHERE a + 0 = 3") is Evidence.DIFFERS
    for table in ("sqlite_stat1", "main.sqlite_stat1", '"sqlite_stat1"'):
        answer = f"SELECT 10 FROM {table} LIMIT 1"
        assert found(answer, "SELECT count(*) FROM t WHERE a = 3") is Evidence.DIFFERS


def test_a_database_that_cannot_be_read_in_time_is_tried_once_and_gives_no_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripts = {
        name: "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT);"
        f"INSERT INTO singer VALUES (1, 'Ann', 'USA'), (2, 'Bob', '{name}');"
        for name in ("slow", "fast")
    }
    slow, fast = (
        make_database(tmp_path / f"{name}.sqlite", text) for name, text in scripts.items()
    )
    num_reads = 0

    def too_slow(db_path: Path, *_: object) -> None:
        nonlocal num_reads
        num_reads += 1
        raise DatabaseFileError(f"{db_path}: cannot be read within 20 seconds")

    schema = schema_from_sqlite(slow)
    answer = "SELECT name FROM singer WHERE country || '' = 'USA'"
    assert evidence(answer, USA, schema, fast, LIMITS) is Evidence.AGREES
    monkeypatch.setattr("mtsql.judge.content.read_tables", too_slow)
    found = [evidence(answer, USA, schema, slow, LIMITS) for _ in range(3)]
    assert found == [Evidence.UNKNOWN] * 3
    assert num_reads == 1
    assert caplog.text.count("cannot be read within 20 seconds") == 1
