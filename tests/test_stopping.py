"""A run that a scheduler, a launcher or a full disk ends says what is kept and can be resumed."""

import os
import resource
import shutil
import signal
import time

import psutil
import pytest

from helpers.runs import (
    FLAGS,
    ONE,
    ROOT,
    TWO,
    assert_same_run,
    finish,
    num_updates_done,
    start,
    wait_until,
)
from mtsql.run.checkpoint import newest_checkpoint, read_checkpoint

LONG = [*FLAGS, "--num_updates", "4000", "--checkpoint.every", "0"]
LINE = "updates are done; continue with --resume"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a straight run in runs/straight, and its warm start."""
    folder = tmp_path_factory.mktemp("stopping")
    finish(start(*FLAGS, "--run", "runs/straight", cwd=folder))
    return folder


def begin(folder, name, flags, launcher=()):
    """A new run in which two updates are done."""
    run = folder / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    process = start(*flags, "--run", f"runs/{name}", cwd=folder, launcher=launcher)
    wait_until(lambda: num_updates_done(run) == 2, process)
    return process, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "launcher"),
    [
        ("the launcher", ONE),
        ("all", TWO),
        ("the launcher", TWO),
        ("the launcher, by SIGKILL", TWO),
    ],
    ids=["the launcher of one", "all", "the launcher", "the launcher, by SIGKILL"],
)
def test_sigterm_writes_a_checkpoint_under_a_launcher(whom, launcher, folder):
    process, run = begin(folder, "launched", LONG, launcher)
    processes = psutil.Process(process.pid).children(recursive=True)
    if whom == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGKILL if "KILL" in whom else signal.SIGTERM)
    _, err = process.communicate(timeout=120)  # until the last of its processes has ended
    assert LINE in err.splitlines()[-1]
    psutil.wait_procs(processes, timeout=30)
    assert not (run / ".lock").exists() and "Traceback" not in err
    assert read_checkpoint(newest_checkpoint(run)).state["update"] == num_updates_done(run) >= 2


@pytest.mark.slow
def test_two_ranks_are_refused_a_run_that_is_in_use(folder):
    process, run = begin(folder, "used", LONG)
    begun = time.monotonic()
    out, err = start("--resume", "runs/used", cwd=folder, launcher=TWO).communicate(timeout=120)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(set(said)) == 1 and len(said) <= 2  # it comes again after the launcher's own text
    assert err.strip().splitlines()[-1] == said[0]
    assert f"in use by process {process.pid} on host" in said[0]
    assert time.monotonic() - begun < 100 and "continues" not in out
    process.kill()
    process.wait()
    assert (run / ".lock").exists()  # for the next one to take over


@pytest.mark.slow
@pytest.mark.parametrize("room", [10, 40], ids=["half a line", "some bytes"])
def test_after_a_full_disk_the_resumed_run_equals_the_straight_one(room, folder):
    process, run = begin(folder, "full", FLAGS)
    size = (run / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
    _, err = finish(process, expected=1)
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert "cannot be written: " in err and "is kept: continue with --resume runs/full" in err
    finish(start("--resume", "runs/full", cwd=folder))
    assert_same_run(folder / "runs/straight", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_time", "line"),
    [
        (lambda run: (run / ".lock").exists(), "nothing is kept: start it again"),
        (lambda run: (run / "inputs.json").exists(), "no checkpoint was written yet: --resume"),
        (lambda run: (run / "eval").exists(), "no checkpoint was written yet: --resume"),
    ],
    ids=["loading", "first evaluation", "probe"],
)
def test_sigterm_before_the_first_checkpoint_is_a_one_line_message(is_time, line, folder):
    run = folder / "runs/early"
    shutil.rmtree(run, ignore_errors=True)
    flags = [*LONG, "--curriculum.max_probe_turns", "400", "--curriculum.probe_samples", "8"]
    process = start(*flags, "--run", "runs/early", cwd=folder)
    wait_until(lambda: is_time(run), process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = finish(process, expected=143)
    assert err.splitlines()[-1].startswith(f"terminated (SIGTERM): {line}")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_eval_ends_at_once(folder):
    script = ROOT / "eval.py"
    flags = ["--model.path", "runs/straight/model", "--run", "runs/eval", "--split", "train"]
    process = start(*flags, cwd=folder, script=script)
    wait_until((folder / "runs/eval/metrics.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = finish(process, expected=143)
    line = "terminated (SIGTERM): nothing is scored yet: --resume runs/eval starts over\n"
    assert err == line
