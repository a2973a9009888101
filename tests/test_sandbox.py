"""The sandbox: one attack for each line of its docstring, and the bounds that it states."""

import os
import random
import sqlite3
import subprocess
import sys

import pytest

from helpers.databases import make_database, snapshot
from mtsql.sql.sandbox import QueryConfig, QueryResult, QueryStatus, clear_result_cache, run_query

DENIED = QueryStatus.DENIED
ERROR = QueryStatus.ERROR
TOO_LARGE = QueryStatus.TOO_LARGE


def test_rows_come_in_order_with_duplicates(shop):
    result = run_query(shop, "SELECT name, price FROM item ORDER BY id")
    assert result.rows == (("pen", 1.5), ("ink", None), ("pen", 2.5))
    assert result.columns == ("name", "price")
    assert result.is_ok and not result.is_empty and 0 < result.secs < 1


@pytest.mark.parametrize(
    "sql, rows",
    [
        ("SELECT count(*) FROM item WHERE name LIKE '%en'", ((2,),)),
        ("SELECT name FROM item UNION SELECT name FROM cheap ORDER BY 1", (("ink",), ("pen",))),
        (
            "WITH p AS (SELECT max(price) AS m FROM item) SELECT id FROM item, p WHERE price = m;",
            ((3,),),
        ),
        ("VALUES (1, 'a'), (2, 'b') -- a remark", ((1, "a"), (2, "b"))),
        (
            "SELECT name, group_concat(id) FROM item GROUP BY name HAVING count(*) > 1",
            (("pen", "1,3"),),
        ),
        ("SELECT count(*) FROM sqlite_master WHERE name = 'item'", ((1,),)),
        (
            "SELECT substr(trim(' pen '), 1, 2), round(1.26, 1), x'00', 1e999",
            (("pe", 1.3, b"\0", float("inf")),),
        ),
        ("SELECT printf('%.1f', 1.25), format('%05d', 7)", (("1.3", "00007"),)),
        (
            "SELECT ltrim(trim(rtrim(trim(' pen ')))), replace(name, 'p', 'P') FROM item "
            "WHERE trim(name) = 'ink'",
            (("pen", "ink"),),
        ),
        ("SELECT row_number() OVER (ORDER BY price DESC) FROM item WHERE id = 1", ((1,),)),
    ],
)
def test_ordinary_queries_run(shop, sql, rows):
    assert run_query(shop, sql).rows == rows


