"""The sub-commands of mtsql: schema, score, audit. A wrong flag ends each of them with one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.databases import make_database
from mtsql.__main__ import COMMANDS, main
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.schema import Column, load_schemas, schema_from_sqlite
from mtsql.sql.tables_json import official_type, tables_entry

ORDERS = """
    CREATE TABLE "order"
        (Id INTEGER PRIMARY KEY, "From" VARCHAR(9), born DATE, paid BOOLEAN, x BLOB, "é" );
    CREATE TABLE item (b INT, a INT, price DECIMAL(5, 2), PRIMARY KEY (a, b));
    CREATE TABLE part
        (p INT, q INT, o INT REFERENCES "ORDER", FOREIGN KEY (p, q) REFERENCES item (a, b));
    CREATE VIEW "two words" AS SELECT price FROM item;
"""


def with_official_types(schema):
    tables = []
    for table in schema.tables:
        columns = [Column(column.name, official_type(column.type)) for column in table.columns]
        tables.append(replace(table, columns=tuple(columns)))
    return replace(schema, tables=tuple(tables))


def test_the_schema_of_a_file_without_tables_json_is_printed(tmp_path, capsys):
    path = make_database(tmp_path / "my shop.sqlite3", ORDERS)
    main(["schema", str(path)])
    text = capsys.readouterr().out
    (tmp_path / "tables.json").write_text(text)
    own = schema_from_sqlite(path)
    assert load_schemas(tmp_path / "tables.json") == {"my shop": with_official_types(own)}
    assert json.loads(text) == [
        {
            "db_id": "my shop",
            "table_names_original": ["order", "item", "part", "two words"],
            "table_names": ["order", "item", "part", "two words"],
            "column_names_original": [
                [-1, "*"],
                *([0, name] for name in ("Id", "From", "born", "paid", "x", "é")),
                *([1, name] for name in ("b", "a", "price")),
                *([2, name] for name in ("p", "q", "o")),
                [3, "price"],
            ],
            "column_names": [
                [-1, "*"],
                *([0, name] for name in ("id", "from", "born", "paid", "x", "é")),
                *([1, name] for name in ("b", "a", "price")),
                *([2, name] for name in ("p", "q", "o")),
                [3, "price"],
            ],
            "column_types": [
                "text",
                *("number", "text", "time", "boolean", "others", "text"),
                *["number"] * 7,
            ],
            "primary_keys": [1, 8, 7],
            "foreign_keys": [[12, 1], [10, 8], [11, 7]],
        }
    ]


def test_the_schemas_of_a_folder_load_as_a_data_set(tmp_path, capsys):
    make_database(tmp_path / "db" / "a" / "a.sqlite", ORDERS)
    make_database(tmp_path / "db" / "b.db", "CREATE TABLE t (a)")
    (tmp_path / "db" / "notes").mkdir()
    (tmp_path / "db" / "read.me").write_text("")
    (tmp_path / "db" / "._b.db").write_text("a hidden file of another system")
    main(["schema", str(tmp_path / "db")])
    (tmp_path / "tables.json").write_text(capsys.readouterr().out)
    assert list(load_schemas(tmp_path / "tables.json")) == ["a", "b"]
    (tmp_path / "dev.csv").write_text("db_id,question,sql\na,q,SELECT 1\nb,q,SELECT 2\n")
    corpus = load_corpus(tmp_path / "dev.csv", tmp_path / "tables.json", tmp_path / "db")
    assert len(corpus.turns) == 2 and not corpus.skipped


@pytest.mark.parametrize(
    ("declared", "official"),
    [
        ("", "text"),
        ("VARCHAR(20)", "text"),
        ("nvarchar", "text"),
        ("INTEGER", "number"),
        ("real", "number"),
        ("double precision", "number"),
        ("decimal(4,2)", "number"),
        ("datetime", "time"),
        ("YEAR", "time"),
        ("timestamp", "time"),
        ("bool", "boolean"),
        ("BOOLEAN", "boolean"),
        ("blob", "others"),
        ("point", "number"),
        ("geometry", "others"),
    ],
)
def test_declared_types_become_the_official_ones(declared, official):
    assert official_type(declared) == official


def test_derived_types_are_mostly_those_of_the_official_file(shared):
    official = load_schemas(shared / "data" / "tables.json")
    num_equal = 0
    num_total = 0
    for db_id in list(official)[::10]:
        path = shared / "data" / "database" / db_id / f"{db_id}.sqlite"
        if not path.exists():
            continue
        entry = tables_entry(schema_from_sqlite(path))
        names = [tuple(pair) for pair in entry["column_names"]]
        types = dict(zip(names, entry["column_types"], strict=True))
        for number, table in enumerate(official[db_id].tables):
            for column in table.columns:
                kind = types.get((number, column.name.lower().replace("_", " ")))
                num_equal += kind == column.type
                num_total += kind is not None
    assert num_total > 300 and num_equal / num_total > 0.98


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: good and wrong files under names that the tests below put into flags."""
    monkeypatch.chdir(tmp_path)
    make_database(tmp_path / "db" / "one" / "one.sqlite")
    make_database(tmp_path / "twice" / "one" / "one.sqlite")
    make_database(tmp_path / "twice" / "one.db")
    make_database(tmp_path / "bare.sqlite", "PRAGMA user_version = 1")
    (tmp_path / "none").mkdir()
    (tmp_path / "lfs" / "one").mkdir(parents=True)
    (tmp_path / "lfs" / "one" / "one.sqlite").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    (tmp_path / "file").write_text("no database")
    (tmp_path / "empty").write_text("")
    (tmp_path / "gold").write_text("SELECT a FROM t\tone\n")
    (tmp_path / "gold_two").write_text("SELECT a FROM t\ttwo\n")
    (tmp_path / "pred").write_text("SELECT a FROM t\n")
    (tmp_path / "good.json").write_text(
        json.dumps([{"db_id": "one", "question": "q", "query": "SELECT a FROM t"}])
    )
    entry = tables_entry(schema_from_sqlite(tmp_path / "db" / "one" / "one.sqlite"))
    (tmp_path / "tables").write_text(json.dumps([entry, {**entry, "db_id": "two"}]))
    return tmp_path


