"""Print the versions and the hardware, for a bug report.

    mtsql env

The text can be pasted as it is: it names no user, no host and no folder.
"""

import os
import platform
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from mtsql.commands.arguments import positional
from mtsql.files import print_line
from mtsql.run.commit import git_commit
from mtsql.run.recipes import in_a_line

PACKAGES = ("torch", "transformers", "accelerate", "peft", "flash-attn", "numpy", "jsonargparse")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
ACCELERATE_KEYS = (
    "compute_environment",
    "distributed_type",
    "num_machines",
    "num_processes",
    "mixed_precision",
    "use_cpu",
    "fsdp_config",
)
"""What is shown of Accelerate's file. Other keys may hold addresses and names of hosts."""
GIB = 1 << 30
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def main(words: Sequence[str]) -> None:
    """Print a line for each fact."""
    positional(words, __doc__)
    lines = [*_software(), *_machine(), *_torch(), ("Accelerate's file", _accelerate_file())]
    print_line("\n".join(f"{name:<18} {value}" for name, value in lines))


def _software() -> Iterator[tuple[str, str]]:
    commit = git_commit()
    source = "installed" if commit == "unknown" else f"commit {commit}"
    yield "mtsql", f"{_version('mtsql')}, {source}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    for name in PACKAGES:
        yield name, _version(name)
    yield "SQLite", sqlite3.sqlite_version


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    yield "platform", platform.platform()
    yield "CPU", _cpu_name()
    yield (
        "cores",
        (
            f"{psutil.cpu_count(logical=False) or 'unknown'} ({psutil.cpu_count()} with "
            f"hyper-threads), of which this process may use {_num_usable_cores()}"
        ),
    )
    total = psutil.virtual_memory().total
    limit = _memory_limit()
    bound = f", limited to {limit / GIB:.1f} GiB" if limit is not None and limit < total else ""
    yield "memory", f"{total / GIB:.1f} GiB{bound}"
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _cpu_name() -> str:
    """The name that Linux gives, or else what Python knows."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", text, flags=re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _num_usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_limit() -> int | None:
    """Bytes that a container leaves to this process. None if there is no limit."""
    try:
        text = MEMORY_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _torch() -> Iterator[tuple[str, str]]:
    """Threads, GPUs and attention. A torch that cannot be imported is one of the facts."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "torch", f"cannot be imported: {_without_folders(error)}"
        return
    yield "threads of torch", str(torch.get_num_threads())
    has_gpu = torch.cuda.is_available()
    built = torch.version.cuda or torch.version.hip
    yield "CUDA of torch", built or "none, this torch is built for CPUs only"
    if built:
        yield "GPU driver", _driver()
    if not has_gpu:
        yield "GPUs", "torch sees none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            (f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB, capability {gpu.major}.{gpu.minor}"),
        )
    yield "attention", _attention()


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown, there is no nvidia-smi"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0] if done.returncode == 0 else "unknown, nvidia-smi fails"


def _attention() -> str:
    """Which attention the engine and the learner choose, and why."""
    import torch

    from mtsql.model.attention_path import describe_path, main_device, path_for

    device = main_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        line = describe_path(path_for(device, dtype), dtype)
    except ValueError as error:
        return _without_folders(error)
    return line.removeprefix("attention: ")


def _accelerate_file() -> str:
    """The parts of Accelerate's default file that matter here."""
    try:
        from accelerate.commands.config.config_args import (
            default_config_file,
            load_config_from_file,
        )
    except (ImportError, OSError) as error:
        return f"unknown: {_without_folders(error)}"
    if not Path(default_config_file).is_file():
        return "none"
    try:
        saved = vars(load_config_from_file(None))
    except (ValueError, TypeError, KeyError) as error:
        return f"cannot be read: {_without_folders(error)}"
    shown = {key: getattr(saved.get(key), "value", saved.get(key)) for key in ACCELERATE_KEYS}
    return ", ".join(f"{key}={value}" for key, value in shown.items() if value not in (None, {}))


def _without_folders(error: Exception) -> str:
    """The text of an error in one line. Of paths only the last part is left, because folders may
    name a user."""
    return re.sub(r"[^\s'\"(]*/", "", in_a_line(error))
