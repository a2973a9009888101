"""Check a GPU and measure it. Prints one table.

    python benchmarks/gpu.py                                   # random weights, Qwen3-0.6B's shape
    python benchmarks/gpu.py --model.path models/Qwen3-0.6B    # a model of your own
    python benchmarks/gpu.py --json true                       # all figures, for a program
    python benchmarks/gpu.py --pretend true                    # without a GPU, see below

First what has to be right: the versions and the attention that runs, kernels, the engine against
transformers, CUDA graphs, waits and casts of a step, the learner, two GPUs, a shortened quick
start. `pytest -m gpu` runs this part. Then speed, as a share of what the same GPU reaches in
a copy and in a matmul. Exit code 1 if a row has failed.

It needs the versions of torch and transformers that pyproject.toml names. flash-attn is optional:
the first row says which attention runs and why.

`--pretend true` runs the checks on a pretended GPU (tests/helpers/pretended_gpu.py), with a tiny
model and a double of flash-attn, and needs pytest. It shows that the checks work and how often a
step waits, uploads and casts. It says nothing about speed or about real kernels.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_checks
import gpu_learning
import gpu_speed
import torch
from flags import print_json, run_benchmark
from gpu_target import TINY, Check, Target, run_checks
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

TESTS = Path(__file__).resolve().parents[1] / "tests"
COLOURS = {"pass": "green", "fail": "red", "skip": "yellow"}


@dataclass(frozen=True)
class ModelFlags:
    """The model that is run."""

    path: str | None = None
    """A Hugging Face folder of a Qwen3 or Llama model. null: random weights."""


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/gpu.py."""

    model: ModelFlags = ModelFlags()
    """The model that is run."""
    speed: bool = True
    """Measure speed, too."""
    quick_start: bool = True
    """Run two updates of the quick start, too."""
    json: bool = False
    """Print JSON instead of a table."""
    pretend: bool = False
    """Run the checks on a pretended GPU."""


def main(flags: Flags) -> None:
    """Print the results. ValueError without a GPU."""
    if not flags.pretend and not torch.cuda.is_available():
        raise ValueError("no GPU: --pretend true runs the checks on a pretended one")
    disable_progress_bar()
    checks: list[Check] = []
    try:
        for check in _pretended() if flags.pretend else _on_gpu(flags):
            print(f"{check.name}: {check.status}", file=sys.stderr)
            checks.append(check)
    finally:  # what was found before an error that no check expects is shown, too
        if flags.json:
            print_json({"checks": [asdict(check) for check in checks]})
        else:
            device = "a pretended GPU" if flags.pretend else torch.cuda.get_device_name()
            print_table(checks, device)
    if any(check.status == "fail" for check in checks):
        sys.exit(1)


def _on_gpu(flags: Flags) -> Iterator[Check]:
    target = Target(torch.device("cuda", 0), path=flags.model.path)
    checks = [
        *gpu_checks.CHECKS,
        gpu_checks.casts_of_a_step,
        *gpu_learning.GPU_CHECKS,
        *gpu_learning.CPU_CHECKS,
        *gpu_learning.PROCESS_CHECKS,
    ]
    if not flags.quick_start:
        checks.remove(gpu_learning.quick_start)
    yield from run_checks(target, checks)
    if flags.speed:
        yield from gpu_speed.measure(target, gpu_speed.Load())


def _pretended() -> Iterator[Check]:
    """The checks that need no speed, on the pretended GPU; those that need gradients or autocast on
    the CPU, as the names say."""
    sys.path.append(str(TESTS))
    from helpers.flash_double import strict_flash_attn
    from helpers.pretended_gpu import DEVICE, pretended_gpu

    with strict_flash_attn():
        with pretended_gpu() as gpu:
            target = Target(DEVICE, TINY, pretended=gpu)
            yield from run_checks(target, [*gpu_checks.CHECKS, *gpu_learning.GPU_CHECKS])
        on_cpu = [gpu_checks.casts_of_a_step, *gpu_learning.CPU_CHECKS]
        yield from run_checks(Target(torch.device("cpu"), TINY), on_cpu)


def print_table(checks: list[Check], device: str) -> None:
    """One row for each check."""
    columns = "check", "result", "found", "wanted"
    table = Table(*columns, title=f"Checks on {device}", show_lines=True)
    for column in table.columns:
        column.overflow = "fold"
    for check in checks:
        colour = COLOURS[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/]", check.found, check.limit)
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(Flags, __doc__ or "", main)
