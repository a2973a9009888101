"""Killed and resumed is the run that was never killed: parameters, metrics and trajectories, bit for bit."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtsql.run.checkpoint import (
    CheckpointConfig,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--model.embedded.hidden_size 32 --model.embedded.num_layers 1 --model.embedded.intermediate_size 32"
    " --warm_start.max_samples 32 --warm_start.epochs 1 --num_updates 4 --turns_per_update 3 --group_size 3"
    " --eval_turns 2 --eval_every 2 --curriculum.max_probe_turns 6 --curriculum.probe_samples 1"
    " --sampling.max_reply_tokens 24 --sampling.max_trajectory_tokens 64 --reward.overlong_buffer 64"
    " --advantage.baseline none --advantage.scale none --loss.kl_coef 0.01"
    " --checkpoint.every 1 --checkpoint.keep_last 9"
).split()  # length is punished and nothing subtracted: even a model that earns nothing takes real steps

OBJECTIVES = (
    "--advantage.baseline mean --advantage.scale group --num_passes 2"
    " --minibatches 2 --old_logprobs recomputed --curriculum.resample_rounds 1"
    " --group_size 8 --sampling.max_reply_tokens 64"
).split()  # lengths differ, and so rewards, in about every third group


def start(*flags, cwd, launcher=(), script=ROOT / "train_rl.py"):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *flags],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )


def finish(process, expected=0):
    out, err = process.communicate(timeout=400)
    assert process.returncode == expected, err
    return out, err


def stop_when(process, is_time, sig):
    """Send `sig` to all processes of a started run as soon as `is_time()`."""
    wait_until(is_time, process)
    os.killpg(process.pid, sig)


def wait_until(is_time, process):
    while not is_time():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.0005)


def num_updates_done(run):
    return (
        (run / "metrics.jsonl").read_text().count('"stage": "rl"')
        if (run / "metrics.jsonl").exists()
        else 0
    )


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.endswith("_secs")} for line in lines
    ]


def assert_same_run(one, other, weights="model.safetensors"):
    assert metrics(one) == metrics(other)
    for name in (f"model/{weights}", "checkpoints/update-00004/optimizer.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys() and all(
            torch.equal(first[k], second[k]) for k in first
        )
    texts = [
        {p.name: p.read_text() for p in (run / "trajectories").iterdir()} for run in (one, other)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a straight run in runs/straight, and its warm start."""
    folder = tmp_path_factory.mktemp("resume")
    finish(start(*FLAGS, "--run", "runs/straight", cwd=folder))
    return folder


def test_the_straight_run_learned_and_its_first_pass_had_ratio_one(folder):
    lines = [line for line in metrics(folder / "runs/straight") if line["stage"] == "rl"]
    assert all(line["grad_norm"] > 0 for line in lines)
    for line in lines:  # one pass: the engine's log-probs against the learner's
        assert line["loss/ratio"] == pytest.approx(1, abs=1e-4) and line["loss/logprob_gap"] < 1e-4
        assert line["loss/clip_low"] == line["loss/clip_high"] == line["loss/ratio_far"] == 0
    assert lines[0]["loss/kl"] == pytest.approx(0, abs=1e-9) and lines[-1]["loss/kl"] > 0


