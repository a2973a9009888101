"""A standard output that cannot be written, and printed text that comes from data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.databases import make_database, tables_json
from mtsql.judge.score_files import ScorerConfig
from mtsql.run.launch import run_script

COMMANDS = {
    "schema": "database",
    "score": ("--gold gold.txt --pred gold.txt --tables tables.json --databases database"),
    "audit": (
        "--data.train train[x].json --data.dev train[x].json --data.databases database --run run"
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A data set whose names look like markup of rich: [/b] and :dog:."""
    script = 'CREATE TABLE t (a, "[/b]"); INSERT INTO t VALUES (1, 2)'
    make_database(tmp_path / "database" / "one.sqlite", script)
    (tmp_path / "tables.json").write_text(tables_json("one", columns=("a", "[/b]")))
    turns = []
    for sql in ('SELECT "[/b]" FROM t', 'SELECT a FROM "[/b]:dog:"'):
        turns.append({"db_id": "one", "question": ":dog:", "query": sql})
    (tmp_path / "train[x].json").write_text(json.dumps(turns))
    (tmp_path / "gold.txt").write_text("SELECT a FROM t\tone\n")
    return tmp_path


def start(folder, name, out, shell=()):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [*shell, sys.executable, "-m", "mtsql", name, *COMMANDS[name].split()]
    return subprocess.Popen(
        words, cwd=folder, env=env, text=True, stdout=out, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_an_error_of_one_line(folder, name):
    with open("/dev/full", "w") as full:
        process = start(folder, name, full)
        err = process.communicate()[1]
    line = "error: the standard output: cannot be written: No space left on device\n"
    assert err.endswith(line) and "Traceback" not in err and process.returncode == 1
    if name == "audit":  # its files are minutes of work on a real data set
        assert (folder / "run/audit.json").is_file() and (folder / "run/leave_out.tsv").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_output_to_a_program_that_has_ended_gives_no_traceback(folder, name):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(folder, name, writing)
    os.close(writing)
    err = process.communicate()[1]
    assert "Traceback" not in err and "Exception" not in err
    assert process.returncode == 1
    assert name != "audit" or (folder / "run/leave_out.tsv").is_file()


def test_a_closed_output_is_an_error_of_one_line(folder):
    process = start(folder, "schema", None, ["sh", "-c", 'exec "$@" >&-', "sh"])
    line = "error: the standard output is closed: redirect it to a file or to /dev/null\n"
    assert process.communicate()[1] == line and process.returncode == 1


def test_a_script_does_not_begin_with_a_closed_output(monkeypatch):
    def end(line, code):
        raise SystemExit(f"{code} {line}")

    monkeypatch.setattr("mtsql.run.launch.end_with", end)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit, match="^1 error: the standard output is closed: "):
        run_script(print, ScorerConfig, "")


def test_the_audit_prints_ids_and_sql_without_reading_them_as_markup(folder):
    process = start(folder, "audit", subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "train[x]:1:0 (one)" in out and "no such table: [/b]:dog:" in out
