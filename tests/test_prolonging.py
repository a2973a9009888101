"""Runs that are prolonged, that start from another run, or whose model is selected."""

import json
from functools import partial

import pytest

from helpers import runs
from helpers.runs import (
    FLAGS,
    FSDP,
    SCRIPTS,
    SMALL_RL,
    assert_same_tensors,
    finish,
    kill_when,
    metrics,
    num_updates_done,
    trajectories,
    updates,
)

start = partial(runs.start, script=SMALL_RL)
CONSTANT = [*FLAGS, "--optim.schedule", "constant"]
LAST = "checkpoints/update-00006/optimizer.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of six updates, whose schedules are those of four, in runs/straight."""
    folder = tmp_path_factory.mktemp("prolonging")
    length = ["--num_updates", "6", "--schedule_updates", "4"]
    finish(start(*CONSTANT, *length, "--run", "runs/straight", cwd=folder))
    return folder


def without_warnings(run):
    """The updates of a run. A warning looks at earlier updates, of which a branch has none."""
    return [{key: row[key] for key in row if key != "warning"} for row in updates(run)]


def test_a_prolonged_run_is_the_straight_longer_run(folder):
    """It was finished, then prolonged and killed, and is resumed without its new length."""
    straight, run = folder / "runs/straight", folder / "runs/short"
    finish(start(*CONSTANT, "--num_updates", "4", "--run", "runs/short", cwd=folder))
    process = start("--resume", "runs/short", "--num_updates", "6", cwd=folder)
    kill_when(process, lambda: num_updates_done(run) == 5)
    out, _ = finish(start("--resume", "runs/short", cwd=folder))
    assert metrics(run) == metrics(straight) and trajectories(run) == trajectories(straight)
    for name in ("model/model.safetensors", LAST):
        assert_same_tensors(run / name, straight / name)
    text = (straight / "config.yaml").read_text().replace("runs/straight", "runs/short")
    assert (run / "config.yaml").read_text() == text


def test_a_branch_without_a_change_is_the_run_that_it_starts_from(folder):
    straight, run = folder / "runs/straight", folder / "runs/same"
    before = {file: file.stat().st_mtime_ns for file in straight.rglob("*")}
    out, _ = finish(
        start("--from", "runs/straight/checkpoints/update-00002", "--run", "runs/same", cwd=folder)
    )
    begins = "starts from runs/straight/checkpoints/update-00002 with its weights, its curriculum,"
    assert begins in " ".join(out.split())
    assert without_warnings(run) == without_warnings(straight)[2:]
    assert trajectories(run).items() <= trajectories(straight).items()
    for name in ("model/model.safetensors", LAST):  # with the KL to the first weights in the loss
        assert_same_tensors(run / name, straight / name)
    assert {file: file.stat().st_mtime_ns for file in straight.rglob("*")} == before


def test_a_branch_with_another_reward_keeps_curriculum_and_optimizer(folder):
    straight, run = folder / "runs/straight", folder / "runs/reward"
    flags = ["--num_updates", "3", "--reward.weights.overlong", "3"]
    origin = "runs/straight/checkpoints/update-00002"
    finish(start("--from", origin, "--run", "runs/reward", *flags, cwd=folder))
    name = "optimizer.safetensors"
    assert_same_tensors(run / "checkpoints/update-00002" / name, folder / origin / name)
    one, other = updates(run)[0], updates(straight)[2]
    assert one["update"] == other["update"] == 3 and one["reward"] < other["reward"]
    same = ("num_sampled", "curriculum_stage", "lr", "reward/overlong")
    assert [one[key] for key in same] == [other[key] for key in same]
    state, old = (
        json.loads((place / "checkpoints/update-00003/state.json").read_text())["curriculum"]
        for place in (run, straight)
    )
    assert state == old


def test_a_model_is_selected_on_databases_that_no_rollout_saw(folder):
    """With sharded weights, whose model is copied from its checkpoint."""
    flags = ["--num_updates", "2", "--eval_every", "1", "--checkpoint.every", "0"]
    flags += ["--data.hold_out", "3", "--eval_turns", "2", "--run", "runs/selected"]
    script = SCRIPTS / "recorded_rl.py"
    out, _ = finish(start(*FLAGS, *flags, cwd=folder, launcher=FSDP, script=script))
    run = folder / "runs/selected"
    selected = json.loads((run / "model/selected.json").read_text())
    assert selected["select_by"] == "held_out" and set(selected["ex"]) == {"0", "1", "2"}
    best = run / f"checkpoints/update-{selected['update']:05d}/model"
    name = "model.safetensors"
    assert (run / "model" / name).read_bytes() == (best / name).read_bytes()
    dialogues = json.loads((folder / "data/toyworld/train.json").read_text())
    databases = [dialogue["database_id"] for dialogue in dialogues]

    def seen(turn_ids):
        return {databases[int(turn_id.split(":")[1])] for turn_id in turn_ids}

    played = [
        json.loads(line)[1]
        for rank in range(2)
        for line in (folder / f"runs/selected-played-{rank}").read_text().splitlines()
    ]
    scored = json.loads((run / "eval/held_out-00000.json").read_text())["turns"]
    state = json.loads((run / "checkpoints/update-00002/state.json").read_text())
    held_out = seen(row["turn_id"] for row in scored)
    assert played and held_out and not held_out & seen([*played, *state["curriculum"]["counts"]])