@pytest.mark.parametrize(
    "sql, is_empty",
    [
        ("SELECT id FROM item WHERE id = 9", True),
        ("SELECT max(id), NULL FROM item WHERE id = 9", True),
        ("SELECT count(*) FROM item WHERE id = 9", False),
        ("SELECT nothing", False),  # an error is not an empty result
    ],
)
def test_empty_means_no_rows_or_only_null(shop, sql, is_empty):
    assert run_query(shop, sql).is_empty is is_empty


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO item VALUES (9, 'x', 1)",
        "INSERT INTO item DEFAULT VALUES",
        "INSERT INTO item SELECT * FROM item RETURNING id",
        "REPLACE INTO item VALUES (1, 'x', 1)",
        "UPDATE item SET price = 0",
        "DELETE FROM item",
        "WITH x AS (SELECT 1) DELETE FROM item",
        "EXPLAIN DELETE FROM item",
        "EXPLAIN QUERY PLAN UPDATE item SET price = 0",
        "CREATE TABLE x (a)",
        "CREATE TABLE x AS SELECT 1",
        "CREATE TEMP TABLE x (a)",
        "CREATE INDEX x ON item (price)",
        "CREATE VIEW x AS SELECT 1",
        "CREATE TEMP VIEW x AS SELECT 1",
        "CREATE TRIGGER x AFTER DELETE ON item BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE x USING fts5(a)",
        "DROP TABLE item",
        "DROP TABLE IF EXISTS item",
        "DROP INDEX by_name",
        "DROP VIEW cheap",
        "DROP TRIGGER sold",
        "ALTER TABLE item RENAME TO thing",
        "ALTER TABLE item ADD COLUMN x",
        "ALTER TABLE item DROP COLUMN price",
        "ALTER TABLE item RENAME COLUMN price TO cost",
        "REINDEX",
        "REINDEX by_name",
        "ANALYZE",
        "ANALYZE item",
        "VACUUM",
        "VACUUM INTO 'copy.sqlite'",
        "BEGIN",
        "BEGIN EXCLUSIVE",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT x",
        "RELEASE x",
        "ATTACH 'new.sqlite' AS other",
        "ATTACH ':memory:' AS other",
        "ATTACH '' AS other",
        "DETACH main",
        "PRAGMA table_info(item)",
        "PRAGMA query_only = 0",
        "PRAGMA writable_schema = 1",
        "PRAGMA journal_mode = WAL",
        "PRAGMA temp_store_directory = '/tmp'",
        "PRAGMA hard_heap_limit = 0",
        "PRAGMA user_version = 7",
        "SELECT load_extension('libm.so')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT * FROM pragma_table_info('item')",
        "SELECT * FROM pragma_database_list",
        "SELECT name FROM item WHERE 1 IN (SELECT 1 FROM pragma_function_list)",
        "SELECT * FROM json_each('[1]')",
        "SELECT * FROM dbstat",
        "SELECT * FROM sqlite_stmt",
        "SELECT count(*) FROM sqlite_stmt",
        "SELECT * FROM notes",
        "SELECT id FROM places WHERE low > 1",
        "INSERT INTO notes(notes) VALUES ('rebuild')",
    ],
)
def test_everything_except_reading_is_denied(shop, tmp_path, monkeypatch, sql):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time on the connection that has denied the query before
        clear_result_cache()
        result = run_query(shop, sql)
        assert (result.status, result.rows) == (DENIED, ()) and result.message
    assert list(tmp_path.iterdir()) == []
    assert run_query(shop, "SELECT count(*) FROM item").rows == ((3,),)


def test_a_name_written_as_text_reaches_no_other_file(shop, tmp_path):
    secret = make_database(tmp_path / "secret.sqlite", "CREATE TABLE hidden (a)")
    assert run_query(shop, f"ATTACH 'file:{secret}?mode=rw' AS s").status is DENIED
    assert run_query(shop, "SELECT * FROM s.hidden").message == "no such table: s.hidden"


def test_gold_sql_of_an_earlier_query_cannot_be_read(shop):
    """SQLite's own table `sqlite_stmt` shows the statements that the connection ran before."""
    run_query(shop, "SELECT 'the gold SQL'")
    for sql in (
        "SELECT sql FROM sqlite_stmt",
        "SELECT * FROM main.sqlite_stmt AS s WHERE s.sql LIKE '%gold%'",
    ):
        assert run_query(shop, sql).status is DENIED


@pytest.mark.parametrize(
    "sql, message",
    [
        ("SELECT i FROM big", "more than 1000 rows"),
        ("SELECT a.i, b.i FROM big a, big b", "more than 1000 rows"),
        ("SELECT i, i, i, i, i, i FROM big", "more than 5000 cells"),
        ("SELECT hex(zeroblob(15000)) || i FROM big", "more than 1000000 bytes of rows"),
        ("SELECT zeroblob(30000) FROM big", "more than 1000000 bytes of rows"),
    ],
)
def test_results_are_counted_while_fetched(shop, sql, message):
    limits = QueryConfig(max_rows=1000, max_cells=5000, max_bytes=1_000_000)
    result = run_query(shop, sql, limits)
    assert (result.status, result.rows, result.message) == (TOO_LARGE, (), message)
    assert result.secs < 1


