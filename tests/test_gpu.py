"""The checks of benchmarks/gpu.py: on a GPU with `pytest -m gpu`, and here on the pretended one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.flash_double import STRICT, replace_flash_attn
from helpers.pretended_gpu import DEVICE, pretended_gpu

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_checks  # noqa: E402
from gpu_target import TINY, Target  # noqa: E402


@pytest.fixture(params=["flash-attn", "without"])
def pretended(request, monkeypatch) -> Iterator[Target]:
    if request.param == "flash-attn":
        replace_flash_attn(monkeypatch, STRICT)
    with pretended_gpu() as gpu:
        yield Target(DEVICE, TINY, pretended=gpu)


@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
def test_on_the_pretended_gpu(check, pretended):
    found = check(pretended)
    print(found)
    assert found.status != "fail", found
