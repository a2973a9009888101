"""Loading, adapters, weights for generation and saving: equal logits, equal bits, errors that name
a folder."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config

from helpers.models import EMBEDDED, tiny_tokenizer
from mtsql.learner.packed_attention import PackedContext
from mtsql.model import policy as policies
from mtsql.model.copies import adapters_off
from mtsql.model.policy import (
    AdapterConfig,
    EmbeddedConfig,
    ModelConfig,
    build_embedded,
    generation_weights,
    load_policy,
    load_tokenizer,
    make_reference,
    save_policy,
)

LORA = AdapterConfig(rank=4, targets=("q_proj", "v_proj", "down_proj"))
IDS = torch.arange(9)  # (T,)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """(T, V) of one sequence whose first three tokens are the prompt."""
    positions = torch.arange(len(IDS))
    context = PackedContext(((0, 3, 3, len(IDS)),), torch.device("cpu"))
    return model(IDS, positions, context)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policies") / "base"
    save_policy(build_embedded(tokenizer, EMBEDDED, seed=1), tokenizer, path)
    return str(path)


def adapted(folder: str, gradient_checkpointing: bool = False) -> torch.nn.Module:
    """A policy whose adapters already do something."""
    config = ModelConfig(path=folder, lora=LORA, gradient_checkpointing=gradient_checkpointing)
    model = load_policy(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_embedded_model_is_drawn_from_its_seed_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_embedded(tokenizer, EMBEDDED, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert same_bits(bits(first), bits(build_embedded(tokenizer, EMBEDDED, seed=1)))
    assert not same_bits(bits(first), bits(build_embedded(tokenizer, EMBEDDED, seed=2)))
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.config.vocab_size == len(tokenizer)
    default = build_embedded(tokenizer, EmbeddedConfig(), seed=0)
    attention = 2 * 192 * 192 + 2 * 192 * 96  # q and o, k and v
    norms = 2 * 192 + 2 * 32
    layer = attention + 3 * 192 * 512 + norms
    assert sum(p.numel() for p in default.parameters()) == 4 * layer + 192 + len(tokenizer) * 192


def test_a_saved_folder_gives_the_same_logits_in_transformers(folder):
    ours = load_policy(ModelConfig(path=folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(logits(ours), theirs(IDS[None]).logits[0], atol=1e-5)


def test_saved_policy_reloads_bit_for_bit(folder, tokenizer, tmp_path):
    model = load_policy(ModelConfig(path=folder))
    assert all(p.dtype is torch.float32 and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    save_policy(model, tokenizer, tmp_path / "new" / "policy")
    save_policy(model, tokenizer, tmp_path / "new" / "policy")  # over an older one
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["policy"]
    again = load_policy(ModelConfig(path=str(tmp_path / "new" / "policy")))
    assert same_bits(bits(model), bits(again))
    assert load_tokenizer(str(tmp_path / "new" / "policy")).get_vocab() == tokenizer.get_vocab()


def test_interrupted_save_leaves_the_old_policy(folder, tokenizer, tmp_path, monkeypatch):
    model = load_policy(ModelConfig(path=folder))
    save_policy(model, tokenizer, tmp_path / "policy")
    before = bits(model)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupted)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        save_policy(model, tokenizer, tmp_path / "policy")
    assert same_bits(before, bits(load_policy(ModelConfig(path=str(tmp_path / "policy")))))


def test_saved_adapters_reload_bit_for_bit(folder, tokenizer, tmp_path):
    model = adapted(folder)
    save_policy(model, tokenizer, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    again = load_policy(ModelConfig(path=str(tmp_path / "adapters")))
    assert same_bits(bits(model), bits(again))
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained and trained == {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="model.lora.rank is 8.*rank 4"):
        load_policy(ModelConfig(path=str(tmp_path / "adapters"), lora=AdapterConfig(rank=8)))


def test_a_policy_without_adapters_generates_with_its_own_weights(folder):
    model = load_policy(ModelConfig(path=folder)).train()
    with generation_weights(torch.nn.parallel.DataParallel(model)) as weights:
        assert weights is model and not weights.training
    assert model.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_merged_for_generation_and_training_weights_untouched(folder, checkpointing):
    model = adapted(folder, gradient_checkpointing=checkpointing).train()
    before = bits(model)
    expected = logits(model)
    base = logits(load_policy(ModelConfig(path=folder)))
    with generation_weights(model) as weights:
        assert not any("lora" in name for name, _ in weights.named_parameters())
        assert torch.allclose(logits(weights), expected, atol=1e-5)
        assert not torch.allclose(expected, base, atol=1e-2)
        for parameter in weights.parameters():
            parameter.zero_()  # nothing is shared with the trained weights
    assert model.training and same_bits(before, bits(model))


def test_generation_in_bfloat16_rounds_as_training_does(folder):
    """Sampling and scoring see the same numbers. Adapters that do something are the exception,
    because they are merged before they are rounded."""
    model = load_policy(ModelConfig(path=folder))
    with torch.autocast("cpu", torch.bfloat16):
        scored = logits(model)
        frozen = logits(make_reference(model, torch.bfloat16))
    with generation_weights(model, torch.bfloat16) as weights:
        assert logits(weights).dtype is torch.bfloat16
        assert torch.equal(logits(weights), scored) and torch.equal(frozen, scored)
    config = ModelConfig(path=folder, dtype="bfloat16", lora=LORA)
    assert config.mixed_precision == "bf16"
    fresh = load_policy(config)
    assert {p.dtype for p in fresh.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in fresh.parameters() if not p.requires_grad} == {torch.bfloat16}
    with generation_weights(fresh, config.compute_dtype) as weights:
        copied = logits(weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copied, logits(fresh))


def test_the_reference_policy_stays_as_it_was(folder):
    model = load_policy(ModelConfig(path=folder))
    expected = logits(model)
    frozen = make_reference(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(logits(frozen), expected)
    assert not any(p.requires_grad for p in frozen.parameters())

    fresh = load_policy(ModelConfig(path=folder, lora=LORA))
    assert make_reference(fresh) is None  # its adapters are switched off instead
    trained = adapted(folder)
    with adapters_off(trained):
        assert torch.equal(logits(trained), expected)
    already = make_reference(trained)  # adapters from an earlier stage belong to the reference
    assert torch.allclose(logits(already), logits(trained), atol=1e-5)


def test_sharded_policy_is_gathered(folder, tokenizer, tmp_path):
    """FSDP2 on one CPU process: the weights for generation and the saved folder equal the policy
    before sharding."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    try:
        for model in (load_policy(ModelConfig(path=folder)), adapted(folder)):
            before = bits(model)
            expected = logits(model)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            for layer in base.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            with generation_weights(model) as weights:
                assert not any(hasattr(p, "full_tensor") for p in weights.parameters())
                assert torch.allclose(logits(weights), expected, atol=1e-5)
            with generation_weights(model, torch.bfloat16) as weights:
                assert {p.dtype for p in weights.parameters()} == {torch.bfloat16}
            save_policy(model, tokenizer, tmp_path / "not_mine", is_main=False)
            save_policy(model, tokenizer, tmp_path / "policy")
            assert same_bits(before, bits(load_policy(ModelConfig(path=str(tmp_path / "policy")))))
        assert not (tmp_path / "not_mine").exists()
    finally:
        destroy_process_group()


