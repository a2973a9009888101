"""benchmarks/findings.py: its plan, its runner and the way to its report, with fake scripts."""

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.evaluations import cell, episode
from mtsql.rl.evaluate import scores_as_rows
from mtsql.run.locks import RunLock
from mtsql.run.signals import Terminated, stoppable

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("train_sft", "train_rl", "eval")

FAKE = """
import json, os, shutil, signal, sys, time
from pathlib import Path
words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
run = Path(words.get("run") or words["resume"])
run.mkdir(parents=True, exist_ok=True)
if "resume" not in words:
    (run / "config.yaml").write_text("seed: 0")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(run / "calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if run.name == "rounds" and "resume" not in words:
    os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler stops the runner
    while not stopped:
        time.sleep(0.05)
    sys.exit(143)
here = Path(sys.argv[0])
if run.name == "outcome" and (here.parent / "fails").exists():
    print("error: this step fails")
    sys.exit(1)
if here.name == "eval.py":
    shutil.copy(here.parent / "scores.json", run)
if here.name == "train_rl.py":
    (run / "eval").mkdir()
    for at in (0, 20, 40):
        shutil.copy(here.parent / "turns.json", run / "eval" / f"dev-{at:05d}.json")
flops = 30.0 if run.name in ("rounds", "process") else 10.0
rows = [{"stage": "rl", "rollout_flops": flops}, {"stage": "eval", "rollout_flops": 99.0}]
if run.name == "short-rl":
    rows.append({"stage": "probe", "rollout_flops": 5.0})
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
if run.name == "rounds":
    place = run / "rounds" / "round0"
    place.mkdir(parents=True)
    (place / "coverage.json").write_text('{"rollouts": {"successes": {"train:0:1": [1, 2]}}}')
"""


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_steps_come_after_what_they_need_and_their_flags_are_those_of_the_scripts(module):
    from mtsql.run.config import parse_config

    steps = module("findings_steps").plan("runs/f", (0, 7), module("findings_steps").Sizes())
    seen = set()
    for step in steps:
        assert step.key not in seen
        assert {f"seed{step.seed}/{name}" for name in step.needs} <= seen
        seen.add(step.key)
    steps = [step for step in steps if step.seed == 7]
    models = {f"--model.path=runs/f/{step.key}/model" for step in steps}
    models |= {f"--model.path=runs/f/seed7/rounds/rounds/round{k}/model" for k in range(3)}
    kinds = {f"{name}.py": importlib.import_module(name).Config for name in SCRIPTS}
    parsed = {}  # many evaluations differ in the model only
    for step in steps:
        equal = [f"{step.equal.flag}=3"] if step.equal else []
        paths = [flag for flag in step.flags if flag.startswith("--model.path")]
        assert set(paths) <= models, "a model that no step makes"
        if paths:
            assert paths[0].split("/")[3] in step.needs, "its model is not made before"
        words = (step.script, *(word for word in (*step.flags, *equal) if word not in paths))
        if words not in parsed:
            parsed[words] = parse_config(kinds[step.script], ["--run=r", *words[1:], *paths], "")
        config = parsed[words]
        if hasattr(config, "reward"):
            process = config.reward.weights.propose
            assert (process == 0) == (step.name == "outcome" or step.name.startswith("short"))
        if step.script != "eval.py":
            assert (config.env.horizon == "short") == step.name.startswith("short")
            assert config.seed == step.seed


def test_a_folder_may_be_spelled_with_a_slash(module):
    steps = module("findings_steps")
    assert steps.plan("f/", (0,), steps.Sizes()) == steps.plan("f", (0,), steps.Sizes())


def test_mistakes_are_named(module):
    steps = module("findings_steps")
    with pytest.raises(ValueError, match="seeds is"):
        steps.plan("f", (1, 1), steps.Sizes())
    with pytest.raises(ValueError, match="scale is 2"):
        steps.Sizes().scaled(2)
    with pytest.raises(ValueError, match="sizes.updates is 0"):
        steps.Sizes(updates=0)
    with pytest.raises(ValueError, match="name a command first"):
        module("findings").main(["--scale", "0.5"])


def test_the_hard_stage_begins_where_the_last_large_share_does(module):
    from mtsql.rl.curriculum import CurriculumConfig

    start = module("findings_steps").hard_stage_start
    assert start(CurriculumConfig(shares=(0.25, 0.7, 0.05)), 40) == 10
    assert start(CurriculumConfig(shares=(0.4, 0.4, 0.2)), 150) == 120
    assert start(CurriculumConfig(bounds=(0.0,), shares=(1.0,)), 40) == 1