def test_limits_are_inclusive(shop):
    limits = QueryConfig(max_rows=3, max_cells=6)
    assert len(run_query(shop, "SELECT id, name FROM item", limits).rows) == 3
    assert run_query(shop, "SELECT id, name FROM item", QueryConfig(max_rows=2)).status is TOO_LARGE
    assert (
        run_query(shop, "SELECT id, name FROM item", QueryConfig(max_cells=5)).status is TOO_LARGE
    )


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT randomblob(900000000)",
        "SELECT length(zeroblob(900000000))",
        "SELECT hex(zeroblob(39000))",
        "SELECT replace(hex(zeroblob(10000)), '0', 'xxxxxxxxxx')",
        "SELECT replace(replace(replace('aaaaaaaa', 'a', 'aaaaaaaa'), 'a', 'aaaaaaaa'), 'a', "
        "zeroblob(100))",
        "SELECT group_concat(hex(zeroblob(500))) FROM big",
        "SELECT json_group_array(hex(zeroblob(500))) FROM big",
        "SELECT group_concat(a.i) FROM big a, big b",
        "SELECT quote(zeroblob(39000))",
        "SELECT '" + "x" * 20_001 + "'",
    ],
)
def test_values_and_texts_that_are_too_long_end_the_query(shop, sql):
    result = run_query(shop, sql)
    assert (result.status, result.rows) == (TOO_LARGE, ()) and result.message


@pytest.mark.parametrize(
    "sql, message",
    [
        ("", "the text holds no query"),
        (" ; -- nothing", "the text holds no query"),
        ("SELECT", "incomplete input"),
        ("SELECT * FROM nowhere", "no such table: nowhere"),
        ("SELECT count(", "incomplete input"),
        ("DELETE FROM sqlite_master", "table sqlite_master may not be modified"),
        ("SELECT 1; SELECT 2", "You can only execute one statement at a time."),
        ("SELECT 1; DROP TABLE item", "You can only execute one statement at a time."),
        ("SELECT 1\0; DROP TABLE item", "the query contains a null character"),
        ("SELECT '\ud800'", "surrogates not allowed"),
        ("SELECT ?", "Incorrect number of bindings"),
        ("SELECT :name", "Incorrect number of bindings"),
        ("SELECT '\u202e\U0001f4a3", 'unrecognized token: "\'\u202e\U0001f4a3"'),
        ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "parser stack overflow"),
        ("SELECT -- 1\n" + "~" * 5000 + "1", "parser stack overflow"),
        ("SELECT " + "1+" * 5000 + "1", "Expression tree is too large (maximum depth 200)"),
        ("SELECT " + "abs(" * 60 + "1" + ")" * 60, "parser stack overflow"),
        ("SELECT 1" + " UNION SELECT 1" * 100, "too many terms in compound SELECT"),
        (
            "SELECT * FROM " + ", ".join(f"item a{i}" for i in range(65)),
            "at most 64 tables in a join",
        ),
        ("SELECT " + ", ".join(["1"] * 2001), "too many columns in result set"),
    ],
)
def test_bad_sql_is_an_error_with_the_message_of_sqlite(shop, sql, message):
    result = run_query(shop, sql)
    assert (result.status, result.rows, result.columns) == (ERROR, (), ())
    assert message in result.message


def test_invalid_utf8_in_the_file_is_dropped(shop):
    assert run_query(shop, "SELECT word FROM latin").rows == (("caf",),)