def test_rows_that_the_ranks_do_not_divide_are_saved(folder, tokenizer, tmp_path, monkeypatch):
    """FSDP2 gathers such a weight as a part of a longer tensor."""
    model = load_policy(ModelConfig(path=folder))
    monkeypatch.setattr(policies, "is_sharded", lambda model: True)
    monkeypatch.setattr(policies, "gather_full", lambda w: torch.cat([w, w[:1]])[: len(w)])
    save_policy(model, tokenizer, tmp_path / "policy")
    assert same_bits(bits(model), bits(load_policy(ModelConfig(path=str(tmp_path / "policy")))))


def test_gradient_checkpointing_changes_no_gradient(folder):
    gradients = []
    for on in (False, True):
        model = load_policy(ModelConfig(path=folder, gradient_checkpointing=on)).train()
        logits(model).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("path", [None, "no/such/folder"])
def test_a_missing_folder_is_named(path):
    for load in (load_tokenizer, lambda p: load_policy(ModelConfig(path=p))):
        with pytest.raises(ValueError, match=f"model.path {path}: no such folder"):
            load(path)


def test_incomplete_folders_are_named(folder, tmp_path):
    for load in (load_tokenizer, lambda p: load_policy(ModelConfig(path=p))):
        with pytest.raises(ValueError, match=f"model.path {tmp_path}"):
            load(str(tmp_path))
    shutil.copy(f"{folder}/config.json", tmp_path)
    with pytest.raises(ValueError, match=f"model.path {tmp_path}.*safetensors"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_sliding_windows_and_other_architectures_are_refused(tmp_path):
    window = Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    window.save_pretrained(tmp_path)
    where = f"model.path {tmp_path}/config.json"
    with pytest.raises(ValueError, match=f"{where}: sliding-window"):
        load_policy(ModelConfig(path=str(tmp_path)))
    gpt2 = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{where}: model type 'gpt2' is not supported"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_impossible_adapters_are_refused(folder):
    with pytest.raises(ValueError, match="set model.path"):
        ModelConfig(lora=LORA)
    with pytest.raises(ValueError, match="model.lora.rank is -1"):
        ModelConfig(path=folder, lora=AdapterConfig(rank=-1))
    with pytest.raises(ValueError, match="has no layer 'c_attn', only .*q_proj"):
        load_policy(ModelConfig(path=folder, lora=AdapterConfig(rank=2, targets=("c_attn",))))
