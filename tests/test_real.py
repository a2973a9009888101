"""benchmarks/real.py: its plan, and its report on verdicts with known effects."""

import importlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.evaluations import cell, episode

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RATES = {"untrained": 0.0, "sft": 0.25, "rl": 0.35}
NUM_DIALOGUES = 80


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(ROOT)
    return importlib.import_module


def write_scores(folder: Path, model: str, data: str, history: str) -> None:
    """scores.json of an evaluation, in the form of eval.py. The same turns are right for a better
    model. The untrained one answers nothing."""
    rate = RATES[model] - 0.1 * (history == "predicted")
    rng = random.Random(0)
    outcome = "reply_tokens" if model == "untrained" else "answered"
    scores = [
        episode("dev", dialogue, turn, rng.random() < rate, outcome=outcome)
        for dialogue in range(NUM_DIALOGUES)
        for turn in range(3)
    ]
    folder.mkdir(parents=True)
    results = [cell(scores, data, "dev", history)]
    (folder / "scores.json").write_text(json.dumps({"results": results, "is_complete": True}))


@pytest.fixture
def finished(module, tmp_path):
    """The runs folder of a finished experiment, and the flags that name it."""
    flags = module("real").Flags(folder=str(tmp_path / "runs"), report_folder=str(tmp_path / "out"))
    for step in module("real").plan(flags):
        run = tmp_path / "runs" / step.key
        state = {"flags": list(step.flags), "secs": 60.0, "num_starts": 1, "is_done": True}
        run.parent.mkdir(parents=True, exist_ok=True)
        run.with_name(f"{run.name}.json").write_text(json.dumps(state))
        model = step.name.removeprefix("eval-")
        if step.script == "eval.py":
            name, _, kind = model.partition("-")
            history = "predicted" if kind == "predicted" else "gold"
            data = "cosql dev" if kind == "cosql" else "sparc dev"
            write_scores(run, name, data, history)
        else:
            run.mkdir(parents=True)
            rows = [
                {"stage": step.name, "update": n, "loss": 1 / (n + 1), "reward": n}
                for n in range(3)
            ]
            rows.append({"stage": "eval", "update": 2, "held_out_ex": 30.0})
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if step.name == "rl":
            (run / "model").mkdir()
            selected = {"update": 30, "num_updates": 40, "select_by": "held_out"}
            (run / "model" / "selected.json").write_text(json.dumps(selected))
    return flags


def report_of(flags: Any) -> list[str]:
    """The words of the command that writes the report."""
    folders = [f"--folder={flags.folder}", f"--report_folder={flags.report_folder}"]
    return ["report", *folders, "--resamples=200"]


def test_the_flags_of_each_step_are_those_of_its_script(module):
    from mtsql.run.config import parse_config

    steps = module("real").plan(module("real").Flags())
    seen = []
    for step in steps:
        assert set(step.needs) <= set(seen)
        seen.append(step.name)
        config = importlib.import_module(step.script.removesuffix(".py")).Config
        parse_config(config, [f"--run=runs/real/{step.key}", *step.flags], "")
    kinds = ("", "-cosql", "-predicted")
    evaluations = [f"eval-{name}{kind}" for kind in kinds for name in ("sft", "rl")]
    assert seen == ["sft", "rl", *evaluations, "eval-untrained"]


def test_both_stages_hold_out_the_same_databases(module):
    from mtsql.run.config import parse_config

    by_name = {step.name: step for step in module("real").plan(module("real").Flags())}
    configs = [
        parse_config(importlib.import_module(f"train_{name}").Config, list(by_name[name].flags), "")
        for name in ("sft", "rl")
    ]
    assert configs[0].data == configs[1].data
    assert configs[0].max_prompt_tokens == configs[1].max_prompt_tokens
    assert configs[0].env.max_replies == configs[1].env.max_replies


def test_the_report_says_what_was_wanted_and_what_was_found(module, finished):
    folder = Path(finished.report_folder)
    folder.mkdir()
    (folder / "real_notes.md").write_text("- Written by hand.\n")
    assert module("real").main(report_of(finished)) == 0
    text = (folder / "real.md").read_text()
    assert "training databases that were held out of both stages.\n- Written by hand.\n" in text
    assert "wanted 20: reached" in text
    assert "wanted 3, and the interval above 0: reached" in text
    assert "weights of update 30 of 40. They have the highest EX on training databases" in text
    assert f"sparc dev: untrained {3 * NUM_DIALOGUES} turns of {NUM_DIALOGUES} dialogues" in text
    assert "| untrained | sparc dev | 0.0 | 0.50 |" in text
    assert "| stage 1 | sparc dev | 100.0 | 0.50 |" in text
    assert (
        text.count("| sparc dev | predicted | EX |  |") == 1
    )  # the untrained one is not played so
    facts = json.loads((folder / "real.json").read_text())
    assert facts["untrained"] == {
        "model": "SmolLM2-135M-Instruct",
        "data": "sparc dev",
        "turns": 3 * NUM_DIALOGUES,
        "ex": 0.0,
        "ex_interval": [0.0, 0.0],
        "answered": 0.0,
        "answered_interval": [0.0, 0.0],
    }
    assert facts["curves"]["rl"][1]["reward"] == 1
    assert facts["curves"]["rl"][-1] == {"update": 2, "stage": "eval", "held_out_ex": 30.0}
    assert (folder / "real.png").stat().st_size > 5000


def test_a_gain_that_may_be_chance_is_not_called_reached(module, finished):
    run = Path(finished.folder) / "seed0" / "eval-rl"
    scores = json.loads((run / "scores.json").read_text())
    for place, row in enumerate(scores["results"][0]["turns"]):
        row["ex"] = place % 4 == 0  # the same rate on other turns
    (run / "scores.json").write_text(json.dumps(scores))
    module("real").main(report_of(finished))
    text = (Path(finished.report_folder) / "real.md").read_text()
    assert "wanted 3, and the interval above 0: not reached" in text


def test_an_evaluation_that_is_not_complete_is_named(module, finished):
    file = Path(finished.folder) / "seed0" / "eval-rl" / "scores.json"
    for text, fault in (('{"results": [], "is_complete": false}', "not complete"), ("{", "JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"eval-rl/scores.json: .*{fault}"):
            module("real").main(report_of(finished))


def test_the_page_is_made_again_from_its_files(module, finished, tmp_path):
    out = Path(finished.report_folder)
    module("real").main(report_of(finished))
    first = (out / "real.md").read_text()
    (out / "real.md").unlink()
    module("real").main(report_of(replace(finished, folder=str(tmp_path / "none"))))
    assert (out / "real.md").read_text() == first


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["report"], "run the steps first"),
        (["run", "--model=nowhere"], "convert_smollm2"),
        (["run", "--scale=2"], "scale is 2"),
        (["go"], "name a command first"),
    ],
)
def test_mistakes_are_named(module, tmp_path, words, named):
    more = [] if words == ["go"] else [f"--folder={tmp_path}/r", f"--report_folder={tmp_path}/o"]
    with pytest.raises(ValueError, match=named):
        module("real").main([*words, *more])