def error_of(run):
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        run()
    text = stop.value.code  # Python prints it and exits with 1
    assert text.startswith("error: ") and text.strip().count("\n") == 0, text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "FILE_OR_FOLDER"),
        ("nowhere.sqlite", "nowhere.sqlite: No such file"),
        ("file", "file: not a readable SQLite database"),
        ("empty", "empty: an empty file"),
        ("bare.sqlite", "bare.sqlite: the database has no tables"),
        ("none", "none: no database in this folder"),
        ("twice", "database 'one' has 2 files"),
        ("db db/one/one.sqlite", "two files for the database 'one'"),
        ("db file", "file: not a readable SQLite database"),
        ("--out x db", "--out"),
    ],
)
def test_wrong_arguments_of_schema_are_named(folder, capsys, arguments, words):
    assert words in error_of(lambda: main(["schema", *arguments.split()]))
    assert capsys.readouterr().out == ""  # no part of the result is printed


@pytest.mark.parametrize("name", ["a\nb.sqlite", "a\\b.sqlite", b"\xff.sqlite"])
def test_a_file_whose_name_is_no_id_is_refused(folder, capsys, name):
    path = os.fsdecode(name)
    make_database(folder / "odd.sqlite").rename(folder / path)
    assert "is no plain name" in error_of(lambda: main(["schema", str(folder / path)]))


SCORE = "--gold gold --pred pred --tables tables --databases db"


