"""The memory plan against tensors that are there, and the line that refuses a run."""

import copy
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import train_rl
import train_sft
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen3Config

from helpers.learning import groups_of
from helpers.memory import Peak, attend, kept_bytes, num_bytes
from helpers.models import save_embedded, tiny_tokenizer
from helpers.pages import ROOT, source_commands
from mtsql.engine.config import EngineConfig
from mtsql.learner.logprobs import CHUNK_LOGITS, PIECE_LOGITS, PolicyModule
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Sample, pack
from mtsql.learner.step import Learner
from mtsql.model.adapters import DEFAULT_TARGETS
from mtsql.model.decoder import CausalLM
from mtsql.model.policy import (
    AdapterConfig,
    EmbeddedConfig,
    ModelConfig,
    generation_weights,
    load_policy,
    policy_shape,
    save_policy,
)
from mtsql.plan.fit import Way, fits, memory_of
from mtsql.plan.memory import kept_in_layer, peak_bytes, plan, require_fit, require_memory
from mtsql.plan.recipe import read_recipe
from mtsql.run.config import parse_config

SHAPE = EmbeddedConfig(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96
)
SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
}
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
QWEN3_1_7B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
GIB = 1 << 30


def plan_of(shape, **keys):
    """The plan of a run by one process, unless `keys` say otherwise."""
    usual = {
        "num_ranks": 1,
        "is_sharded": False,
        "dtype": torch.bfloat16,
        "lora_rank": 0,
        "checkpointing": True,
        "max_batch_tokens": 24576,
        "cache_bytes": 16 * GIB,
        "reference": "device",
        "offload": False,
    }
    return plan(shape, **{**usual, **keys})


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_learner_holds_is_what_the_plan_says(rank, dtype, fresh_accelerate, tmp_path):
    folder = save_embedded(tmp_path / "base", SHAPE)
    config = ModelConfig(path=str(folder), lora=AdapterConfig(rank=rank), dtype=dtype)
    policy = load_policy(config)
    learner = Learner(
        policy,
        Accelerator(cpu=True, mixed_precision=config.mixed_precision),
        OptimConfig(),
        max_batch_tokens=200,
        loss=LossConfig(),
        has_reference=True,
    )
    parts = plan_of(
        policy_shape(config),
        dtype=config.compute_dtype,
        lora_rank=rank,
        reference=None if rank else "device",
    )
    assert parts["weights"] == num_bytes(policy.parameters())
    held = num_bytes(learner.frozen.parameters()) if learner.frozen is not None else 0
    assert parts["reference"] == held
    with generation_weights(policy, config.compute_dtype) as weights:
        if weights is not policy:
            assert parts["generation_copy"] == num_bytes(weights.parameters())
    grads = []
    for p in policy.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: grads.append(p.grad)
        ) if p.requires_grad else 0
    learner.optimizer_step(learner.with_reference(sum(groups_of(), [])), 1e-3)
    assert parts["gradients"] == num_bytes(grads)
    states = learner.optimizer.state.values()
    averages = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert parts["adam"] == num_bytes(averages)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "adapters"])
