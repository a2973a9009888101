"""Where the file of a database is looked for, and what wrong files and folders do."""

import json
import os
import sqlite3
from contextlib import closing

import pytest

from helpers.databases import load_one_question, make_database, tables_json
from mtsql.judge.official_files import database_files, read_gold
from mtsql.sql.database_files import DatabaseFolder
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.questions import read_conversations
from mtsql.sql.sandbox import run_query
from mtsql.sql.schema import load_schemas, schema_from_sqlite, schema_text
from mtsql.sql.tables_json import tables_entry

PLACES = [
    "one/one.sqlite",
    "one/one.SQLITE",
    "one/one.sqlite3",
    "one/one.db",
    "one/one.DB",
    "one/one.db3",
    "one.sqlite",
    "one.sqlite3",
    "one.db",
    "one.Db",
]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_ending_is_found(tmp_path, place):
    path = make_database(tmp_path / "database" / place)
    (tmp_path / "database" / "one.txt").write_text("")
    assert load_one_question(tmp_path).databases["one"].path == path
    assert database_files("one", [tmp_path / "database"]) == [path]
    assert DatabaseFolder(tmp_path / "database").all() == {"one": path}


def test_hidden_files_of_other_programs_are_no_databases(tmp_path):
    path = make_database(tmp_path / "database" / "one" / "one.sqlite")
    for name in ("._one.sqlite", "one.sqlite-journal"):
        (path.parent / name).write_text("no database")
    (tmp_path / "database" / "._one.sqlite").write_text("no database")
    assert database_files("one", [tmp_path / "database"]) == [path]
    assert DatabaseFolder(tmp_path / "database").all() == {"one": path}
    assert load_one_question(tmp_path).databases["one"].path == path


@pytest.mark.parametrize("second", [place for place in PLACES if place != "one/one.sqlite"])
def test_two_files_of_one_id_are_named(tmp_path, second):
    paths = [make_database(tmp_path / "database" / place) for place in ("one/one.sqlite", second)]
    with pytest.raises(ValueError, match="database 'one' has 2 files, keep one") as error:
        load_one_question(tmp_path)
    assert all(str(path) in str(error.value) for path in paths) and "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["folder", "file"])
def test_links_are_followed_and_are_no_second_file(tmp_path, target):
    real = make_database(tmp_path / "elsewhere" / "one" / "one.sqlite")
    (tmp_path / "database").mkdir()
    if target == "folder":
        (tmp_path / "database" / "one").symlink_to(real.parent)
    else:
        (tmp_path / "database" / "one.sqlite").symlink_to(real)
        (tmp_path / "database" / "one.db").symlink_to(real)
    assert load_one_question(tmp_path).turns


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("database/one/One.sqlite", r"there is One.sqlite, in another case"),
        ("database/one/data.db", r"there is data.db: give it the name of its folder"),
        ("database/spider/one/one.sqlite", r"it is in .*database/spider: name that folder"),
        ("database/one.sqlite/one.sqlite", r"one/one.sqlite$"),  # a folder is not mentioned
    ],
)
def test_the_error_names_a_similar_file_or_folder(tmp_path, place, words):
    make_database(tmp_path / place)
    with pytest.raises(ValueError, match=words):
        load_one_question(tmp_path)


def test_ids_are_compared_with_their_case_and_the_message_says_so(tmp_path):
    make_database(tmp_path / "database" / "One" / "One.sqlite")
    expected = r"no database file .*database/one/one\.sqlite \(there is One, in another case\)"
    with pytest.raises(ValueError, match=expected):
        load_one_question(tmp_path)