@pytest.fixture
def fakes(tmp_path):
    """A folder with scripts that only write what the runner and the report read, what they write,
    and demonstrations."""
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text(FAKE)
    lines = [json.dumps({"turn_id": f"train:0:{k}", "steps": []}) for k in range(3)]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines) + "\n")
    start = {"first_execution": "failed", "first_sql": "SELECT nope"}
    turns = [episode("dev", d, t, d % 2 == 0, **start) for d in range(4) for t in range(3)]
    results = [cell(turns, "toyworld dev", "dev", history) for history in ("gold", "predicted")]
    (tmp_path / "scores.json").write_text(json.dumps({"results": results, "is_complete": True}))
    (tmp_path / "turns.json").write_text(json.dumps({"turns": scores_as_rows(turns)}))
    return tmp_path


def runner(module: Callable[[str], ModuleType], fakes: Path) -> Any:
    """The steps of one seed, with the fake scripts."""
    steps, folder = module("findings_steps"), fakes / "runs"
    plan = steps.plan(str(folder), (0,), steps.Sizes())
    return module("findings_run").Steps(plan, folder, fakes, fakes)


@pytest.fixture
def keeps_handlers() -> Iterator[None]:
    """`stoppable` does not restore the handlers after a signal."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_stopped_run_goes_on_and_a_failed_step_stops_only_what_needs_it(
    fakes, module, keeps_handlers, monkeypatch, capsys
):
    monkeypatch.setattr(module("findings_run"), "POLL_SECS", 0.02)
    (fakes / "fails").touch()
    with pytest.raises(Terminated), stoppable():
        runner(module, fakes).run(2, 1)
    place = fakes / "runs" / "seed0"
    state = json.loads((place / "rounds.json").read_text())
    assert not state["is_done"] and state["secs"] > 0 and state["num_starts"] == 1
    assert state["exit_code"] == 143
    assert json.loads((place / "base.json").read_text())["is_done"]
    report = ["report", f"--folder={fakes / 'runs'}", f"--report_folder={fakes / 'report'}"]
    (place / "eval-base.json").unlink(missing_ok=True)  # it may have been finished
    with pytest.raises(ValueError, match="has a finished evaluation"):
        module("findings").main([*report, "--seeds=[0]"])

    capsys.readouterr()
    failed = runner(module, fakes).run(2, 1)
    assert [step.name for step in failed] == ["outcome"]
    assert "outcome: failed (exit code 1): error: this step fails" in capsys.readouterr().out
    calls = (place / "rounds" / "calls").read_text().splitlines()
    assert len(calls) == 2 and calls[1] == f"--resume={place / 'rounds'}"
    assert len((place / "base" / "calls").read_text().splitlines()) == 1  # it was finished
    assert json.loads((place / "rounds.json").read_text())["secs"] > state["secs"]
    assert not (place / "eval-outcome").exists()
    # Three times the operations of the short SFT: 3 * 3 passes. A probe of 5 is in the 30 of
    # process and in the 15 of the short RL: 25 / 10 * 20 updates.
    assert "--sft.epochs=9" in (place / "short-sft-compute" / "calls").read_text()
    assert "--num_updates=50" in (place / "short-rl-compute" / "calls").read_text()
    [line] = (place / "demonstrations.jsonl").read_text().splitlines()
    assert json.loads(line)["turn_id"] == "train:0:1"
    assert (place / "eval-no-memory" / "calls").is_file()

    # Without the fault, the rest is run, and the report reads what the scripts have written.
    (fakes / "fails").unlink()
    assert not runner(module, fakes).run(2, 1)
    assert module("findings").main([*report, "--seeds=[0]", "--resamples=20"]) == 0
    page = (fakes / "report" / "README.md").read_text()
    assert "Seed 0; 12 held-out turns" in page and "not finished" not in page
    assert "There is one seed" in page
    assert "| process - outcome | +0.0 [+0.0, +0.0] | +0.0 | 12 | undecided |" in page
    assert "| base | SFT" in (fakes / "report" / "tables.md").read_text()
    [verdict, *others] = module("findings_data").read_verdicts(
        fakes / "report" / "verdicts.jsonl.gz"
    )
    assert (verdict.model, verdict.is_aha, verdict.starts_bad) == ("base", 1, 1)
    assert {one.at for one in others if one.model == "process"} == {None, 0, 20, 40}

    # The plan has seeds 0 to 2, and the files have seed 1 of another machine, which is kept.
    data, folder = module("findings_data"), fakes / "report"
    text = (folder / "runs.json").read_text().replace("seed0", "seed1").replace("d=0", "d=1")
    runs = json.loads(text.replace('"seed": 0', '"seed": 1'))
    data.write([replace(one, seed=1) for one in [verdict, *others]], runs, folder)
    assert module("findings").main([*report, "--resamples=20"]) == 0
    assert {one.seed for one in data.read_verdicts(folder / data.VERDICTS)} == {0, 1}
    page = (folder / "README.md").read_text()
    assert "Seeds 0, 1; 12 held-out turns" in page and f"{len(runs['steps'])} of" in page


@pytest.mark.slow
def test_a_step_of_two_processes_is_launched_so(tmp_path, module):
    code = """
