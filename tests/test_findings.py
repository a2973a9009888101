"""benchmarks/findings.py: its plan, its runner with fake scripts, its report on known effects."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("train_sft", "train_rl", "eval")

FAKE = """
import json, signal, sys, time
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
    while not stopped:
        time.sleep(0.05)
    sys.exit(143)
if run.name == "outcome":
    print("error: this step fails")
    sys.exit(1)
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


def test_steps_come_after_what_they_need_and_their_flags_are_those_of_the_scripts(
    module, monkeypatch
):
    from mtsql.run.config import parse_config

    steps = module("findings_steps").plan("runs/f", (0, 1), module("findings_steps").Sizes())
    seen = set()
    for step in steps:
        assert step.key not in seen
        assert {f"seed{step.seed}/{name}" for name in step.needs} <= seen
        seen.add(step.key)
    models = {f"--model.path=runs/f/{step.key}/model" for step in steps}
    models |= {
        f"--model.path=runs/f/seed{s}/rounds/rounds/round{k}/model"
        for s in (0, 1)
        for k in range(3)
    }
    kinds = {f"{name}.py": importlib.import_module(name).Config for name in SCRIPTS}
    for step in steps:
        equal = [f"{step.equal.flag}=3"] if step.equal else []
        config = parse_config(kinds[step.script], [f"--run={step.key}", *step.flags, *equal], "")
        paths = [flag for flag in step.flags if flag.startswith("--model.path")]
        assert set(paths) <= models, "a model that no step makes"
        start = [word for word in config.model.path.split("/") if word in seen] if paths else []
        assert not start or start[0] in step.needs
        if hasattr(config, "reward"):
            process = config.reward.weights.propose
            assert (process == 0) == (step.name == "outcome" or step.name.startswith("short"))
        if step.script != "eval.py":
            assert (config.env.horizon == "short") == step.name.startswith("short")
            assert config.seed == step.seed


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
def fakes(tmp_path, monkeypatch):
    """A folder with scripts that only write what the runner reads, and one with demonstrations."""
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text(FAKE)
    lines = [json.dumps({"turn_id": f"train:0:{k}", "steps": []}) for k in range(3)]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def runner(fakes: Path) -> str:
    """A program that runs the plan of one seed with the fake scripts."""
    return f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}]
from pathlib import Path
from findings_run import Steps
from findings_steps import Sizes, plan
from mtsql.run.signals import exit_code, stoppable
folder = Path({str(fakes)!r})
steps = Steps(plan(str(folder / "runs"), (0,), Sizes()), folder / "runs", folder, folder)
with stoppable():
    try:
        print("failed:", [step.name for step in steps.run(2, 1)])
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))
"""


def wait_for(file: Path) -> None:
    end = time.monotonic() + 240
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    assert file.is_file()


def test_a_stopped_run_goes_on_and_a_failed_step_stops_only_what_needs_it(fakes):
    command = [sys.executable, "-c", runner(fakes)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    place = fakes / "runs" / "seed0"
    wait_for(place / "rounds" / "calls")
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 143
    state = json.loads((place / "rounds.json").read_text())
    assert not state["is_done"] and state["secs"] > 0 and state["num_starts"] == 1
    assert json.loads((place / "base.json").read_text())["is_done"]

    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "failed: ['outcome']" in second.stdout, second.stderr
    assert "outcome: failed (exit code 1): error: this step fails" in second.stdout
    calls = (place / "rounds" / "calls").read_text().splitlines()
    assert len(calls) == 2 and calls[1] == f"--resume={place / 'rounds'}"
    assert len((place / "base" / "calls").read_text().splitlines()) == 1  # it was finished
    assert json.loads((place / "rounds.json").read_text())["secs"] > state["secs"]
    assert not (place / "eval-outcome").exists()
    # Three times the operations of the short SFT: 3 * 3.6 passes. A probe of 5 is in the 30 of
    # process and in the 15 of the short RL: 25 / 10 * 40 updates.
    assert "--sft.epochs=10.8" in (place / "short-sft-compute" / "calls").read_text()
    assert "--num_updates=100" in (place / "short-rl-compute" / "calls").read_text()
    [line] = (place / "demonstrations.jsonl").read_text().splitlines()
    assert json.loads(line)["turn_id"] == "train:0:1"
    assert (place / "eval-no-memory" / "calls").is_file()


def test_other_flags_in_the_same_folder_are_refused(fakes, module):
    steps, run = module("findings_steps"), module("findings_run")
    state = run.State(flags=["--seed=7"], num_starts=1)
    (fakes / "runs" / "seed0").mkdir(parents=True)
    (fakes / "runs" / "seed0" / "base.json").write_text(json.dumps(vars(state)))
    plan = steps.plan(str(fakes / "runs"), (0,), steps.Sizes())
    with pytest.raises(ValueError, match="seed0/base was started with --seed=7"):
        run.Steps(plan, fakes / "runs", fakes)


@pytest.mark.slow
def test_the_whole_chain_runs_and_is_reported_at_a_small_scale(tmp_path):
    words = ["--seeds=[0]", "--scale=0.02", "--jobs=1", f"--folder={tmp_path / 'runs'}"]
    words += [f"--toy_folder={tmp_path / 'toy'}", f"--report_folder={tmp_path / 'report'}"]
    for command in ("run", "report"):
        program = [sys.executable, str(BENCHMARKS / "findings.py"), command, *words]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report" / "README.md").read_text()
    assert "not finished" not in page
    assert "## 8." in page and (tmp_path / "report" / "chain.png").is_file()
