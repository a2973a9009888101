"""Small databases and dialogue files for the tests."""

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

from mtsql.sql.dialogues import Corpus, load_corpus

COUNTER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
ENDLESS = COUNTER + "SELECT count(*) FROM n"

# trim() of a long text with these characters is slow, and no interrupt ends it.
SLOW_TRIM = f"'{'1' * 3300}0'"

SHOP = f"""
    CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);
    INSERT INTO item VALUES (1, 'pen', 1.5), (2, 'ink', NULL), (3, 'pen', 2.5);
    CREATE INDEX by_name ON item (name);
    CREATE VIEW cheap AS SELECT name FROM item WHERE price < 2;
    CREATE TRIGGER sold AFTER DELETE ON item BEGIN SELECT 1; END;
    CREATE TABLE big (i INTEGER);
    INSERT INTO big {COUNTER} SELECT i FROM n LIMIT 3000;
    CREATE TABLE latin (word TEXT);
    INSERT INTO latin VALUES (CAST(x'636166e9' AS TEXT));
    CREATE TABLE keyed (a, b, PRIMARY KEY (a, b));
    CREATE TABLE costly (a, c AS (length(trim(a, {SLOW_TRIM}))));
    CREATE VIEW long AS SELECT length(printf('%.2147483647c', 'x')) AS b;
    INSERT INTO costly (a) VALUES (hex(zeroblob(19990)));
    CREATE VIRTUAL TABLE notes USING fts5(body);
    CREATE VIRTUAL TABLE places USING rtree(id, low, high);
"""
"""The database that the sandbox tests attack: ordinary tables, and things that must be denied."""


def make_database(path: Path, script: str = "CREATE TABLE t (a); INSERT INTO t VALUES (1)") -> Path:
    """Write a database file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """File name -> hash of its content, for every file of a folder."""
    files = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tables_json(*db_ids: str, columns: tuple[str, ...] = ("a",)) -> str:
    """A tables.json that describes, for each id, a database with one table `t`."""
    names = [[-1, "*"], *([0, column] for column in columns)]
    entries = [
        {
            "db_id": db_id,
            "table_names_original": ["t"],
            "column_names_original": names,
            "column_types": ["text", *["number"] * len(columns)],
            "primary_keys": [],
            "foreign_keys": [],
        }
        for db_id in db_ids
    ]
    return json.dumps(entries)


def load_one_question(
    folder: Path, db_id: str = "one", sql: str = "SELECT a FROM t", tables: Path | None = None
) -> Corpus:
    """The corpus of one question on a database of `folder / "database"`."""
    entry = {"db_id": db_id, "question": "q", "query": sql}
    (folder / "dev.json").write_text(json.dumps([entry]))
    return load_corpus(folder / "dev.json", tables, folder / "database")