@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config])
def test_a_layer_keeps_what_the_plan_says(kind, family, monkeypatch):
    """The difference between three layers and one. The last one has an MLP at the trained
    positions only."""
    monkeypatch.setattr(PackedContext, "attend", attend)
    samples = [Sample([7] * 40, [3] * 60, [1] * 60) for _ in range(5)]
    [batch] = pack(samples, 400)
    kept = []
    for num_layers in (1, 3):
        settings = family(**SMALL, num_hidden_layers=num_layers)
        model = CausalLM(settings).to(
            torch.float32 if kind in ("float32", "autocast") else torch.bfloat16
        )
        if kind == "adapters":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=1, target_modules=list(DEFAULT_TARGETS)))
            for p in model.parameters():
                p.data = p.float() if p.requires_grad else p.data
        module = PolicyModule(model.train())
        is_autocast = kind in ("autocast", "adapters")
        with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
            kept.append(kept_bytes(module, lambda: module(batch)))  # noqa: B023
    # Under autocast the linear layers of attention keep their cast weights, which no token changes.
    attention = model.model.layers[0].self_attn if kind == "autocast" else torch.nn.Identity()
    casts = 2 * sum(p.numel() for p in attention.parameters() if p.dim() == 2)
    size = 4 if kind == "float32" else 2
    expected = kept_in_layer(
        settings, size=size, is_cast=kind == "autocast", is_adapted=kind == "adapters"
    )
    measured = ((kept[1] - kept[0]) / 2 - casts) / len(batch.ids)
    assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_peak_of_a_micro_batch_is_near_the_plan(is_checkpointed, monkeypatch):
    """A model of Qwen3-4B's widths in bfloat16, on the device that computes nothing."""
    monkeypatch.setattr(PackedContext, "attend", attend)
    for table in (CHUNK_LOGITS, PIECE_LOGITS):
        monkeypatch.setitem(table, "meta", table["cuda"])
    # Autocast does not exist on this device, and is not used for weights in bfloat16.
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind)
    )
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k),
    )
    settings = copy.deepcopy(QWEN3_4B)
    settings.num_hidden_layers = 3
    with torch.device("meta"):
        model = CausalLM(settings).to("meta", torch.bfloat16)
    model.model.gradient_checkpointing = is_checkpointed
    module = PolicyModule(model.train())
    samples = [Sample([7] * 1192, [3] * 1400, [1] * 1400) for _ in range(5)]
    [batch] = pack(samples, 8192)
    mode = Peak()
    with mode:
        logprobs, _ = module(batch.to(torch.device("meta")))
        logprobs.sum().backward()
    parts = plan_of(
        settings,
        num_ranks=2,
        is_sharded=True,  # nothing is cast by autocast then
        checkpointing=is_checkpointed,
        max_batch_tokens=len(batch.ids),
    )
    planned = parts["activations"] + parts["head"] + num_bytes(model.parameters())
    assert mode.peak == pytest.approx(planned, rel=0.15)


def test_the_4b_recipe_fits_eight_gpus_only_if_it_is_sharded():
    """On GPUs with 80 GiB."""
    no_advice = {"rollout": "less", "scoring": "less", "learning": "less"}
    require_fit(plan_of(QWEN3_4B, num_ranks=8, is_sharded=True), 80 * GIB, no_advice)
    for num_ranks in (1, 8):
        with pytest.raises(ValueError, match="^memory: rollout needs about [89]"):
            require_fit(plan_of(QWEN3_4B, num_ranks=num_ranks), 80 * GIB, no_advice)
    without = plan_of(QWEN3_4B, num_ranks=8, is_sharded=True, checkpointing=False)
    with pytest.raises(ValueError, match="^memory: learning needs .*activations 7.*try less$"):
        require_fit(without, 80 * GIB, no_advice)


def test_each_part_is_as_large_as_its_keys_say():
    whole, by_eight = plan_of(QWEN3_4B), plan_of(QWEN3_4B, num_ranks=8, is_sharded=True)
    for name in ("weights", "gradients", "adam"):
        assert by_eight[name] == -(-whole[name] // 8)
    assert whole["ddp_buckets"] == by_eight["ddp_buckets"] == 0
    assert plan_of(QWEN3_4B, num_ranks=8)["ddp_buckets"] == whole["gradients"]
    assert plan_of(QWEN3_4B, offload=True)["adam"] == 0
    without = plan_of(QWEN3_4B, cache_bytes=0, reference=None)
    assert without["cache"] == without["generation_copy"] == without["reference"] == 0
    in_float32 = plan_of(QWEN3_4B, dtype=torch.float32)
    assert in_float32["generation_copy"] == 0 and in_float32["reference"] == whole["weights"]
    fewer = plan_of(QWEN3_4B, max_batch_tokens=12288)
    assert fewer["activations"] < whole["activations"]
    assert peak_bytes(fewer, "learning") < peak_bytes(whole, "learning")
    assert peak_bytes(fewer, "rollout") == peak_bytes(whole, "rollout")


@pytest.mark.parametrize(
    ("lora", "is_sharded", "words"),
    [
        (
            {},
            False,
            "reference host, sft.optim.offload true, model.lora.rank 16, --use_fsdp",
        ),
        ({}, True, "reference host, sft.optim.offload true, model.lora.rank 16, more processes"),
        ({"rank": 4}, False, "sft.optim.offload true, --use_fsdp"),
    ],
)
def test_a_gpu_that_is_too_small_is_refused_with_the_keys(
    lora, is_sharded, words, tmp_path, monkeypatch
):
    folder = save_embedded(tmp_path / "base", SHAPE)
    config = ModelConfig(path=str(folder), lora=AdapterConfig(**lora))
    learning = SimpleNamespace(optim=OptimConfig(), max_batch_tokens=4096)
    engine = EngineConfig(cache_bytes=8 * 10**6)
    asked = partial(require_memory, config, learning, engine=engine, key="sft.", reference="device")
    gpu = SimpleNamespace(
        device=torch.device("cuda"), is_fsdp2=is_sharded, num_processes=1 + is_sharded
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 3 * 10**9))
    asked(accelerator=gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**6, 3 * 10**9))
    with pytest.raises(ValueError) as error:
        asked(accelerator=gpu)
    assert "\n" not in str(error.value) and words in str(error.value)
    assert "a lower sft.max_batch_tokens, model.gradient_checkpointing true" in str(error.value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**6, 3 * 10**9))
    with pytest.raises(ValueError, match="rollout needs.*a lower engine.cache_bytes"):
        asked(accelerator=gpu)
    asked(accelerator=SimpleNamespace(device=torch.device("cpu")))