import os
from mtsql.run.launch import start_missing_ranks
start_missing_ranks()
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
"""
    (tmp_path / "train_rl.py").write_text(code)
    step = module("findings_steps").Step(0, "rl", "train_rl.py", ("--seed=3",), num_processes=2)
    steps = module("findings_run").Steps([step], tmp_path / "runs", tmp_path, tmp_path)
    assert steps.command(step)[:3] == ["accelerate", "launch", "--num_processes=2"]
    assert not steps.run(1, 1)
    log = (tmp_path / "runs/seed0/rl.log").read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log


def test_other_flags_in_the_same_folder_are_refused(fakes, module):
    steps, run = module("findings_steps"), module("findings_run")
    state = run.State(flags=["--seed=7"], num_starts=1)
    (fakes / "runs" / "seed0").mkdir(parents=True)
    (fakes / "runs" / "seed0" / "base.json").write_text(json.dumps(vars(state)))
    plan = steps.plan(str(fakes / "runs"), (0,), steps.Sizes())
    with pytest.raises(ValueError, match="seed0/base was started with --seed=7"):
        run.Steps(plan, fakes / "runs", fakes)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"flags": 1}', '{"flags": [], "x": 1}'])
def test_a_damaged_state_is_named(fakes, module, text):
    (fakes / "runs" / "seed0").mkdir(parents=True)
    (fakes / "runs" / "seed0" / "base.json").write_text(text)
    with pytest.raises(ValueError, match="seed0/base.json: not "):
        runner(module, fakes)


def test_an_error_in_the_runner_stops_the_steps_that_run(fakes, module, monkeypatch):
    """What one step needs cannot be read while another one runs."""
    steps = runner(module, fakes)
    slow = "import time\ntime.sleep(100)\n"
    (fakes / "eval.py").write_text(slow)
    monkeypatch.setattr(module("findings_run"), "POLL_SECS", 0.02)

    def fail(step, folder):
        if step.name == "rounds":
            raise ValueError("metrics.jsonl counts no operation")
        return list(step.flags)

    monkeypatch.setattr(module("findings_run"), "flags_of", fail)
    with pytest.raises(ValueError, match="counts no operation"):
        steps.run(2, 1)
    state = json.loads((fakes / "runs" / "seed0" / "eval-base.json").read_text())
    assert state["exit_code"] == -signal.SIGTERM and not state["is_done"]


def test_two_runners_and_the_report_of_a_try_are_refused(fakes, module, monkeypatch):
    monkeypatch.chdir(ROOT)
    with (
        RunLock(fakes / "runs"),
        pytest.raises(ValueError, match=r"folder .*/runs: in use by process"),
    ):
        runner(module, fakes).run(2, 1)
    usual = module("findings").Flags.report_folder
    for words in (
        ["--scale=0.5"],
        *(["--scale=0.5", f"--report_folder={name}"] for name in (f"./{usual}/", ROOT / usual)),
        ["--sizes.updates=2"],
    ):
        reason = "scale is 0.5" if "--scale=0.5" in words else "sizes.updates is 2, not 20"
        with pytest.raises(ValueError, match=f"{reason}: .* name another --report_folder"):
            module("findings").main(["report", f"--folder={fakes / 'none'}", *map(str, words)])
    with pytest.raises(ValueError, match="resamples is 0"):
        module("findings").main(["report", "--resamples=0", f"--folder={fakes / 'none'}"])