@pytest.mark.parametrize(
    "db_id", ["two words", "it's", 'a"b', "größe", "名", "select", "1", "a.b", "x"]
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_odd_ids_load_and_run(tmp_path, db_id, is_flat):
    folder = tmp_path / "database"
    if not is_flat:
        folder /= db_id
    make_database(
        folder / f"{db_id}.sqlite", 'CREATE TABLE "t t" ("From"); INSERT INTO "t t" VALUES (7)'
    )
    corpus = load_one_question(tmp_path, db_id, 'SELECT "From" FROM "t t"')
    assert schema_text(corpus.databases[db_id].schema) == '"t t"("From")'
    assert corpus.databases[db_id].schema.db_id == db_id
    assert run_query(corpus.databases[db_id].path, corpus.turns[0].sql).rows == ((7,),)


@pytest.mark.parametrize("db_id", ["../victim", "/etc/x", "a/b", "..", "", "a\0", "a\nb"])
@pytest.mark.parametrize("name", ["dialogues.json", "tables.json", "gold.txt", "dialogues.csv"])
def test_an_id_that_is_a_path_is_refused_in_every_file(tmp_path, db_id, name):
    file = tmp_path / name
    if name == "dialogues.csv":
        file.write_text(f'db_id,question,sql\n"{db_id}",q,SELECT 1\n')
        read = read_conversations
    elif name == "gold.txt":
        if "\n" in db_id or "\0" in db_id:
            return  # it would end the line
        file.write_text(f"SELECT 1\t{db_id}\tx\n")
        read = read_gold
    elif name == "tables.json":
        file.write_text(tables_json(db_id))
        read = load_schemas
    else:
        file.write_text(json.dumps([{"database_id": db_id, "interaction": []}]))
        read = read_conversations
    with pytest.raises(ValueError, match=rf"{file}.*is no plain name") as error:
        read(file)
    assert "\n" not in str(error.value)


def write_damaged(path):
    content = bytearray(make_database(path).read_bytes())
    content[16:100] = b"\xff" * 84
    path.write_bytes(content)


ODD_FILES = {
    "no bytes": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("CREATE TABLE t (a);\n" * 500),
    "encrypted": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "damaged": write_damaged,
    "truncated": lambda path: path.write_bytes(make_database(path).read_bytes()[:300]),
    "no tables": lambda path: make_database(path, "PRAGMA user_version = 1"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("has_tables", [True, False])
def test_odd_files_are_skipped_and_named(tmp_path, kind, has_tables):
    make_database(tmp_path / "database" / "good.sqlite")
    path = tmp_path / "database" / "one" / "one.sqlite"
    path.parent.mkdir()
    ODD_FILES[kind](path)
    tables = None
    if has_tables:
        tables = tmp_path / "tables.json"
        tables.write_text(tables_json("one", "good"))
    question = {"question": "q", "SQL": "SELECT a FROM t"}
    entries = [{"db_id": db_id, **question} for db_id in ("one", "good")]
    (tmp_path / "dev.json").write_text(json.dumps(entries))
    corpus = load_corpus(tmp_path / "dev.json", tables, tmp_path / "database")
    assert [turn.db_id for turn in corpus.turns] == ["good"]
    (skip,) = corpus.skipped
    assert str(path) in skip.reason and "\n" not in skip.reason


def test_a_file_in_wal_mode_is_read_in_a_folder_that_cannot_be_written(tmp_path):
    path = make_database(
        tmp_path / "database" / "one" / "one.sqlite",
        "PRAGMA journal_mode = WAL; CREATE TABLE t (a)",
    )
    path.parent.chmod(0o555)
    try:
        assert load_one_question(tmp_path).turns and os.listdir(path.parent) == ["one.sqlite"]
    finally:
        path.parent.chmod(0o755)


def test_the_error_mentions_changes_in_a_wal_file(tmp_path):
    path = make_database(tmp_path / "source" / "one.sqlite", "PRAGMA journal_mode = WAL")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.commit()
        (tmp_path / "database").mkdir()
        for name in ("one.sqlite", "one.sqlite-wal"):
            (tmp_path / "database" / name).write_bytes((path.parent / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no tables \(one\.sqlite-wal holds changes"):
        load_one_question(tmp_path)


@pytest.mark.parametrize(
    ("script", "difference"),
    [
        ("CREATE TABLE T (A)", None),
        ("CREATE TABLE t (a, more); CREATE TABLE more (b)", None),
        ("CREATE TABLE t (b)", "column t.a"),
        ("CREATE TABLE u (a)", "table t"),
        ("CREATE TABLE t (ä)", "column t.a"),
    ],
)
def test_tables_json_must_describe_the_file(tmp_path, script, difference):
    """The error names the first table or column that the file lacks. The file may have more."""
    (tmp_path / "tables.json").write_text(tables_json("unused", "one"))
    path = make_database(tmp_path / "database" / "one.sqlite", script)
    if difference is None:
        assert load_one_question(tmp_path, tables=tmp_path / "tables.json").turns
        return
    with pytest.raises(ValueError) as error:
        load_one_question(tmp_path, tables=tmp_path / "tables.json")
    words = f"tables.json: entry 1 (one): the database has no {difference} in {path}"
    assert words in str(error.value) and "\n" not in str(error.value)


VIRTUAL = """CREATE TABLE t (a); CREATE VIRTUAL TABLE docs USING fts5 (title);
    CREATE VIRTUAL TABLE box USING rtree (id, x0, x1); CREATE VIEW v AS SELECT a FROM t"""


def test_virtual_tables_are_not_in_prompts_but_may_be_in_a_tables_json(tmp_path):
    path = make_database(tmp_path / "database" / "one.sqlite", VIRTUAL)
    assert not run_query(path, "SELECT title FROM docs").is_ok  # so no prompt needs to show it
    assert schema_text(load_one_question(tmp_path).databases["one"].schema) == "t(a)\nv(a)"
    entry = tables_entry(schema_from_sqlite(path, has_virtual=True))
    assert {"docs", "docs_content", "box", "t"} <= set(entry["table_names_original"])
    (tmp_path / "tables.json").write_text(json.dumps([entry]))
    assert len(load_one_question(tmp_path, tables=tmp_path / "tables.json").turns) == 1


def test_an_entry_without_tables_is_skipped_and_named(tmp_path):
    path = make_database(tmp_path / "database" / "one.sqlite")
    entry = tables_entry(schema_from_sqlite(path))
    entry |= {
        "table_names_original": [],
        "column_names_original": [[-1, "*"]],
        "column_types": ["text"],
    }
    (tmp_path / "tables.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="'one' has no tables in .*tables.json"):
        load_one_question(tmp_path, tables=tmp_path / "tables.json")
