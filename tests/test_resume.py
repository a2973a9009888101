"""A run that is killed and resumed equals the run that was never killed, bit for bit."""

import re
import shutil
import signal
from functools import partial

import pytest

from helpers import runs
from helpers.runs import (
    FLAGS,
    FSDP,
    SMALL_RL,
    SMALL_SFT,
    TWO,
    assert_same_run,
    assert_same_tensors,
    finish,
    kill_when,
    metrics,
    num_lines,
    num_updates_done,
    stop_when,
    updates,
)
from mtsql.run.checkpoint import newest_checkpoint

start = partial(runs.start, script=SMALL_RL)
OBJECTIVES = (
    "--advantage.baseline mean --advantage.scale group --num_passes 2"
    " --minibatches 2 --old_logprobs recomputed --curriculum.resample_rounds 1"
    " --group_size 8 --sampling.max_reply_tokens 64"
).split()
"""Lengths differ, and so do rewards, in about every third group."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a straight run in runs/straight, and its warm start."""
    folder = tmp_path_factory.mktemp("resume")
    finish(start(*FLAGS, "--run", "runs/straight", cwd=folder))
    return folder


def test_the_straight_run_learned_and_its_first_pass_had_ratio_one(folder):
    lines = updates(folder / "runs/straight")
    assert all(line["grad_norm"] > 0 for line in lines)
    for line in lines:  # one pass: the engine's log-probs against the learner's
        assert line["loss/ratio"] == pytest.approx(1, abs=1e-4) and line["loss/logprob_gap"] < 1e-4
        assert line["loss/clip_low"] == line["loss/clip_high"] == line["loss/ratio_far"] == 0
    assert lines[0]["loss/kl"] == pytest.approx(0, abs=1e-9) and lines[-1]["loss/kl"] > 0


def test_a_run_that_was_killed_and_stopped_is_the_straight_run(folder):
    run = folder / "runs/killed"
    process = start(*FLAGS, "--run", "runs/killed", cwd=folder)
    kill_when(process, lambda: list(run.glob("checkpoints/.update-00001.partial")))
    # After SIGTERM a run writes a checkpoint although none is due.
    process = start("--resume", "runs/killed", "--checkpoint.every", "0", cwd=folder)
    stop_when(process, lambda: num_updates_done(run) == 2, signal.SIGTERM)
    _, err = finish(process, expected=143)
    assert re.fullmatch(
        r"terminated \(SIGTERM\): \d updates are done; continue with --resume runs/killed",
        err.splitlines()[-1],
    )
    assert "Traceback" not in err
    assert newest_checkpoint(run).name >= "update-00002"
    assert (newest_checkpoint(run) / "model/config.json").is_file()
    finish(start("--resume", "runs/killed", cwd=folder))
    assert_same_run(folder / "runs/straight", run)


def num_chunks(run):
    """The finished chunks of the probe."""
    return sum(file.read_text().count("\n") for file in run.glob("probe/rank*.jsonl"))


@pytest.mark.slow
def test_a_run_that_was_killed_in_the_probe_goes_on_there_with_other_ranks(folder):
    probed = "--curriculum.max_probe_turns 200 --curriculum.probe_samples 1".split()
    flags = [*FLAGS, *probed, "--num_updates", "1"]
    finish(start(*flags, "--run", "runs/probed", cwd=folder))
    run = folder / "runs/probe-killed"
    process = start(*flags, "--run", "runs/probe-killed", cwd=folder)
    kill_when(process, lambda: num_chunks(run) == 2)
    shutil.copytree(run, folder / "runs/probe-two")
    out, _ = finish(start("--resume", "runs/probe-killed", cwd=folder))
    assert "probe: it goes on after 2 chunks of rollouts" in out and num_chunks(run) == 4
    straight = folder / "runs/probed"
    chunks, weights = "probe/rank0.jsonl", "model/model.safetensors"
    assert (straight / chunks).read_bytes() == (run / chunks).read_bytes()
    assert metrics(straight) == metrics(run)
    assert_same_tensors(straight / weights, run / weights)
    finish(start("--resume", "runs/probe-two", cwd=folder, launcher=TWO))
    two = [row for row in metrics(folder / "runs/probe-two") if row["stage"] == "probe"]
    assert two == [row for row in metrics(run) if row["stage"] == "probe"]


