"""Where a database is looked for, and what odd files and folders do."""

import json
import os
import sqlite3
from contextlib import closing

import pytest

from mtsql.judge.official_files import database_files
from mtsql.sql.database_files import DatabaseFolder
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.sandbox import run_query
from mtsql.sql.schema import schema_from_sqlite, schema_text
from mtsql.sql.tables_json import tables_entry


def make(path, script="CREATE TABLE t (a); INSERT INTO t VALUES (1)"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def load(folder, db_id="one", sql="SELECT a FROM t", tables=None):
    """The corpus of one question on a database of the folder `database`."""
    entry = [{"db_id": db_id, "question": "q", "query": sql}]
    (folder / "dev.json").write_text(json.dumps(entry))
    return load_corpus(folder / "dev.json", tables, folder / "database")


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
    path = make(tmp_path / "database" / place)
    (tmp_path / "database" / "one.txt").write_text("")
    assert load(tmp_path).databases["one"].path == path
    assert database_files("one", [tmp_path / "database"]) == [path]
    assert DatabaseFolder(tmp_path / "database").all() == {"one": path}


def test_hidden_files_of_other_programs_are_no_databases(tmp_path):
    path = make(tmp_path / "database" / "one" / "one.sqlite")
    for name in ("._one.sqlite", "one.sqlite-journal"):
        (path.parent / name).write_text("no database")
    (tmp_path / "database" / "._one.sqlite").write_text("no database")
    assert database_files("one", [tmp_path / "database"]) == [path]
    assert (
        DatabaseFolder(tmp_path / "database").all()
        == {"one": load(tmp_path).databases["one"].path}
        == {"one": path}
    )


@pytest.mark.parametrize("second", [place for place in PLACES if place != "one/one.sqlite"])
def test_two_files_of_one_id_are_named(tmp_path, second):
    paths = [make(tmp_path / "database" / place) for place in ("one/one.sqlite", second)]
    with pytest.raises(ValueError, match="database 'one' has 2 files, keep one") as error:
        load(tmp_path)
    assert all(str(path) in str(error.value) for path in paths) and "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["folder", "file"])
def test_links_are_followed_and_are_no_second_file(tmp_path, target):
    real = make(tmp_path / "elsewhere" / "one" / "one.sqlite")
    (tmp_path / "database").mkdir()
    if target == "folder":
        (tmp_path / "database" / "one").symlink_to(real.parent)
    else:
        (tmp_path / "database" / "one.sqlite").symlink_to(real)
        (tmp_path / "database" / "one.db").symlink_to(real)
    assert load(tmp_path).turns


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("database/one/One.sqlite", r"there is One.sqlite, in another case"),
        ("database/one/data.db", r"there is data.db: give it the name of its folder"),
        ("database/spider/one/one.sqlite", r"it is in .*database/spider: name that folder"),
        (
            "database/one.sqlite/one.sqlite",
            r"one/one.sqlite$",
        ),  # a folder of that name is nothing near
    ],
)
def test_what_is_there_instead_is_said(tmp_path, place, words):
    make(tmp_path / place)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_ids_are_compared_with_their_case_and_the_message_says_so(tmp_path):
    make(tmp_path / "database" / "One" / "One.sqlite")
    expected = r"no database file .*database/one/one\.sqlite \(there is One, in another case\)"
    with pytest.raises(ValueError, match=expected):
        load(tmp_path)


