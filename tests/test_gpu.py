"""The checks of benchmarks/gpu.py: on a GPU with `pytest -m gpu`, and here on the pretended one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.flash_double import STRICT, replace_flash_attn
from helpers.pretended_gpu import DEVICE, pretended_gpu

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_checks  # noqa: E402
import gpu_learning  # noqa: E402
import gpu_speed  # noqa: E402
from gpu_target import TINY, Target  # noqa: E402

ON_BOTH = [*gpu_checks.CHECKS, *gpu_learning.GPU_CHECKS]
"""Checks that a GPU and the pretended one can run."""
WITH_AUTOCAST_OR_GRADIENTS = [gpu_checks.casts_of_a_step, *gpu_learning.CPU_CHECKS]
"""Checks that a GPU and a CPU can run."""


@pytest.fixture(params=["flash-attn", "without"])
def pretended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """The pretended GPU, with the double of flash-attn and without."""
    if request.param == "flash-attn":
        replace_flash_attn(monkeypatch, STRICT)
    with pretended_gpu() as gpu:
        yield Target(DEVICE, TINY, pretended=gpu)


@pytest.mark.parametrize(
    ("found", "wanted", "holds"),
    [
        ("2.13.0+cu130", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("5.24.0", ">=5.23,<6", True),
        ("5.9.0", ">=5.23,<6", False),
        ("6.0.0.dev0", ">=5.23,<6", False),
        ("not installed", ">=5.23,<6", False),
    ],
)
def test_versions_are_compared_as_numbers(found, wanted, holds):
    assert gpu_checks.is_accepted(found, wanted) == holds
    assert set(gpu_checks.accepted()) == {"torch", "transformers"}


@pytest.mark.parametrize("check", ON_BOTH, ids=lambda check: check.__name__)
def test_on_the_pretended_gpu(check, pretended):
    found = check(pretended)
    assert found.status != "fail", found


@pytest.mark.parametrize("check", WITH_AUTOCAST_OR_GRADIENTS, ids=lambda check: check.__name__)
def test_on_the_cpu(check, monkeypatch):
    replace_flash_attn(monkeypatch, STRICT)
    found = check(Target(torch.device("cpu"), TINY))
    assert found.status == "pass", found


@pytest.mark.slow
def test_speed_is_measured_with_a_tiny_model_on_the_cpu():
    """Whatever the figures say: the code has run."""
    load = gpu_speed.Load(1 << 20, 64, (1, 20), (30,), 2, prefill=(2, 40), learn_tokens=600)
    checks = list(gpu_speed.measure(Target(torch.device("cpu"), TINY), load))
    assert [check.name for check in checks] == [
        "limits of the GPU",
        "decode 1 rows, 30 tokens",
        "decode 20 rows, 30 tokens",
        "capture of a graph",
        "prefill",
        "sampling 20 rows",
        "learning",
    ]
    assert all(check.figures for check in checks), checks


@pytest.mark.slow
def test_two_ranks_on_the_cpu():
    found = gpu_learning.two_ranks(Target(torch.device("cpu"), TINY))
    assert found.status == "pass", found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "check",
    [*ON_BOTH, *WITH_AUTOCAST_OR_GRADIENTS, *gpu_learning.PROCESS_CHECKS],
    ids=lambda check: check.__name__,
)
def test_on_a_gpu(check):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have one for the CPU
    found = check(Target(torch.device("cuda")))
    AcceleratorState._reset_state(reset_partial_state=True)
    if found.status == "skip":
        pytest.skip(found.found)
    assert found.status == "pass", found
