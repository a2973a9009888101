"""Which operators compute attention, by device, dtype, GPU and what importing flash-attn gave."""

import sys
from types import SimpleNamespace

import pytest
import torch

from mtsql.engine.paged_attention import uses_flash
from mtsql.model import attention_path
from mtsql.model.attention_path import (
    FlashInstall,
    choose_path,
    describe_path,
    import_flash,
    path_for,
)

WORKS = FlashInstall("works", "2.8.3")
MISSING = FlashInstall("missing")
BROKEN = FlashInstall("broken", "2.8.3", "undefined symbol: _ZN3c104")
OFF = FlashInstall("off")
HOPPER, TURING = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "flash", "generation", "learning"),
    [
        ("cpu", torch.float32, None, MISSING, "visits", "parts"),
        ("cpu", torch.bfloat16, None, WORKS, "visits", "parts"),
        ("cpu", torch.bfloat16, None, BROKEN, "visits", "parts"),
        ("cuda", torch.bfloat16, HOPPER, WORKS, "flash", "flash"),
        ("cuda", torch.float16, (8, 0), WORKS, "flash", "flash"),
        ("cuda", torch.bfloat16, HOPPER, MISSING, "gathered", "varlen"),
        ("cuda", torch.float16, (8, 0), OFF, "gathered", "varlen"),
        ("cuda", torch.float32, HOPPER, WORKS, "gathered", "padded"),
        ("cuda", torch.float32, HOPPER, BROKEN, "gathered", "padded"),
        ("cuda", torch.float64, HOPPER, WORKS, "gathered", "padded"),
        ("cuda", torch.float16, TURING, WORKS, "gathered", "padded"),
        ("cuda", torch.bfloat16, TURING, BROKEN, "gathered", "padded"),
        ("mps", torch.bfloat16, None, MISSING, "gathered", "padded"),
    ],
)
def test_the_choice(device, dtype, capability, flash, generation, learning):
    path = choose_path(device, dtype, capability, flash)
    assert (path.generation, path.learning) == (generation, learning)
    assert path.block_size == (256 if generation == "flash" else 32)


def test_a_broken_flash_attn_is_an_error_that_names_the_way_on():
    with pytest.raises(ValueError, match=r"2\.8\.3 is installed but cannot be imported") as error:
        choose_path("cuda", torch.bfloat16, HOPPER, BROKEN)
    assert "undefined symbol" in str(error.value) and "MTSQL_FLASH_ATTN=off" in str(error.value)


@pytest.mark.parametrize(
    ("path", "block_size", "line"),
    [
        (
            choose_path("cuda", torch.bfloat16, HOPPER, WORKS),
            None,
            "attention: flash-attn 2.8.3 (bfloat16, blocks of 256 tokens)",
        ),
        (
            choose_path("cuda", torch.bfloat16, HOPPER, MISSING),
            64,
            "attention: torch's varlen_attn to learn, gathered blocks to generate "
            "(bfloat16, blocks of 64 tokens), because flash-attn is not installed",
        ),
        (
            choose_path("cuda", torch.bfloat16, TURING, WORKS),
            None,
            "attention: padded rows to learn, gathered blocks to generate (bfloat16, blocks of 32 "
            "tokens), because flash-attn needs compute capability 8.0 and this GPU has 7.5",
        ),
    ],
)
def test_the_line_of_a_run(path, block_size, line):
    assert describe_path(path, torch.bfloat16, block_size) == line


def test_importing_flash_attn(monkeypatch):
    monkeypatch.delenv("MTSQL_FLASH_ATTN", raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert import_flash() == (None, MISSING._replace(state="missing"))
    monkeypatch.setattr(attention_path, "version", lambda name: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    function, install = import_flash()
    assert function is None
    assert install.state == "broken" and "cannot import name" in install.error
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=max))
    assert import_flash() == (max, WORKS)
    monkeypatch.setenv("MTSQL_FLASH_ATTN", "off")
    assert import_flash() == (None, OFF)
    monkeypatch.setenv("MTSQL_FLASH_ATTN", "no")
    _, unclear = import_flash()
    assert choose_path("cpu", torch.float32, None, unclear).learning == "parts"
    with pytest.raises(ValueError, match="MTSQL_FLASH_ATTN is 'no': .* off"):
        choose_path("cuda", torch.bfloat16, HOPPER, unclear)


@pytest.mark.parametrize("error", [OSError, ImportError])
def test_a_flash_attn_whose_libraries_are_missing_is_broken(error, monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text(f"raise {error.__name__}('libcudart.so.12: no file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    _, install = import_flash()
    assert install == FlashInstall("broken", "of unknown version", "libcudart.so.12: no file")


def test_this_machine_s_cpu_has_its_own_path():
    assert path_for(torch.device("cpu"), torch.bfloat16).generation == "visits"
    assert not uses_flash(torch.device("cpu"), torch.bfloat16)