def test_files_that_are_no_databases_are_errors(shop, tmp_path):
    (tmp_path / "empty.sqlite").write_bytes(b"")
    (tmp_path / "text.sqlite").write_bytes(b"no database at all " * 500)
    (tmp_path / "header.sqlite").write_bytes(shop.read_bytes()[:100])
    os.mkfifo(tmp_path / "pipe.sqlite")
    before = sorted(p.name for p in tmp_path.iterdir())
    for path, message in [
        (tmp_path / "missing.sqlite", "missing.sqlite: No such file or directory"),
        (tmp_path / "no folder" / "x.sqlite", "No such file or directory"),
        (tmp_path / "empty.sqlite", "empty.sqlite: an empty file, no database"),
        (tmp_path / "text.sqlite", "file is not a database"),
        (tmp_path / "header.sqlite", "database disk image is malformed"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe.sqlite", "pipe.sqlite: not a file"),
        (tmp_path / "nul\0.sqlite", "embedded null"),
    ]:
        result = run_query(path, "SELECT * FROM item")
        assert result.status is ERROR and message in result.message
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_corrupt_pages_never_raise(shop, tmp_path):
    content = shop.read_bytes()
    generator = random.Random(0)
    for number in range(60):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[generator.randrange(100, len(damaged))] = generator.randrange(256)
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(damaged)
        for sql in (
            "SELECT * FROM item ORDER BY name",
            "SELECT sum(i) FROM big",
            "SELECT name FROM sqlite_master",
        ):
            result = run_query(path, sql, QueryConfig(timeout_secs=0.2))
            assert isinstance(result, QueryResult) and (result.is_ok or result.message)


def test_a_locked_database_is_read_without_its_wal_file(tmp_path):
    path = tmp_path / "live.sqlite"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    writer.execute("BEGIN EXCLUSIVE")
    assert run_query(path, "SELECT a FROM t").rows == ((1,),)
    writer.execute("ROLLBACK")
    writer.executescript("PRAGMA journal_mode = WAL; INSERT INTO t VALUES (2);")
    before = snapshot(tmp_path)
    assert "live.sqlite-wal" in before
    assert run_query(path, "SELECT a FROM t").rows == ((1,),)  # as of the last checkpoint
    assert snapshot(tmp_path) == before
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert run_query(path, "SELECT a FROM t").rows == ((1,), (2,))
    writer.close()


def test_a_journal_is_neither_rolled_back_nor_removed(tmp_path):
    """A writer died in the middle of a transaction. SQLite itself would repair the file when it is
    opened the next time."""
    path = tmp_path / "live.sqlite"
    code = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.executescript("PRAGMA cache_size = 1; CREATE TABLE t (a); INSERT INTO t VALUES (1);")
connection.execute("BEGIN")
connection.executemany("INSERT INTO t VALUES (?)", [("x" * 3000,)] * 200)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, path], check=True)
    before = snapshot(tmp_path)
    assert "live.sqlite-journal" in before
    assert run_query(path, "SELECT a FROM t WHERE a = 1").rows == ((1,),)
    assert snapshot(tmp_path) == before


def test_a_changed_or_replaced_file_gives_fresh_rows(tmp_path):
    path = tmp_path / "x.sqlite"
    for number in range(5):
        make_database(
            path, f"DROP TABLE IF EXISTS t; CREATE TABLE t (a); INSERT INTO t VALUES ({number});"
        )
        assert run_query(path, "SELECT a FROM t").rows == ((number,),)
    script = "CREATE TABLE t (a); INSERT INTO t VALUES ('other');"
    other = make_database(tmp_path / "y.sqlite", script)
    info = path.stat()
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert other.stat().st_size == info.st_size
    other.replace(path)
    assert run_query(path, "SELECT a FROM t").rows == (("other",),)
    path.unlink()
    assert run_query(path, "SELECT a FROM t").status is ERROR


def test_random_numbers_depend_on_the_text_of_the_query_only(shop):
    sql = """SELECT id, random(), hex(randomblob(9)), length(randomblob(20000)) FROM item
             ORDER BY random()"""
    first = run_query(shop, sql)
    clear_result_cache()
    second = run_query(shop, sql)
    other = run_query(shop, sql + " LIMIT 3")
    assert first.rows == second.rows
    assert first.rows != other.rows and len(first.rows) == 3
    numbers = [row[1] for row in first.rows + other.rows]
    assert len(set(numbers)) == 6 and min(numbers) < 0 < max(numbers)
    assert first.rows[0][3] == 20000


def test_results_are_cached_by_the_content_of_the_file(shop, tmp_path, monkeypatch):
    sql = "SELECT count(*) FROM item WHERE id < 3"
    first = run_query(shop, sql)
    monkeypatch.setattr("mtsql.sql.sandbox.the_pool", None)  # no worker can be asked
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(shop.read_bytes())
    assert run_query(copy, sql) is first
    with pytest.raises(TypeError):
        run_query(shop, sql, QueryConfig(max_rows=5))  # other limits need another run
