"""train_rl.py on one process, on two, with shards and on two machines is one and the same run."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from helpers import runs
from helpers.runs import (
    FLAGS,
    FSDP,
    ROOT,
    SCRIPTS,
    SMALL_RL,
    TWO,
    assert_same_run,
    clean_environment,
    finish,
    kill_when,
    num_updates_done,
    stop_when,
    updates,
)

start = partial(runs.start, script=SMALL_RL)
pytestmark = pytest.mark.slow


def play_and_finish(folder, *flags, launcher=()):
    """Start train_rl.py with its rollouts written down, and see it end well."""
    script = SCRIPTS / "recorded_rl.py"
    finish(start(*flags, cwd=folder, launcher=launcher, script=script))


def played(run, update):
    """All trajectories of an update, over all ranks."""
    files = run.parent.glob(f"{run.name}-played-*")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(line for line in lines if line[0] == update)


def copy_as_of(run, copy, update):
    """A copy of a run as it was right after its checkpoint of `update`."""
    shutil.copytree(run, copy)
    for place in (copy / "checkpoints").iterdir():
        if int(place.name[-5:]) > update:
            shutil.rmtree(place)


def assert_close_run(one, other):
    numbers = [
        [
            [line[k] for k in ("reward", "loss", "grad_norm", "num_tokens", "response_tokens")]
            for line in updates(run)
        ]
        for run in (one, other)
    ]
    assert len(numbers[0]) == len(numbers[1]) == 4
    for a, b in zip(*numbers, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for name in ("model/model.safetensors", "checkpoints/update-00004/optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(
            torch.allclose(a[k], b[k], atol=1e-4, rtol=1e-2) for k in a
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    play_and_finish(folder, *FLAGS, "--run", "runs/straight")
    return folder


def test_shards_and_one_process_are_the_same_run_and_each_resumes_the_other(folder):
    runs = folder / "runs"
    play_and_finish(folder, *FLAGS, "--run", "runs/shards", launcher=FSDP)
    assert_close_run(runs / "straight", runs / "shards")
    for name, source, launcher in (
        ("one-to-shards", "straight", FSDP),
        ("shards-to-one", "shards", ()),
        ("one-to-two", "straight", TWO),
    ):
        copy_as_of(runs / source, runs / name, 2)
        play_and_finish(folder, "--resume", f"runs/{name}", launcher=launcher)
        assert_close_run(runs / "straight", runs / name)
        for update in (2, 3):
            there = played(runs / name, update)
            assert there == played(runs / "straight", update) and len(there) == 9
        assert not played(runs / name, 1)
    copy_as_of(runs / "shards", runs / "shards-again", 2)
    play_and_finish(folder, "--resume", "runs/shards-again", launcher=FSDP)
    shutil.copytree(
        runs / "shards/trajectories", runs / "shards-again/trajectories", dirs_exist_ok=True
    )
    assert_same_run(runs / "shards", runs / "shards-again")


@pytest.mark.parametrize("launcher", [TWO, FSDP], ids=["copies", "shards"])
def test_two_processes_in_bfloat16_score_what_they_sampled(launcher, folder):
    run = folder / "runs" / f"bf16-{len(launcher)}"
    finish(
        start(*FLAGS, "--model.dtype", "bfloat16", "--run", str(run), cwd=folder, launcher=launcher)
    )
    lines = updates(run)
    assert len(lines) == 4
    assert all(line["grad_norm"] > 0 and line["loss/logprob_gap"] < 0.02 for line in lines)
    assert {w.dtype for w in load_file(run / "model/model.safetensors").values()} == {torch.float32}


def test_ctrl_c_ends_a_sharded_run_that_continues_from_its_last_checkpoint(folder):
    run = folder / "runs/stopped"
    process = start(*FLAGS, "--run", "runs/stopped", cwd=folder, launcher=FSDP)
    stop_when(process, lambda: num_updates_done(run) == 3, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "updates are done, but sharded weights cannot be written when a run is stopped" in err
    assert "is kept: continue with --resume runs/stopped" in err
    finish(start("--resume", "runs/stopped", cwd=folder, launcher=FSDP))
    assert_close_run(folder / "runs/straight", run)


def test_an_adapter_run_killed_and_resumed_is_the_straight_run(folder):
    model = next((folder / "runs/warm-start").iterdir()) / "model"
    flags = [*FLAGS, "--model.path", str(model), "--style", "brief", "--model.lora.rank", "4"]
    finish(start(*flags, "--run", "runs/lora", cwd=folder))
    run = folder / "runs/lora-killed"
    process = start(*flags, "--run", "runs/lora-killed", cwd=folder)
    kill_when(process, lambda: num_updates_done(run) == 2)
    finish(start("--resume", "runs/lora-killed", cwd=folder))
    assert_same_run(folder / "runs/lora", run, "adapter_model.safetensors")
    averages = load_file(run / "checkpoints/update-00004/optimizer.safetensors")
    assert averages and all("lora_" in name for name in averages)
    steps = [line["grad_norm"] for line in updates(run)]
    assert len(steps) == 4 and all(steps)


def two_machines(folder, script, *flags):
    """The two launches of a two-machine run, over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = [
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        port,
    ]
    launcher = ["-m", "accelerate.commands.launch", *there, "--machine_rank"]
    return [
        start(*flags, cwd=folder, launcher=[*launcher, str(rank)], script=script)
        for rank in range(2)
    ]


