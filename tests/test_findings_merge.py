"""The seeds of several machines in one report of benchmarks/findings.py."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def data(module) -> ModuleType:
    return module("findings_data")


@pytest.fixture
def merge(module) -> Callable[..., Any]:
    return module("findings_merge").with_other_seeds


@pytest.fixture
def of_seed(data) -> Callable[..., list]:
    """The verdicts of a seed on some turns."""

    def make(seed: int, num_turns: int = 4, **fields: Any) -> list:
        usual = {"model": "base", "split": "dev", "history": "gold", "turn": "1"}
        usual |= {"hardness": "easy", "ex": 1, "em": 1, "replies": 2, "abilities": [None] * 5}
        return [
            data.Verdict(seed=seed, turn_id=f"dev:{k}:0", **usual | fields)
            for k in range(num_turns)
        ]

    return make


def runs_of(*seeds: int, folder: str = "runs", done: int = 2, git: str = "abc") -> dict:
    """What runs.json holds of seeds, each with `done` finished steps of two. The second one has a
    flag that depends on others."""
    steps = []
    for seed in seeds:
        place = f"{folder}/seed{seed}"
        start = f"--model.path={place}/base/model"
        commands = {
            "base": ["python", "train_sft.py", f"--seed={seed}", f"--run={place}/base"],
            "short": ["python", "x.py", start, f"--sft.epochs=1.2{seed}", f"--run={place}/short"],
        }
        for number, (name, words) in enumerate(commands.items()):
            facts = {"seed": seed, "name": name, "command": words, "secs": 1.0}
            equal = {"equal": "--sft.epochs"} if name == "short" else {}
            steps.append({**facts, **equal, "is_done": number < done})
    about = [{"seed": seed, "machine": {"cores": 2}, "versions": {"git": git}} for seed in seeds]
    return {"seeds": about, "steps": steps}


def test_seeds_of_another_machine_are_kept_with_what_they_ran_on(data, merge, of_seed, tmp_path):
    data.write(of_seed(2), runs_of(2, git="old"), tmp_path)
    for seed in (0, 1):
        data.write(*merge(of_seed(seed), runs_of(seed), tmp_path), tmp_path)
    assert data.read_verdicts(tmp_path / data.VERDICTS) == [*of_seed(0), *of_seed(1), *of_seed(2)]
    runs = data.read_runs(tmp_path)
    assert [step["seed"] for step in runs["steps"]] == [0, 0, 1, 1, 2, 2]
    found = {one["seed"]: one["versions"]["git"] for one in runs["seeds"]}
    assert found == {0: "abc", 1: "abc", 2: "old"}
    again, runs = merge(of_seed(1, ex=0), runs_of(1), tmp_path)
    assert again == [*of_seed(0), *of_seed(1, ex=0), *of_seed(2)] and len(runs["steps"]) == 6


def test_a_seed_without_a_finished_evaluation_here_comes_from_the_files(
    data, merge, of_seed, tmp_path
):
    """The seeds of the plan are 0, 1 and 2 even where only seed 0 was run."""
    data.write(of_seed(1), runs_of(1, git="old"), tmp_path)
    plan = {key: [*runs_of(0)[key], *runs_of(1, 2, done=0)[key]] for key in ("seeds", "steps")}
    found, runs = merge(of_seed(0), plan, tmp_path)
    assert found == [*of_seed(0), *of_seed(1)]
    done = [(step["seed"], step["is_done"]) for step in runs["steps"]]
    assert done == [(0, True)] * 2 + [(1, True)] * 2 + [(2, False)] * 2
    assert runs["seeds"][1]["versions"] == {"git": "old"}


def test_a_run_that_has_less_of_a_seed_is_refused(data, merge, of_seed, tmp_path):
    data.write(of_seed(1), runs_of(1), tmp_path)
    with pytest.raises(
        ValueError, match="runs.json: has step short finished for seed 1, .*--seeds"
    ):
        merge(of_seed(1), runs_of(1, done=1), tmp_path)
    with pytest.raises(ValueError, match="gz: has the verdict on dev:1:0 by base for seed 1, "):
        merge(of_seed(1, 1), runs_of(1), tmp_path)


def test_other_commands_are_refused_and_other_folders_are_not(data, merge, of_seed, tmp_path):
    data.write(of_seed(0), runs_of(0, folder="/elsewhere/seed1"), tmp_path)
    for folder in ("runs", "/tmp/x/seed0", "."):
        found, _ = merge(of_seed(1), runs_of(1, folder=folder), tmp_path)
        assert len(found) == 8
    for word in ("--data.toy_folder=else", "--model.path=elsewhere/base/model"):
        other = runs_of(1)
        other["steps"][0]["command"].append(word)
        with pytest.raises(
            ValueError, match="base of seed 0 has another command than that of seed 1"
        ):
            merge(of_seed(1), other, tmp_path)
    (tmp_path / "few").mkdir()
    data.write(of_seed(0), {**runs_of(0), "steps": []}, tmp_path / "few")
    with pytest.raises(ValueError, match="base of seed 0 has another command"):
        merge(of_seed(1), runs_of(1), tmp_path / "few")


def test_another_world_is_refused(data, merge, of_seed, tmp_path):
    data.write(of_seed(0), runs_of(0), tmp_path)
    words = (
        "gz: seed 0 is of another world than seed 1 here: dev dev:0:0 is easy there and extra here"
    )
    with pytest.raises(ValueError, match=words):
        merge(of_seed(1, model="round1", hardness="extra"), runs_of(1), tmp_path)
    for num_turns, turn_id, where in ((3, "dev:3:0", "there"), (5, "dev:4:0", "here")):
        with pytest.raises(ValueError, match=f"dev {turn_id} was played by base {where} only"):
            merge(of_seed(1, num_turns), runs_of(1), tmp_path)
    other = [replace(one, split="dev_seen") for one in of_seed(1, hardness="extra")]
    assert len(merge(other, runs_of(1), tmp_path)[0]) == 8  # of another file


def test_a_report_folder_with_one_of_the_two_files_is_refused(module, data, of_seed, tmp_path):
    words = ["report", f"--folder={tmp_path}/runs", f"--report_folder={tmp_path}"]
    assert not data.has_files(tmp_path)
    data.write(of_seed(0), runs_of(0), tmp_path)
    assert data.has_files(tmp_path)
    for lost, left in ((data.RUNS, data.VERDICTS), (data.VERDICTS, data.RUNS)):
        content = (tmp_path / lost).read_bytes()
        (tmp_path / lost).unlink()
        with pytest.raises(ValueError, match=f"report_folder .*: {left} is there without {lost}"):
            module("findings").main(words)
        (tmp_path / lost).write_bytes(content)
