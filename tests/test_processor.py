"""What model.dtype auto and model.few_rows null mean, by GPU, processor and width of the model."""

from dataclasses import replace

import pytest
import torch
import train_rl

from helpers.models import EMBEDDED, save_embedded
from mtsql.model import policy, processor
from mtsql.model.decoder import Linear
from mtsql.model.policy import (
    AdapterConfig,
    ModelConfig,
    generation_weights,
    load_policy,
    resolved,
)
from mtsql.model.processor import (
    MIN_BFLOAT16_WIDTH,
    Processor,
    pick_dtype,
    pick_few_rows,
    this_processor,
)
from mtsql.run.checkpoint import check_unchanged
from mtsql.run.config import parse_config, save_config

AVX2 = frozenset({"avx2"})
AVX512 = AVX2 | {"avx512_f"}
AMX = AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}
XEON_AMX = Processor("Intel", AMX)
XEON = Processor("Intel", AVX512)
EPYC = Processor("AMD", AVX512 | {"avx512_bf16"})
OLD_EPYC = Processor("AMD", AVX2)
ARM = Processor("other", frozenset({"neon", "bf16"}))
WIDE = MIN_BFLOAT16_WIDTH


@pytest.mark.parametrize(
    ("capability", "cpu", "width", "dtype"),
    [
        ((9, 0), XEON, 64, "bfloat16"),
        ((8, 0), Processor(), 64, "bfloat16"),
        ((7, 5), XEON_AMX, WIDE, "float32"),
        (None, XEON_AMX, WIDE, "bfloat16"),
        (None, XEON_AMX, WIDE - 1, "float32"),
        (None, XEON, WIDE, "float32"),
        (None, EPYC, WIDE, "bfloat16"),
        (None, EPYC, WIDE - 1, "float32"),
        (None, OLD_EPYC, WIDE, "float32"),
        (None, Processor("Intel", AVX512 | {"avx512_bf16"}), WIDE, "float32"),  # not measured
        (None, ARM, WIDE, "float32"),
        (None, Processor(), WIDE, "float32"),
    ],
)
def test_auto_is_the_type_that_the_machine_multiplies_fast(capability, cpu, width, dtype):
    assert pick_dtype(capability, cpu, width) == dtype


@pytest.mark.parametrize(
    ("cpu", "in_float32", "in_bfloat16"),
    [
        (OLD_EPYC, 64, 0),
        (EPYC, 8, 0),
        (XEON, 0, 0),
        (XEON_AMX, 0, 64),
        (ARM, 0, 0),
        (Processor(), 0, 0),
    ],
)
def test_few_rows_are_turned_where_that_was_measured_to_be_faster(cpu, in_float32, in_bfloat16):
    assert pick_few_rows(torch.float32, cpu) == in_float32
    assert pick_few_rows(torch.bfloat16, cpu) == in_bfloat16
    assert pick_few_rows(torch.float64, cpu) == 0


@pytest.fixture
def on_machine(monkeypatch):
    """A function that pretends that this machine has another processor or GPU."""

    def pretend(cpu, capability=None):
        monkeypatch.setattr(policy, "this_processor", lambda: cpu)
        monkeypatch.setattr(policy, "gpu_capability", lambda: capability)
        monkeypatch.setattr(policy, "default_few_rows", lambda dtype: pick_few_rows(dtype, cpu))

    return pretend


def test_the_resolved_configuration_is_the_same_on_every_later_machine(on_machine, tmp_path):
    size = replace(EMBEDDED, hidden_size=WIDE)
    folder = str(save_embedded(tmp_path / "model", size))
    for config in (ModelConfig(embedded=size), ModelConfig(path=folder)):
        on_machine(XEON_AMX)
        first = resolved(config)
        assert (first.dtype, first.few_rows) == ("bfloat16", 64)
        assert config.compute_dtype == first.compute_dtype == torch.bfloat16
        on_machine(OLD_EPYC)
        assert resolved(first) == first
        assert config.compute_dtype == torch.float32 and first.mixed_precision == "bf16"
        again = resolved(config)
        assert (again.dtype, again.few_rows) == ("float32", 64)