def test_two_machines_end_with_the_parameters_of_two_processes(folder):
    finish(start(*FLAGS, "--run", "runs/two", cwd=folder, launcher=TWO))
    for process in two_machines(folder, SMALL_RL, *FLAGS, "--run", "runs/machines"):
        finish(process)
    # Not bit for bit: a rank that is alone on its machine takes all cores, and more threads sum in
    # another order.
    assert_close_run(folder / "runs/two", folder / "runs/machines")


def test_a_crash_on_one_machine_ends_both_and_shows_its_own_traceback(tmp_path):
    processes = two_machines(tmp_path, SCRIPTS / "crashing_rank.py")
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert all(process.returncode for process in processes)  # neither slept
    assert "RuntimeError: the reward of this rank is broken" in errors[1]


def test_the_wrapped_policy_is_freed_before_the_process_group(tmp_path):
    """If DDP's reducer is freed after the process group, it joins gloo's threads while it holds the
    interpreter's lock. In one run of five a thread waits for that lock, and neither can end."""
    flags = [*FLAGS, "--run", "runs/two"]
    script = SCRIPTS / "watched_rl.py"
    out, _ = finish(start(*flags, cwd=tmp_path, launcher=TWO, script=script))
    # A warm start and a run, on two ranks, whose lines may be mixed.
    assert re.findall(r"freed inside the group: (True|False)", out) == ["True"] * 4


@pytest.mark.parametrize(
    ("case", "quiet"), [("every rank", []), ("main rank", ["-q"]), ("other rank", [])]
)
def test_a_mistake_on_two_processes_is_the_last_line(case, quiet, tmp_path):
    flags, words, script = ["--num_updates", "2"], "this rank cannot read it", ROOT / "train_rl.py"
    if case == "every rank":
        flags, words = ["--group_size", "1"], "group_size is 1"
    elif case == "main rank":
        (tmp_path / "runs" / "rl").mkdir(parents=True)
        (tmp_path / "runs" / "rl" / "metrics.jsonl").touch()
        words = "already holds a run"
    else:
        script = SCRIPTS / "one_rank_fails.py"
        flags = ["--num_updates", "2", "--warm_start", "null"]
    launcher = [sys.executable, *TWO[:2], *quiet, *TWO[2:]]
    done = subprocess.run(
        [*launcher, str(script), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env=clean_environment(),
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("error: ") and words in last, done.stderr