def documented() -> list[tuple[str, int, str, float, float]]:
    """The rows of the recipes' table in docs/memory.md."""
    text = (ROOT / "docs/memory.md").read_text()
    row = r"\| `(\w[\w.]+\.yaml)` \| (\d+)(?:, (\w+))? \| ([\d.]+) \| ([\d.]+) \|"
    return [(f, int(n), kind, float(a), float(b)) for f, n, kind, a, b in re.findall(row, text)]


@pytest.mark.parametrize(("file", "num_ranks", "kind", "rollout", "learning"), documented())
def test_the_page_shows_what_the_recipes_need(file, num_ranks, kind, rollout, learning):
    is_rl = file.startswith("rl_")
    config = parse_config(
        (train_rl if is_rl else train_sft).Config, ["--config", str(ROOT / "configs" / file)], ""
    )
    parts = plan_of(
        QWEN3_4B if "4b" in file else QWEN3_1_7B,
        num_ranks=num_ranks,
        is_sharded=kind == "FSDP2",
        checkpointing=config.model.gradient_checkpointing,
        max_batch_tokens=config.max_batch_tokens if is_rl else config.sft.max_batch_tokens,
        cache_bytes=config.engine.cache_bytes,
        reference="device" if is_rl else None,
    )
    shown = [round(peak_bytes(parts, phase) / 1e9, 1) for phase in ("rollout", "learning")]
    assert shown == [rollout, learning]


def test_the_launch_in_a_recipes_header_fits_on_80_gb():
    """One process if the header names no number. Recipes without a launch inherit from these."""
    files = [*(ROOT / "configs").glob("*_qwen3_*.yaml"), *(ROOT / "configs").glob("*_llama*.yaml")]
    launches = {file: text for file in files for text in source_commands(file)}
    num_read = 0
    for file, text in launches.items():
        if "eval.py" not in text:
            number = re.search(r"--num_processes (\d+)", text)
            way = Way("", int(number[1]) if number else 1, "fsdp2.yaml" in text)
            parts = memory_of(read_recipe(str(file), [], None, 1, 1), way)
            assert fits(parts, 80 * 10**9), file
            num_read += 1
    assert num_read >= 4


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_that_was_trained_needs_a_reference_whoever_names_its_rank(
    rank, tmp_path, monkeypatch
):
    """Fresh adapters need none."""
    base = save_embedded(tmp_path / "base", SHAPE)
    fresh = ModelConfig(path=str(base), lora=AdapterConfig(rank=4))
    save_policy(load_policy(fresh), tiny_tokenizer(), tmp_path / "adapter")
    trained = ModelConfig(path=str(tmp_path / "adapter"), lora=AdapterConfig(rank=rank))
    learning = SimpleNamespace(optim=OptimConfig(), max_batch_tokens=4096)
    gpu = SimpleNamespace(device=torch.device("cuda"), is_fsdp2=False, num_processes=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**7))
    for config in (fresh, trained):
        with pytest.raises(ValueError) as error:
            require_memory(config, learning, gpu, EngineConfig(), "device")
        assert ("reference" in str(error.value)) == (config is trained)