def test_the_scorer_prints_and_writes_its_summary(folder, capsys):
    main(["score", *SCORE.split(), "--json", "new/out.json"])
    assert "exact match" in capsys.readouterr().out
    found = json.loads((folder / "new" / "out.json").read_text())
    assert found["summary"]["by_hardness"]["all"]["ex"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gold", "--gold"),
        ("--gold nowhere", "nowhere: cannot be read"),
        ("--gold pred", "pred:1: expected SQL<TAB>database id"),
        ("--pred none", "none: cannot be read"),
        ("--pred empty", "1 and 0 interactions"),
        ("--tables file", "file: not JSON"),
        ("--databases nowhere", "--databases nowhere: no such folder"),
        ("--databases db file", "--databases file: no such folder"),
        ("--databases none", "gold:1: none: no one/one.sqlite"),
        ("--databases lfs", "gold:1: lfs/one/one.sqlite: not an SQLite database"),
        ("--gold gold_two", "gold_two:1: db: no two/two.sqlite"),
        ("--etype both", "etype is both: expected one of all, match, exec"),
        ("--threads 0", "threads must be at least 1, not 0"),
        ("--threads many", "threads is many: expected a whole number"),
        ("--max_steps -5", "max_steps must be at least 1, not -5"),
        ("--max_steps 1e6", "max_steps is 1000000.0: expected a whole number"),
        ("--max_steps 9999999999999999", "max_steps: expected at most"),
        ("--ex bird", "ex is bird: expected one of official, set"),
        ("--ex set --etype match", "ex is set: etype match does not go with it"),
        ("--ex set --plug_value", "ex is set: plug_value does not go with it"),
        ("--json none", "--json none: a folder stands there"),
        ("--json file/x", "file/x: cannot be written"),
        ("--nope", "unknown flag --nope"),
        ("--thread 2", "unknown flag --thread (did you mean --threads?)"),
        ("--keep-distinct", "unknown flag --keep-distinct (did you mean --keep_distinct?)"),
    ],
)
def test_wrong_flags_of_the_scorer_are_named(folder, capsys, flags, words):
    assert words in error_of(lambda: main(["score", *SCORE.split(), *flags.split()]))


DATA = "--data.dev good.json --data.databases db --split dev"


def run_audit(flags):
    main(["audit", *flags.split()])


def test_the_audit_needs_no_tables_json(folder, capsys):
    run_audit(f"{DATA} --rewritings true")
    found = json.loads((folder / "runs" / "audit" / "audit.json").read_text())
    assert found["num_turns"] == 1
    run_audit(f"{DATA} --farming true --run runs/farm")
    assert (folder / "runs" / "farm" / "farming.json").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--split foo", "one of train, dev, dev_seen"),
        ("--split train", "data.train is not set"),
        ("--split dev_seen", "data.dev_seen is not set"),
        ("--run file", "run file: cannot create this folder"),
        ("--run file/x", "run file/x: cannot create this folder"),
        ("--style LOUD", "one of full, brief"),
        ("--tokenizer nowhere", "tokenizer nowhere: no such folder"),
        ("--max_prompt_tokens 0", "max_prompt_tokens must be at least 1"),
        ("--max_dialogues -1", "max_dialogues must be at least 0"),
        ("--max_dialogues many", "max_dialogues"),
        ("--num_farming_turns -1", "num_farming_turns must be at least 0"),
        ("--leave_out [nope]", "leave_out: no check 'nope'; there are gold fails"),
        ("--rewritings maybe", "rewritings"),
        ("--farming true --rewritings true", "rewritings has no effect with farming"),
        ("--env.max_replies 0", "env.max_replies"),
        ("--env.query.max_rows 0", "max_rows"),
        ("--data.dev nowhere.csv", "nowhere.csv: cannot be read"),
        ("--data.dev file", "file: not JSON"),
        ("--data.databases nowhere", "nowhere: no such folder of databases"),
        ("--data.databases bare.sqlite", "bare.sqlite: this is a file: name the folder"),
        ("--data.databases none", "no database file none/one/one.sqlite"),
        ("--data.databases twice", "database 'one' has 2 files"),
        ("--data.tables file", "file: not JSON"),
        ("--data.leave_out x", "data.leave_out is set, but data.train is not"),
        ("--nope 1", "--nope"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_wrong_flags_of_the_audit_are_named(folder, capsys, flags, words):
    assert words in error_of(lambda: run_audit(f"{DATA} {flags}"))


@pytest.mark.parametrize("toy_folder", ["file", "file/x"])
def test_a_toy_folder_that_cannot_be_written_is_named(folder, capsys, toy_folder):
    error = error_of(lambda: run_audit(f"--data.toy_folder {toy_folder}"))
    assert "data.toy_folder" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_end_with_a_code_and_a_line(folder, name):
    words = [sys.executable, "-m", "mtsql", name, "--nope", "x"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: unknown flag --nope") and done.stderr.count("\n") == 1
