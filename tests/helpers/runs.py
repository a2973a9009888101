"""Start the scripts in processes of their own, stop them, and compare the runs that they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests/scripts"
SMALL_RL = SCRIPTS / "small_rl.py"
SMALL_SFT = SCRIPTS / "small_sft.py"
"""train_rl.py and train_sft.py on an embedded world of few databases."""
FLAGS = (
    "--model.embedded.hidden_size 32 --model.embedded.num_layers 1"
    " --model.embedded.intermediate_size 32 --warm_start.max_samples 32 --warm_start.epochs 1"
    " --num_updates 4 --turns_per_update 3 --group_size 3 --eval_turns 2 --eval_every 2"
    " --curriculum.max_probe_turns 6 --curriculum.probe_samples 1"
    " --sampling.max_reply_tokens 24 --sampling.max_trajectory_tokens 64"
    " --reward.overlong_buffer 64 --advantage.baseline none --advantage.scale none"
    " --loss.kl_coef 0.01 --checkpoint.every 1 --checkpoint.keep_last 9"
).split()
"""A run of train_rl.py in seconds. Length is punished and nothing is subtracted from rewards, so
that even a model that solves nothing takes real steps."""

ONE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
TWO = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
FSDP = [*TWO, "--use_fsdp", "--fsdp_version", "2"]
"""What stands between `python` and the script under a launcher."""


def clean_environment() -> dict[str, str]:
    """This process's environment without the traces of a launcher, with one thread. The scripts of
    the repository and the helpers of the tests can be imported."""
    launched = ("ACCELERATE_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}


def start(
    *flags: str, cwd: Path, launcher: Sequence[str] = (), script: Path = ROOT / "train_rl.py"
) -> subprocess.Popen:
    """Start a script in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *flags],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=clean_environment(),
    )


def launch(flags: list[str], script: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script to its end under `accelerate launch` with these flags."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    return subprocess.run(
        [*launcher, str(script), *args],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )


def finish(process: subprocess.Popen, expected: int = 0) -> tuple[str, str]:
    """Wait for the end of a process, check its exit code and return its two outputs."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == expected, err
    return out, err


def stop_when(process: subprocess.Popen, is_time: Callable[[], object], number: int) -> None:
    """Send a signal to all processes of a started run as soon as `is_time()` is true."""
    wait_until(is_time, process)
    os.killpg(process.pid, number)


def kill_when(process: subprocess.Popen, is_time: Callable[[], object]) -> None:
    """Kill all processes of a started run as soon as `is_time()` is true. A launcher gives each
    rank a session of its own, so the ranks are looked up; else they would go on for a while."""
    wait_until(is_time, process)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everyone)


def wait_until(is_time: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait until `is_time()` is true. The process must still run then."""
    while not is_time():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.0005)


def num_updates_done(run: Path) -> int:
    """The updates of RL in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"stage": "rl"') if file.exists() else 0


def num_lines(run: Path) -> int:
    """The lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock: times, rates and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("time", "_secs", "_per_sec", "peak_memory_mb", "_mfu", "peak_flops")
    measured += ("sql_wait_frac",)
    return [{key: v for key, v in line.items() if not key.endswith(measured)} for line in lines]


def updates(run: Path) -> list[dict]:
    """The lines of the updates of RL."""
    return [line for line in metrics(run) if line["stage"] == "rl"]


def trajectories(run: Path) -> dict[str, bytes]:
    """The trajectories of the updates by file name: those for a reader, and the records."""
    return {path.name: path.read_bytes() for path in (run / "trajectories").glob("update-*")}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two files of tensors are equal bit for bit."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_run(one: Path, other: Path, weights: str = "model.safetensors") -> None:
    """Two runs of `FLAGS` have the same metrics, weights, averages and trajectories."""
    assert metrics(one) == metrics(other)
    for name in (f"model/{weights}", "checkpoints/update-00004/optimizer.safetensors"):
        assert_same_tensors(one / name, other / name)
    assert trajectories(one) == trajectories(other) and len(trajectories(one)) == 8
