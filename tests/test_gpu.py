"""The checks of benchmarks/gpu.py: on a GPU with `pytest -m gpu`, and here on the pretended one."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.flash_double import STRICT, replace_flash_attn
from helpers.pretended_gpu import DEVICE, pretended_gpu
from mtsql.engine.cuda_graphs import DecodeGraphs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu_checks  # noqa: E402
import gpu_learning  # noqa: E402
import gpu_speed  # noqa: E402
from gpu_target import TINY, Target, counted_waits  # noqa: E402

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


def test_a_graph_that_computes_something_else_is_found(pretended, monkeypatch):
    run = DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda *inputs: 1.5 * run(*inputs))
    assert gpu_checks.graphs_on_and_off(pretended).status in ("fail", "skip")


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
    assert all(check.figures or check.status == "skip" for check in checks), checks


@pytest.mark.slow
def test_two_ranks_on_the_cpu():
    found = gpu_learning.two_ranks(Target(torch.device("cpu"), TINY))
    assert found.status == "pass", found


@pytest.mark.gpu
def test_on_a_gpu():
    """In a process of its own: here torch takes the pretended GPU for the accelerator."""
    words = [str(BENCHMARKS / "gpu.py"), "--speed", "false", "--json", "true"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.stdout, done.stderr
    failed = [check for check in json.loads(done.stdout)["checks"] if check["status"] == "fail"]
    assert not failed, failed


def test_the_other_tests_see_no_gpu(pytestconfig):
    """They are written for a CPU."""
    if pytestconfig.option.markexpr != "gpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_waits_are_told_from_the_warning_that_waits_will_be_warned_of(monkeypatch):
    def switch(mode: str) -> None:
        if mode == "warn":
            warnings.warn("the mode does not yet detect all synchronizing operations")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    with counted_waits(Target(torch.device("cuda"))) as waits:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)")
    assert list(waits.values()) == [1]


def test_log_probs_may_differ_as_much_as_bfloat16_changes_them():
    assert gpu_checks.max_gap([0.0, 0.004]) == gpu_checks.MAX_GAP
    assert gpu_checks.max_gap([0.03, 0.05]) == pytest.approx(0.08)


def test_the_model_of_transformers_rotates_in_float32():
    target = Target(torch.device("cpu"), TINY)
    half, wide = target.theirs(torch.bfloat16).model, target.theirs(torch.float32).model
    assert half.norm.weight.dtype is torch.bfloat16
    assert torch.equal(half.rotary_emb.inv_freq, wide.rotary_emb.inv_freq)