def test_a_run_killed_again_and_again_is_the_straight_run(folder):
    run = folder / "runs/killed"
    process = start(*FLAGS, "--run", "runs/killed", cwd=folder)
    stop_when(process, lambda: list(run.glob("checkpoints/.update-00001.partial")), signal.SIGKILL)
    process.wait()
    process = start("--resume", "runs/killed", cwd=folder)
    stop_when(process, lambda: num_updates_done(run) == 2, signal.SIGKILL)
    process.wait()
    # SIGTERM leaves a checkpoint of its own moment, with a model folder that loads; meanwhile nobody else has the run
    process = start("--resume", "runs/killed", "--checkpoint.every", "0", cwd=folder)
    wait_until(
        lambda: (
            (run / ".lock").exists() and f'"pid": {process.pid},' in (run / ".lock").read_text()
        ),
        process,
    )
    process.send_signal(signal.SIGSTOP)
    _, err = finish(start("--resume", "runs/killed", cwd=folder), expected=1)
    assert (
        f"error: run runs/killed: in use by process {process.pid} on host" in err.splitlines()[-1]
    )
    process.send_signal(signal.SIGCONT)
    stop_when(process, lambda: num_updates_done(run) == 3, signal.SIGTERM)
    _, err = finish(process, expected=143)
    assert re.fullmatch(
        r"terminated \(SIGTERM\): \d updates are done; go on with --resume runs/killed",
        err.splitlines()[-1],
    )
    assert "Traceback" not in err
    assert (
        newest_checkpoint(run).name >= "update-00003"
        and (newest_checkpoint(run) / "model/config.json").is_file()
    )
    finish(start("--resume", "runs/killed", cwd=folder))
    assert_same_run(folder / "runs/straight", run)


@pytest.mark.slow
def test_refills_and_several_steps_are_resumed_exactly(folder):
    finish(start(*FLAGS, *OBJECTIVES, "--run", "runs/steps", cwd=folder))
    run = folder / "runs/steps-killed"
    process = start(*FLAGS, *OBJECTIVES, "--run", "runs/steps-killed", cwd=folder)
    stop_when(process, lambda: num_updates_done(run) == 2, signal.SIGKILL)
    process.wait()
    finish(start("--resume", "runs/steps-killed", cwd=folder))
    assert_same_run(folder / "runs/steps", run)
    lines = [line for line in metrics(run) if line["stage"] == "rl"]
    assert any(line["resample/rounds"] for line in lines)
    assert any(0 < line["resample/groups_kept"] < line["resample/groups_sampled"] for line in lines)
    for line in lines:
        assert line["resample/groups_sampled"] <= 2 * 3 and line["resample/groups_kept"] <= 3
        assert line["num_steps"] <= 4 and (line["engine_gap"] or 0) < 1e-4
    assert any(line["num_steps"] > 1 and line["loss/ratio"] != 1 for line in lines)


