"""The files that a run was started with: a changed one is named, a moved one may be named again."""

import json
import os
import shutil
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mtsql.model.policy import ModelConfig
from mtsql.run import inputs
from mtsql.run.checkpoint import check_unchanged
from mtsql.run.config import save_config
from mtsql.run.inputs import check_files, hash_inputs, keep_inputs
from mtsql.sql.datasets import DataConfig

SPLITS = ("train", "dev", "dev_seen")


@dataclass(frozen=True)
class Config:
    run: str = "runs/one"
    seed: int = 0
    source: str = "demonstrations"
    demonstrations: str | None = "files/demos.jsonl"
    data: DataConfig = DataConfig(
        train="files/train.json",
        dev="files/dev.json",
        dev_seen="files/seen.json",
        tables="files/tables.json",
        databases="files/database",
        leave_out="files/out.tsv",
    )
    model: ModelConfig = ModelConfig(path="files/model")


FILES = {
    "data.train": "files/train.json",
    "data.dev": "files/dev.json",
    "data.dev_seen": "files/seen.json",
    "data.tables": "files/tables.json",
    "data.databases": "files/database/b/b.sqlite",
    "data.leave_out": "files/out.tsv",
    "demonstrations": "files/demos.jsonl",
    "model.path": "files/model/tokenizer.json",
}
OTHERS = {"model.path": "files/model/model-00002.safetensors"}
NAMED = {**FILES, "data.databases": "files/database", "model.path": "files/model"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run that was started on small files."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate([*FILES.values(), *OTHERS.values(), "files/model/mtsql.json"]):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{number}: text of {name}")
    for name in "abc":
        database(Path(f"files/database/{name}/{name}.sqlite"), f"CREATE TABLE {name} (x)")
    run = Path("runs/one")
    run.mkdir(parents=True)
    save_config(Config(), run / "config.yaml")
    used = {Path(f"files/database/{name}/{name}.sqlite") for name in "ab"}
    keep_inputs(run, {"the turns": "1"} | hash_inputs(Config(), SPLITS, used))
    check(Config())
    return run