@pytest.mark.parametrize(
    "db_id", ["two words", "it's", 'a"b', "größe", "名", "select", "1", "a.b", "x"]
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_odd_ids_load_and_run(tmp_path, db_id, is_flat):
    folder = tmp_path / "database" / ("" if is_flat else db_id)
    make(folder / f"{db_id}.sqlite", 'CREATE TABLE "t t" ("From"); INSERT INTO "t t" VALUES (7)')
    corpus = load(tmp_path, db_id, 'SELECT "From" FROM "t t"')
    assert schema_text(corpus.databases[db_id].schema) == '"t t"("From")'
    assert corpus.databases[db_id].schema.db_id == db_id
    assert run_query(corpus.databases[db_id].path, corpus.turns[0].sql).rows == ((7,),)


@pytest.mark.parametrize("db_id", ["../victim", "/etc/x", "a/b", "..", "", "a\0", "a\nb"])
@pytest.mark.parametrize("kind", ["dialogues", "tables", "gold", "csv"])
def test_an_id_that_is_a_path_is_refused_wherever_it_is_read(tmp_path, db_id, kind):
    from mtsql.judge.official_files import read_gold
    from mtsql.sql.questions import read_conversations
    from mtsql.sql.schema import load_schemas

    make(tmp_path / "database" / "one.db")
    file = tmp_path / f"f.{'csv' if kind == 'csv' else 'json'}"
    if kind == "csv":
        file.write_text(f'db_id,question,sql\n"{db_id}",q,SELECT 1\n')
        read = read_conversations
    elif kind == "gold":
        if "\n" in db_id or "\0" in db_id:
            return  # it would end the line
        file.write_text(f"SELECT 1\t{db_id}\tx\n")
        read = read_gold
    elif kind == "tables":
        entry = tables_entry(schema_from_sqlite(tmp_path / "database" / "one.db", "one"))
        file.write_text(json.dumps([{**entry, "db_id": db_id}]))
        read = load_schemas
    else:
        file.write_text(json.dumps([{"database_id": db_id, "interaction": []}]))
        read = read_conversations
    with pytest.raises(ValueError, match=rf"{file}.*is no plain name") as error:
        read(file)
    assert "\n" not in str(error.value)


def damaged(path):
    content = bytearray(make(path).read_bytes())
    content[16:100] = b"\xff" * 84
    path.write_bytes(content)


ODD_FILES = {
    "no bytes": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("CREATE TABLE t (a);\n" * 500),
    "encrypted": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "damaged": damaged,
    "cut": lambda path: path.write_bytes(make(path).read_bytes()[:300]),
    "no tables": lambda path: make(path, "PRAGMA user_version = 1"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("has_tables", [True, False])
def test_odd_files_are_skipped_and_named(tmp_path, kind, has_tables):
    make(tmp_path / "database" / "good.sqlite")
    path = tmp_path / "database" / "one" / "one.sqlite"
    path.parent.mkdir()
    ODD_FILES[kind](path)
    entry = tables_entry(schema_from_sqlite(tmp_path / "database" / "good.sqlite"))
    tables = tmp_path / "tables.json"
    tables.write_text(json.dumps([{**entry, "db_id": db_id} for db_id in ("one", "good")]))
    entries = [
        {"db_id": db_id, "question": "q", "SQL": "SELECT a FROM t"} for db_id in ("one", "good")
    ]
    (tmp_path / "dev.json").write_text(json.dumps(entries))
    corpus = load_corpus(
        tmp_path / "dev.json", tables if has_tables else None, tmp_path / "database"
    )
    assert [turn.db_id for turn in corpus.turns] == ["good"]
    (skip,) = corpus.skipped
    assert str(path) in skip.reason and "\n" not in skip.reason


def test_a_file_in_wal_mode_in_a_folder_that_cannot_be_written(tmp_path):
    path = make(
        tmp_path / "database" / "one" / "one.sqlite",
        "PRAGMA journal_mode = WAL; CREATE TABLE t (a)",
    )
    path.parent.chmod(0o555)
    try:
        assert load(tmp_path).turns and os.listdir(path.parent) == ["one.sqlite"]
    finally:
        path.parent.chmod(0o755)


def test_changes_that_wait_beside_the_file_are_mentioned(tmp_path):
    path = make(tmp_path / "source" / "one.sqlite", "PRAGMA journal_mode = WAL")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.commit()
        (tmp_path / "database").mkdir()
        for name in ("one.sqlite", "one.sqlite-wal"):
            (tmp_path / "database" / name).write_bytes((path.parent / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no tables \(one\.sqlite-wal holds changes"):
        load(tmp_path)


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
    """The first thing that the file lacks is named; what it has besides is no matter."""
    entry = tables_entry(schema_from_sqlite(make(tmp_path / "one.sqlite", "CREATE TABLE t (a)")))
    unused = {**entry, "db_id": "unused"}
    (tmp_path / "tables.json").write_text(json.dumps([unused, entry]))
    path = make(tmp_path / "database" / "one.sqlite", script)
    if difference is None:
        assert load(tmp_path, tables=tmp_path / "tables.json").turns
        return
    with pytest.raises(ValueError) as error:
        load(tmp_path, tables=tmp_path / "tables.json")
    words = f"tables.json: entry 1 (one): the database has no {difference} in {path}"
    assert words in str(error.value) and "\n" not in str(error.value)


VIRTUAL = """CREATE TABLE t (a); CREATE VIRTUAL TABLE docs USING fts5 (title);
    CREATE VIRTUAL TABLE box USING rtree (id, x0, x1); CREATE VIEW v AS SELECT a FROM t"""


def test_virtual_tables_stay_out_of_prompts_but_may_stand_in_a_tables_json(tmp_path):
    path = make(tmp_path / "database" / "one.sqlite", VIRTUAL)
    assert not run_query(path, "SELECT title FROM docs").is_ok  # so a model need not know of it
    assert schema_text(load(tmp_path).databases["one"].schema) == "t(a)\nv(a)"
    entry = tables_entry(schema_from_sqlite(path, has_virtual=True))
    assert {"docs", "docs_content", "box", "t"} <= set(entry["table_names_original"])
    (tmp_path / "tables.json").write_text(json.dumps([entry]))
    assert len(load(tmp_path, tables=tmp_path / "tables.json").turns) == 1


def test_an_entry_without_tables_is_skipped_and_named(tmp_path):
    path = make(tmp_path / "database" / "one.sqlite")
    entry = tables_entry(schema_from_sqlite(path))
    entry |= {
        "table_names_original": [],
        "column_names_original": [[-1, "*"]],
        "column_types": ["text"],
    }
    (tmp_path / "tables.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="'one' has no tables in .*tables.json"):
        load(tmp_path, tables=tmp_path / "tables.json")