@pytest.mark.slow
def test_sft_killed_and_stopped_is_the_straight_run(folder):
    flags = [*FLAGS[:6], "--sft.max_samples", "32", "--sft.epochs", "3", "--checkpoint.every", "3"]
    script = ROOT / "train_sft.py"
    finish(start(*flags, "--run", "runs/sft", cwd=folder, script=script))
    run = folder / "runs/sft-killed"
    num_done = lambda: (
        len((run / "metrics.jsonl").read_text().splitlines())
        if (run / "metrics.jsonl").exists()
        else 0
    )  # noqa: E731
    process = start(*flags, "--run", "runs/sft-killed", cwd=folder, script=script)
    stop_when(process, lambda: num_done() == 5, signal.SIGKILL)
    process.wait()
    assert newest_checkpoint(run).name == "update-00003"
    process = start(
        "--resume", "runs/sft-killed", "--checkpoint.every", "0", cwd=folder, script=script
    )
    stop_when(process, lambda: num_done() == 8, signal.SIGINT)
    _, err = finish(process, expected=130)
    assert (
        "updates are done; go on with --resume runs/sft-killed" in err
        and newest_checkpoint(run).name >= "update-00008"
    )
    finish(start("--resume", "runs/sft-killed", cwd=folder, script=script))
    assert metrics(folder / "runs/sft") == metrics(run) and len(metrics(run)) == 12
    first, second = (
        load_file(folder / "runs/sft/model/model.safetensors"),
        load_file(run / "model/model.safetensors"),
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    _, err = finish(
        start("--resume", "runs/sft", "--sft.epochs", "1", cwd=folder, script=script), expected=1
    )
    assert "sft.epochs is 1.0, but runs/sft was started with 3.0" in err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_are_resumed_exactly_and_one_may_go_on_alone(folder):
    two = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    finish(start(*FLAGS, "--run", "runs/two", cwd=folder, launcher=two))
    run = folder / "runs/two-killed"
    process = start(*FLAGS, "--run", "runs/two-killed", cwd=folder, launcher=two)
    stop_when(process, lambda: num_updates_done(run) == 2, signal.SIGKILL)
    process.wait()
    shutil.copytree(run, folder / "runs/alone")
    finish(start("--resume", "runs/two-killed", cwd=folder, launcher=two))
    assert_same_run(folder / "runs/two", run)
    finish(start("--resume", "runs/alone", cwd=folder))
    rewards = [
        [line["reward"] for line in metrics(folder / "runs" / name) if line["stage"] == "rl"]
        for name in ("straight", "two", "alone")
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5) and rewards[0] == pytest.approx(
        rewards[2], abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "shards", [[], ["--use_fsdp", "--fsdp_version", "2"]], ids=["copies", "shards"]
)
def test_two_processes_refill_and_step_as_one(shards, folder):
    two = [
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        *shards,
    ]
    flags = [*FLAGS, *OBJECTIVES, "--num_updates", "2"]
    for name, launcher in ((f"steps-one{len(shards)}", []), (f"steps-two{len(shards)}", two)):
        finish(start(*flags, "--run", f"runs/{name}", cwd=folder, launcher=launcher))
    one, other = [
        [line for line in metrics(folder / "runs" / name) if line["stage"] == "rl"]
        for name in (f"steps-one{len(shards)}", f"steps-two{len(shards)}")
    ]
    for mine, theirs in zip(one, other, strict=True):
        for key in (
            "reward",
            "resample/rounds",
            "resample/groups_sampled",
            "resample/groups_kept",
            "num_steps",
            "loss",
            "grad_norm",
        ):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--resume runs/straight --num_updates 9",
            "num_updates is 9, but runs/straight was started with 4",
        ),
    ],
)
def test_what_cannot_be_resumed_is_said_in_a_line(folder, flags, words):
    _, err = finish(start(*flags.split(), cwd=folder), expected=1)
    assert words in err.splitlines()[-1] and "Traceback" not in err


def write(run, update=3, ex=None, config=CheckpointConfig(), save_model=None):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").touch()
    save_checkpoint(
        run,
        update,
        save_model or (lambda folder: folder.mkdir()),
        {"step/w": torch.ones(3)},
        {"ex": ex},
        config,
    )
    return run / "checkpoints" / f"update-{update:05d}"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: os.truncate(f / "optimizer.safetensors", 20),
            "optimizer.safetensors has 20 bytes instead of",
        ),
        (
            lambda f: (f / "optimizer.safetensors").unlink(),
            "optimizer.safetensors has 0 bytes instead of",
        ),
        (lambda f: os.truncate(f / "state.json", 20), "state.json cannot be read"),
        (
            lambda f: (f / "state.json").write_text('{"step": 3}'),
            "not a checkpoint of this program",
        ),
        (lambda f: (f / "state.json").write_text("[]"), "not a checkpoint of this program"),
        (
            lambda f: (f / "optimizer.safetensors").write_bytes(bytes(92)),
            "damaged|bytes instead of",
        ),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_named(damage, words, tmp_path):
    folder = write(tmp_path / "run")
    assert read_checkpoint(folder).optimizer["step/w"].tolist() == [1, 1, 1]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(folder)


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    write(run, 1)

    def too_much(folder):
        folder.mkdir()
        save_file({"w": torch.ones(2000)}, folder / "model.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # to a writer what a full disk is
    try:
        with pytest.raises(ValueError, match="update-00002: cannot be written: .*File too large"):
            write(run, 2, save_model=too_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(run).name == "update-00001" and read_checkpoint(newest_checkpoint(run))
    assert write(run, 2) == newest_checkpoint(run)


def test_the_last_and_the_best_are_kept(tmp_path):
    for update, ex in enumerate([None, {"dev": 5.0}, {"dev": 9.0}, {"dev": 1.0}, None, None]):
        write(tmp_path, update, ex, CheckpointConfig(keep_last=2, keep_best=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"update-0000{n}" for n in (2, 4, 5)
    ]
