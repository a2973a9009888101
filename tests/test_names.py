"""Names that SQL must quote, and ids of databases, which become a part of a path."""

import ctypes
import ctypes.util
import sqlite3

import pytest

from mtsql.sql.names import RESERVED, checked_id, quoted

KEYWORDS = """
    ABORT ACTION ADD AFTER ALL ALTER ALWAYS ANALYZE AND AS ASC ATTACH AUTOINCREMENT BEFORE BEGIN
    BETWEEN BY CASCADE CASE CAST CHECK COLLATE COLUMN COMMIT CONFLICT CONSTRAINT CREATE CROSS
    CURRENT CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP DATABASE DEFAULT DEFERRABLE DEFERRED DELETE
    DESC DETACH DISTINCT DO DROP EACH ELSE END ESCAPE EXCEPT EXCLUDE EXCLUSIVE EXISTS EXPLAIN FAIL
    FILTER FIRST FOLLOWING FOR FOREIGN FROM FULL GENERATED GLOB GROUP GROUPS HAVING IF IGNORE
    IMMEDIATE IN INDEX INDEXED INITIALLY INNER INSERT INSTEAD INTERSECT INTO IS ISNULL JOIN KEY LAST
    LEFT LIKE LIMIT MATCH MATERIALIZED NATURAL NO NOT NOTHING NOTNULL NULL NULLS OF OFFSET ON OR
    ORDER OTHERS OUTER OVER PARTITION PLAN PRAGMA PRECEDING PRIMARY QUERY RAISE RANGE RECURSIVE
    REFERENCES REGEXP REINDEX RELEASE RENAME REPLACE RESTRICT RETURNING RIGHT ROLLBACK ROW ROWS
    SAVEPOINT SELECT SET TABLE TEMP TEMPORARY THEN TIES TO TRANSACTION TRIGGER UNBOUNDED UNION
    UNIQUE UPDATE USING VACUUM VALUES VIEW VIRTUAL WHEN WHERE WINDOW WITH WITHOUT""".split()


def library_keywords() -> list[str]:
    """The keywords of the SQLite library if ctypes finds it; else those of its manual."""
    path = ctypes.util.find_library("sqlite3")
    library = ctypes.CDLL(path) if path else None
    if not hasattr(library, "sqlite3_keyword_name"):
        return KEYWORDS
    words = []
    name = ctypes.c_char_p()
    size = ctypes.c_int()
    for index in range(library.sqlite3_keyword_count()):
        library.sqlite3_keyword_name(index, ctypes.byref(name), ctypes.byref(size))
        words.append(ctypes.string_at(name, size.value).decode())
    return words


USES = (
    "SELECT {k}, t.{k} FROM t WHERE {k} = 'v' GROUP BY {k} HAVING {k} = 'v' ORDER BY {k}",
    "SELECT max({k}), count(DISTINCT {k}) FROM t WHERE {k} BETWEEN {k} AND {k}",
    "SELECT CASE WHEN {k} = 'v' THEN {k} ELSE {k} END FROM t WHERE a = 1 AND {k} LIKE 'v'",
    "SELECT b FROM {k} WHERE c = 1 UNION SELECT {k} FROM t",
    "SELECT {k}.b FROM t JOIN {k} ON t.a = {k}.c",
    "SELECT T2.b FROM {k} AS T2, t WHERE T2.c = t.a",
    "SELECT b FROM t LEFT JOIN {k} ON a = c",
)


@pytest.mark.parametrize("name", sorted({*KEYWORDS, *library_keywords()}))
def test_every_keyword_can_be_a_name_as_quoted_writes_it(name):
    connection = sqlite3.connect(":memory:")
    connection.execute(f'CREATE TABLE t (a INT, "{name}" TEXT)')
    connection.execute("INSERT INTO t VALUES (1, 'v')")
    connection.execute(f'CREATE TABLE "{name}" (b TEXT, c INT)')
    connection.execute(f"INSERT INTO \"{name}\" VALUES ('v', 1)")
    for written in (quoted(name), quoted(name.lower())):
        for use in USES:
            rows = connection.execute(use.format(k=written)).fetchall()
            assert rows == connection.execute(use.format(k=f'"{name}"')).fetchall()
    connection.close()


def test_a_name_that_needs_no_quotes_gets_none():
    assert set(KEYWORDS) >= RESERVED
    for name in ("Key", "year", "desc", "a1", "_x"):
        assert quoted(name) == name


@pytest.mark.parametrize(
    "name",
    ["1st", "two words", 'a"b', "é", "größe", "名", "a-b", "x.y", "", "a\nb", "'", "[x]", "`"],
)
def test_odd_names_are_quoted_so_that_sqlite_finds_them(name):
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE {quoted(name + 't')} ({quoted(name)} INT)")
    connection.execute(f"SELECT {quoted(name)} FROM {quoted(name + 't')}")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [(name + "t",)]
    connection.close()


BAD_IDS = [
    "",
    " ",
    ".",
    "..",
    "../victim",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "..\\x",
    "a\0b",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x7f",
    "a\x85",
    "\u2028",
    "\ud83d",
]


@pytest.mark.parametrize("db_id", BAD_IDS)
def test_an_id_that_is_no_plain_name_is_refused(db_id):
    words = r"^file, line 3: the database id .* is no plain name"
    with pytest.raises(ValueError, match=words) as error:
        checked_id(db_id, "file, line 3")
    assert "\n" not in str(error.value) and str(error.value).isascii()


@pytest.mark.parametrize(
    "db_id", ["a", "concert singer", "größe", "it's", 'a"b', "..a", "a.b", "select"]
)
def test_an_unusual_id_that_can_be_a_file_name_is_accepted(db_id):
    assert checked_id(db_id, "x") == db_id
