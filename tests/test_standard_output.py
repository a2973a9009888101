"""A standard output that cannot be written, and what is printed with text from data in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import make

TYPED = 'SELECT "[/b]" FROM t'
COMMANDS = {
    "mtsql.schema": "database",
    "mtsql.judge.official_scorer": "--gold gold.txt --pred gold.txt --tables tables.json --databases database",
    "mtsql.audit": "--data.train train[x].json --data.dev train[x].json --data.databases database --run run",
}


@pytest.fixture
def folder(tmp_path):
    make(
        tmp_path / "database" / "one.sqlite",
        'CREATE TABLE t (a, "[/b]"); INSERT INTO t VALUES (1, 2)',
    )
    columns = [[-1, "*"], [0, "a"], [0, "[/b]"]]
    entry = {
        "db_id": "one",
        "table_names_original": ["t"],
        "column_names_original": columns,
        "column_types": ["text"] * 3,
        "primary_keys": [],
        "foreign_keys": [],
    }
    (tmp_path / "tables.json").write_text(json.dumps([entry]))
    turns = [
        {"db_id": "one", "question": ":dog:", "query": sql}
        for sql in (TYPED, 'SELECT a FROM "[/b]:dog:"')
    ]
    (tmp_path / "train[x].json").write_text(json.dumps(turns))
    (tmp_path / "gold.txt").write_text("SELECT a FROM t\tone\n")
    return tmp_path


def start(folder, module, out):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", module, *COMMANDS[module].split()]
    return subprocess.Popen(
        words, cwd=folder, env=env, text=True, stdout=out, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(folder, module):
    with open("/dev/full", "w") as full:
        process = start(folder, module, full)
        err = process.communicate()[1]
    line = "error: the standard output: cannot be written: No space left on device\n"
    assert err.endswith(line) and "Traceback" not in err and process.returncode == 1
    if module == "mtsql.audit":  # minutes of work, on a real data set
        assert (folder / "run/audit.json").is_file() and (folder / "run/leave_out.tsv").is_file()


@pytest.mark.parametrize("module", COMMANDS)
def test_a_reader_that_has_ended_is_no_traceback(folder, module):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(folder, module, writing)
    os.close(writing)
    assert "Traceback" not in (err := process.communicate()[1]) and "Exception" not in err
    assert process.returncode == 1
    assert module != "mtsql.audit" or (folder / "run/leave_out.tsv").is_file()


def test_the_audit_prints_ids_and_golds_as_they_are(folder):
    process = start(folder, "mtsql.audit", subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "train[x]:1:0 (one)" in out and "no such table: [/b]:dog:" in out