def database(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


def check(config):
    check_unchanged(config, Path(config.run))
    check_files(Path(config.run), config)


def with_key(key, value):
    section, _, name = key.rpartition(".")
    config = Config()
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize("is_moved", [False, True], ids=["in place", "moved"])
@pytest.mark.parametrize(("key", "file"), [*FILES.items(), *OTHERS.items()])
def test_a_changed_file_is_named(key, file, is_moved, run):
    named = Path(NAMED[key])
    config = with_key(key, f"moved/{named.name}") if is_moved else Config()
    if is_moved:
        os.renames(named, f"moved/{named.name}")
        file = file.replace("files/", "moved/")
    if key == "data.databases":
        database(Path(file), "CREATE TABLE other (x)")
    else:
        Path(file).write_text(Path(file).read_text().replace("text", "TEXT"))
    with pytest.raises(ValueError, match=f"resume {run}: {key} {file} changed since the run was"):
        check(config)


@pytest.mark.parametrize("key", NAMED)
def test_a_moved_file_may_be_given_with_its_new_path(key, run):
    named = Path(NAMED[key])
    os.renames(named, f"moved/{named.name}")
    line = (
        f"{key} {named}: no such file or folder: if it was moved, give its new place with --{key}$"
    )
    with pytest.raises(ValueError, match=line):
        check(Config())
    check(with_key(key, f"moved/{named.name}"))


@pytest.mark.parametrize("key", NAMED)
def test_a_path_that_was_not_set_before_is_refused(key, run):
    """Nothing says that its content is the same."""
    saved = json.loads((run / "inputs.json").read_text())
    del saved["files"][key]
    (run / "inputs.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"{key} is 'elsewhere', but runs/one was started with"):
        check(with_key(key, "elsewhere"))


@pytest.mark.parametrize("key", ["data.dev_seen", "data.leave_out", "model.path"])
def test_a_path_that_is_no_longer_set_is_refused(key, run):
    with pytest.raises(ValueError, match=f"{key} is not set, but the run was started with"):
        check(with_key(key, None))


@pytest.mark.parametrize("key", NAMED)
def test_a_file_whose_name_would_change_the_turn_ids_is_refused(key, run):
    """They begin with it; of all other files the name is free."""
    named = Path(NAMED[key])
    os.replace(named, new := named.with_name("renamed" + named.suffix))
    if key in ("data.train", "data.dev", "data.dev_seen"):
        line = (
            f"{key} {new}: the ids of its turns begin with the file's name, which was {named.name}"
        )
        with pytest.raises(ValueError, match=line):
            check(with_key(key, str(new)))
    else:
        check(with_key(key, str(new)))


def test_files_that_the_run_does_not_use_may_change(run):
    database(Path("files/database/c/c.sqlite"), "CREATE TABLE other (x)")
    Path("files/model/mtsql.json").write_text("other defaults")
    Path("files/database/new").mkdir()
    check(Config())


@pytest.mark.parametrize("key", ["dev", "dev_seen"])
def test_files_that_the_run_does_not_use_may_move_with_the_others(key, run):
    """train_sft.py reads the training split only, but a data set moves as a whole."""
    (run / inputs.FILE_NAME).unlink()
    databases = {Path("files/database/a/a.sqlite")}
    keep_inputs(run, hash_inputs(Config(), ("train",), databases))
    moved = replace(Config(), data=replace(Config().data, **{key: "elsewhere/dev.json"}))
    check(moved)
    with pytest.raises(ValueError, match="seed is 1, but"):
        check(replace(moved, seed=1))


@pytest.mark.parametrize("gone", ["files/database/a/a.sqlite", "files/model/tokenizer.json"])
def test_a_file_that_is_missing_in_a_folder_is_named(gone, run):
    Path(gone).unlink()
    with pytest.raises(ValueError, match=f"{gone}: no such file: put it back or, if the files"):
        check(Config())


def test_a_run_without_a_list_of_files_is_resumed(run):
    (run / "inputs.json").write_text('{"the turns": "1"}')
    check(Config())
    Path(FILES["data.train"]).write_text("x")  # the hash of the turns finds that
    check(Config())
    (run / "inputs.json").unlink()
    check(Config())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"files": 3}', '{"files": {"seed": {}}}', '{"files": {"data.train": []}}']
)
def test_a_damaged_file_is_named(text, run):
    (run / "inputs.json").write_text(text)
    with pytest.raises(ValueError, match="inputs.json: not "):
        check(Config())


def test_a_deleted_toy_world_is_written_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(
        demonstrations=None, source="self", data=DataConfig(toy_folder="toy"), model=ModelConfig()
    )
    for name in ("train.json", "tables.json"):
        Path("toy").mkdir(exist_ok=True)
        Path("toy", name).write_text(name)
    database(Path("toy/database/a/a.sqlite"), "CREATE TABLE a (x)")
    run = tmp_path
    keep_inputs(run, hash_inputs(config, ("train",), {Path("toy/database/a/a.sqlite")}))
    check_files(run, config)
    shutil.move("toy", "moved")
    check_files(run, config)
    check_files(run, replace(config, data=DataConfig(toy_folder="moved")))
    Path("moved/train.json").write_text("edited")
    with pytest.raises(ValueError, match="data.toy_folder moved/train.json changed"):
        check_files(run, replace(config, data=DataConfig(toy_folder="moved")))


def test_a_large_file_is_hashed_in_part_and_a_write_by_sqlite_is_seen(run, monkeypatch):
    """A row in the middle of a large database; a file that another version of SQLite wrote."""
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 1 << 20)
    file = Path("files/database/a/a.sqlite")
    script = "CREATE TABLE t (x); WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 40000)"
    database(file, script + " INSERT INTO t SELECT printf('%0200d', i) FROM n")
    assert file.stat().st_size > 1 << 22
    before = inputs._hash(file, "data.databases")
    connection = sqlite3.connect(file)
    connection.execute("UPDATE t SET x = replace(x, '0', '1') WHERE rowid = 20000")
    connection.commit()
    connection.close()
    assert inputs._hash(file, "data.databases") != before
    small = Path("files/database/b/b.sqlite")
    before, content = inputs._hash(small, ""), bytearray(small.read_bytes())
    content[96:100] = b"\0\x01\x02\x03"
    small.write_bytes(content)
    assert inputs._hash(small, "") == before
