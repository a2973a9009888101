"""The log of a run: numbers that are not finite, and the commit of the program."""

import json
import os
import subprocess
import time
from dataclasses import dataclass

import pytest

from mtsql.run.commit import git_commit
from mtsql.run.runlog import NotFinite, RunLog

GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]


@dataclass(frozen=True)
class Config:
    run: str = "x"


def test_a_value_that_is_not_finite_is_named(tmp_path):
    log = RunLog(tmp_path / "run", Config())
    with pytest.raises(NotFinite, match="grad_norm is not finite in rl update 3"):
        log.metrics({"stage": "rl", "update": 3, "grad_norm": float("nan")})


def repository(folder):
    folder.mkdir(parents=True)
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", "x"], cwd=folder, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


@pytest.fixture
def no_git_variables(monkeypatch):
    """A hook that runs the tests sets some."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


def test_the_commit_is_that_of_the_program(tmp_path, monkeypatch, no_git_variables):
    usual, foreign = git_commit(), repository(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert git_commit() == usual and foreign not in usual


def test_an_installed_program_has_no_commit(tmp_path, monkeypatch, no_git_variables):
    commit = repository(tmp_path / "project")
    package = tmp_path / "project/venv/site-packages/mtsql"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert git_commit(package) == "unknown"  # the repository around it is another one
    subprocess.run([*GIT, "add", "-f", str(package)], cwd=tmp_path / "project", check=True)
    assert git_commit(package) == f"{commit} (changed)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(package) == "unknown"  # there is no git


def test_the_provenance_of_a_run_is_json(tmp_path):
    RunLog(tmp_path / "run", Config())
    assert json.loads((tmp_path / "run/versions.json").read_text())["git"] == git_commit()


def test_a_line_has_the_seconds_since_the_one_before_and_those_of_its_timers(tmp_path):
    log = RunLog(tmp_path / "run", Config())
    with log.work("eval", "evaluation") as show:
        show(1, 2)
        time.sleep(0.02)
    assert log.secs("eval") >= 0.02 and log.secs("probe") == 0
    log.metrics({"stage": "eval", "dev_ex": 1.0})
    log.metrics({"stage": "rl", "num_steps": 2})
    log.metrics({"stage": "rl", "num_steps": None})
    one, two, _ = log.rows
    assert one["wall_secs"] >= one["eval_secs"] >= 0.02
    assert one["eval_peak_memory_mb"] > 10
    assert not {"eval_secs", "eval_peak_memory_mb"} & two.keys() and two["wall_secs"] < 0.02
    assert log.total("num_steps") == 2
    written = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, written)) == log.rows


def test_a_resumed_log_has_the_rows_up_to_its_checkpoint(tmp_path):
    log = RunLog(tmp_path / "run", Config())
    log.metrics({"stage": "rl", "update": 1})
    size = log.metrics_file.stat().st_size
    log.metrics({"stage": "rl", "update": 2})
    resumed = RunLog(tmp_path / "run", Config(), resume_at=(1, size))
    assert [row["update"] for row in resumed.rows] == [1]


@pytest.mark.parametrize("damaged", ['{"stage": "rl"', "", "[1]", '{"loss": NaN}'])
def test_a_damaged_line_of_a_resumed_log_is_named(tmp_path, damaged):
    log = RunLog(tmp_path / "run", Config())
    log.metrics_file.write_text(f'{{"stage": "eval"}}\n{damaged}\n{{}}\n')
    size = log.metrics_file.stat().st_size
    with pytest.raises(ValueError, match=r"^.*/run/metrics\.jsonl, line 2: "):
        RunLog(tmp_path / "run", Config(), resume_at=(1, size))


def test_long_lines_are_broken_between_words(tmp_path, capsys):
    RunLog(tmp_path / "run", Config()).print("word " * 30 + "\n" + "short")
    assert capsys.readouterr().out.splitlines()[0] == " ".join(["word"] * 16)