@pytest.mark.slow
def test_resampling_and_several_steps_are_resumed_exactly(folder):
    finish(start(*FLAGS, *OBJECTIVES, "--run", "runs/steps", cwd=folder))
    run = folder / "runs/steps-killed"
    process = start(*FLAGS, *OBJECTIVES, "--run", "runs/steps-killed", cwd=folder)
    kill_when(process, lambda: num_updates_done(run) == 2)
    finish(start("--resume", "runs/steps-killed", cwd=folder))
    assert_same_run(folder / "runs/steps", run)
    lines = updates(run)
    assert any(line["resample/rounds"] for line in lines)
    assert any(0 < line["resample/groups_kept"] < line["resample/groups_sampled"] for line in lines)
    for line in lines:
        assert line["resample/groups_sampled"] <= 2 * 3 and line["resample/groups_kept"] <= 3
        assert line["num_steps"] <= 4 and (line["engine_gap"] or 0) < 1e-4
    assert any(line["num_steps"] > 1 and line["loss/ratio"] != 1 for line in lines)


@pytest.mark.slow
def test_sft_killed_and_stopped_is_the_straight_run(folder):
    flags = [*FLAGS[:6], "--sft.max_samples", "32", "--sft.epochs", "3", "--checkpoint.every", "3"]
    script = SMALL_SFT
    finish(start(*flags, "--run", "runs/sft", cwd=folder, script=script))
    run = folder / "runs/sft-killed"
    process = start(*flags, "--run", "runs/sft-killed", cwd=folder, script=script)
    kill_when(process, lambda: num_lines(run) == 5)
    assert newest_checkpoint(run).name == "update-00003"
    again = ["--resume", "runs/sft-killed"]
    process = start(*again, "--checkpoint.every", "0", cwd=folder, script=script)
    stop_when(process, lambda: num_lines(run) == 8, signal.SIGINT)
    _, err = finish(process, expected=130)
    assert "updates are done; continue with --resume runs/sft-killed" in err
    assert newest_checkpoint(run).name >= "update-00008"
    finish(start(*again, cwd=folder, script=script))
    assert metrics(folder / "runs/sft") == metrics(run) and len(metrics(run)) == 12
    weights = "model/model.safetensors"
    assert_same_tensors(folder / "runs/sft" / weights, run / weights)


@pytest.mark.slow
def test_two_processes_are_resumed_exactly_and_one_may_continue_alone(folder):
    finish(start(*FLAGS, "--run", "runs/two", cwd=folder, launcher=TWO))
    run = folder / "runs/two-killed"
    process = start(*FLAGS, "--run", "runs/two-killed", cwd=folder, launcher=TWO)
    kill_when(process, lambda: num_updates_done(run) == 2)
    shutil.copytree(run, folder / "runs/alone")
    finish(start("--resume", "runs/two-killed", cwd=folder, launcher=TWO))
    assert_same_run(folder / "runs/two", run)
    finish(start("--resume", "runs/alone", cwd=folder))
    straight, two, alone = (
        [line["reward"] for line in updates(folder / "runs" / name)]
        for name in ("straight", "two", "alone")
    )
    assert straight == pytest.approx(two, abs=1e-5)
    assert straight == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TWO, FSDP], ids=["copies", "shards"])
def test_two_processes_resample_and_step_as_one(launcher, folder):
    flags = [*FLAGS, *OBJECTIVES, "--num_updates", "2"]
    name = f"steps{len(launcher)}"
    finish(start(*flags, "--run", f"runs/{name}-one", cwd=folder))
    finish(start(*flags, "--run", f"runs/{name}-two", cwd=folder, launcher=launcher))
    one, two = updates(folder / f"runs/{name}-one"), updates(folder / f"runs/{name}-two")
    keys = ["reward", "resample/rounds", "resample/groups_sampled", "resample/groups_kept"]
    keys += ["num_steps", "loss", "grad_norm"]
    for mine, theirs in zip(one, two, strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