def test_what_the_user_sets_is_kept(on_machine):
    on_machine(XEON_AMX)
    config = ModelConfig(dtype="float32", few_rows=5)
    assert resolved(config) == config
    small = resolved(ModelConfig())  # the embedded model is too narrow for bfloat16
    assert (small.dtype, small.few_rows) == ("float32", 0)
    with pytest.raises(ValueError, match="model.few_rows is -1: it must be 0"):
        ModelConfig(few_rows=-1)


@pytest.mark.parametrize(
    ("ask", "maker"),
    [
        (lambda: {"cpu_name": "Intel Xeon", "avx2": True, "amx_bf16": False}, "Intel"),
        (lambda: {"cpu_name": "AMD EPYC", "avx2": True, "l1d_cache_size": 32768}, "AMD"),
        (lambda: {"architecture": "aarch64", "neon": True}, "other"),
    ],
)
def test_the_processor_is_asked_of_torch(monkeypatch, tmp_path, ask, maker):
    """Sizes and names are no flags. Without /proc/cpuinfo (macOS) the name tells the maker."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", ask)
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "nothing")
    this_processor.cache_clear()
    try:
        found = this_processor()
    finally:
        this_processor.cache_clear()
    assert found.maker == maker
    assert found.flags == {"neon" if maker == "other" else "avx2"}


def test_a_torch_that_cannot_be_asked_gives_a_processor_without_flags(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    this_processor.cache_clear()
    try:
        assert this_processor().flags == frozenset()
    finally:
        this_processor.cache_clear()


@pytest.mark.parametrize("script", ["train_rl", "train_sft", "eval"])
def test_scripts_print_and_keep_the_resolved_values(script, on_machine, tmp_path):
    on_machine(XEON_AMX)
    module = __import__(script)
    folder = save_embedded(tmp_path / "model", replace(EMBEDDED, hidden_size=WIDE))
    budget = ["--max_prompt_tokens=100", "--sampling.max_trajectory_tokens=90"]
    flags = [f"--model.path={folder}", "--sampling.max_reply_tokens=9", *budget]
    config = parse_config(module.Config, flags, "").completed()
    assert (config.model.dtype, config.model.few_rows) == ("bfloat16", 64)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_loaded_policy_decodes_with_the_few_rows_of_its_configuration(rank, tmp_path):
    """Not with those of the machine that it is loaded on, and so does its copy."""
    folder = str(save_embedded(tmp_path / "model"))
    policy = load_policy(ModelConfig(folder, lora=AdapterConfig(rank=rank), few_rows=3))
    with generation_weights(policy) as weights:
        for model in (policy, weights):
            layers = [module for module in model.modules() if isinstance(module, Linear)]
            assert len(layers) == 7 * EMBEDDED.num_layers + 1
            assert {layer.few_rows for layer in layers} == {3}


def test_a_run_is_resumed_on_another_machine_as_it_was_started(on_machine, tmp_path):
    folder = save_embedded(tmp_path / "model", replace(EMBEDDED, hidden_size=WIDE))
    budget = ["--max_prompt_tokens=100", "--sampling.max_trajectory_tokens=90"]
    flags = [f"--model.path={folder}", "--sampling.max_reply_tokens=9", *budget]
    run = tmp_path / "run"
    run.mkdir()
    on_machine(OLD_EPYC)
    started = parse_config(train_rl.Config, [*flags, f"--run={run}"], "").completed()
    assert (started.model.dtype, started.model.few_rows) == ("float32", 64)
    save_config(started, run / "config.yaml")
    for cpu, capability in ((XEON_AMX, None), (Processor(), (9, 0))):
        on_machine(cpu, capability)
        resumed = parse_config(train_rl.Config, ["--resume", str(run)], "").completed()
        assert resumed.model == started.model
        check_unchanged(resumed, run)
