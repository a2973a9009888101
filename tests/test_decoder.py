"""Our decoder against transformers' models in float64: log-probs and gradients."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from helpers.models import (
    FAMILIES,
    SHAPE,
    exact_transformers_model,
    gradients,
    tiny_model,
)
from mtsql.learner.logprobs import token_logprobs
from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Sample, pack
from mtsql.model.decoder import CausalLM, DecoderLayer, Linear

GROUPS = ((5, (7, 1, 4)), (2, (3, 6)), (4, (5,)))
"""Length of the prompt, lengths of its samples."""


def tiny_samples() -> list[Sample]:
    """A group of three, a group of two and a single sample."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for prompt_length, lengths in GROUPS:
        prompt = torch.randint(31, (prompt_length,), generator=draw).tolist()
        for length in lengths:
            ids = torch.randint(31, (length,), generator=draw).tolist()
            mask = [1] + torch.randint(2, (length - 1,), generator=draw).tolist()
            samples.append(Sample(prompt, ids, mask))
    return samples


def loss(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Any smooth function of the log-probs that treats every token differently."""
    return (logprobs * (1 + targets)).sum() + logprobs.square().sum()


def one_at_a_time(model: PreTrainedModel, samples: list[Sample]) -> list[torch.Tensor]:
    """transformers' forward pass with full logits and without sharing: the trained log-probs of
    each sample. The gradients are left in the model."""
    logprobs = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        logp = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(sample.ids)
        is_trained = torch.tensor(sample.loss_mask) == 1
        trained = logp[torch.arange(len(targets)), targets][is_trained]
        loss(trained, targets[is_trained]).backward()
        logprobs.append(trained.detach())
    return logprobs


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [100, 14])
def test_packed_samples_have_the_log_probs_and_gradients_of_transformers(
    family, is_lora, is_checkpointed, max_tokens, monkeypatch
):
    calls = []
    attend = PackedContext.attend

    def counted(self, layer, *tensors):
        calls.append(layer)
        return attend(self, layer, *tensors)

    monkeypatch.setattr(PackedContext, "attend", counted)
    ours = tiny_model(family).train()
    theirs = exact_transformers_model(family)
    ours.model.gradient_checkpointing = is_checkpointed
    if is_lora:
        ours = with_random_adapters(ours)
        theirs = with_random_adapters(theirs)
    samples = tiny_samples()
    expected = one_at_a_time(theirs, samples)
    batches = pack(samples, max_tokens)
    for batch in batches:
        logprobs, _ = token_logprobs(ours, batch)
        loss(logprobs, batch.targets).backward()
        for number, index in enumerate(batch.indices):
            mine = logprobs[batch.trajectory_index == number]
            torch.testing.assert_close(mine, expected[index], rtol=0, atol=1e-10)
    assert len(batches) == (1 if max_tokens == 100 else 4)
    assert len(calls) == len(batches) * SHAPE["num_hidden_layers"] * (1 + is_checkpointed)
    our_gradients = gradients(ours)
    their_gradients = gradients(theirs)
    assert our_gradients.keys() == their_gradients.keys()
    assert not is_lora or all("lora" in name for name in our_gradients)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-10, atol=1e-10)


def with_random_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """The model in peft's wrapper, with adapters that already do something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).double()


def hidden_of_ours(model: CausalLM, wanted: torch.Tensor) -> torch.Tensor:
    """(P, W) of one sequence of five tokens."""
    context = PackedContext(((0, 2, 2, 5),), torch.device("cpu"))
    return model.model(torch.arange(5), torch.arange(5), context, wanted)


def hidden_of_theirs(model: PreTrainedModel, wanted: torch.Tensor) -> torch.Tensor:
    """The same by transformers."""
    out = model.model(input_ids=torch.arange(5)[None], use_cache=False)
    return out.last_hidden_state[0, wanted]


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_runs_at_the_wanted_positions_only(family, is_checkpointed):
    """Positions may come in any order and twice; values and gradients are those of transformers,
    which computes all positions."""
    wanted = torch.tensor([3, 1, 3])
    ours = tiny_model(family).train()
    theirs = exact_transformers_model(family)
    ours.model.gradient_checkpointing = is_checkpointed
    seen = []
    for layer in ours.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("attention"))
    ours.model.norm.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    mine = hidden_of_ours(ours, wanted)
    assert seen == ["attention", "attention", 3]
    mine.square().sum().backward()
    assert seen[3:] == ["attention", "attention"] * is_checkpointed  # computed again in backward
    expected = hidden_of_theirs(theirs, wanted)
    expected.square().sum().backward()
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    their_gradients = gradients(theirs)
    for name, gradient in gradients(ours).items():
        if gradient is None:  # an untied head
            assert their_gradients[name] is None
        else:
            torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_trains_its_own_weights(family):
    model = tiny_model(family)
    other = copy.deepcopy(model)
    wanted = torch.arange(5)
    hidden_of_ours(other, wanted).sum().backward()
    assert other.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    is_tied = other.lm_head.weight is other.model.embed_tokens.weight
    assert is_tied == FAMILIES[family][2]


def test_accelerate_finds_the_layers_that_it_shards():
    assert CausalLM._no_split_modules == [DecoderLayer.__name__]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_made_without_memory_has_its_rotary_frequencies(device):
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with torch.device(device):
        model = CausalLM(config)
    expected = torch.tensor([1, 0.1, 0.01, 0.001]) / 2
    torch.testing.assert_close(model.model.inv_freq, expected)
    assert "model.inv_freq" not in model.state_dict()


def changed(family: str, **keys) -> PreTrainedConfig:
    config = FAMILIES[family][0](**SHAPE)
    for key, value in keys.items():
        setattr(config, key, value)
    return config


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.GPT2Config(), "model type 'gpt2' is not supported"),
        (transformers.GemmaConfig(), "model type 'gemma' is not supported"),
        (changed("qwen3", hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (changed("llama", attention_dropout=0.1), "attention_dropout is 0.1: it must be 0"),
        (changed("qwen2", layer_types=["sliding_attention"] * 2), "sliding-window"),
        (changed("llama", rope_parameters=DYNAMIC), "rope_type 'dynamic' is not supported"),
        (changed("llama", rope_parameters=PARTIAL), "partial_rotary_factor is not supported"),
    ],
)
def test_options_that_the_decoder_does_not_compute_are_refused_by_name(config, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        CausalLM(config)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (7,), (1, 64), (65,)])
@pytest.mark.parametrize("outputs", [4096, 4099])
def test_few_rows_without_gradients_are_multiplied_with_the_weight_on_the_left(
    monkeypatch, rows, outputs
):
    """Also if the outputs cannot be shared evenly among threads. More rows, gradients and float64
    are computed as torch does."""
    ours = Linear(512, outputs)
    ours.few_rows = 64
    plain = torch.nn.Linear(512, outputs)
    plain.load_state_dict(ours.state_dict())
    num_shares = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: num_shares.append(len(a)) or bmm(a, b))
    x = torch.randn(*rows, 512)
    with torch.no_grad():
        out = ours(x)
        torch.testing.assert_close(out, plain(x), rtol=1e-5, atol=1e-5)
        assert out.is_contiguous()
        threads = torch.get_num_threads() if outputs == 4096 else 1
        assert num_shares == ([] if rows == (65,) else [threads])
        num_shares.clear()
        assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))
    ours.float()(x).sum().backward()
    assert ours.weight.grad is not None
    assert not num_shares


@pytest.mark.parametrize("few_rows", [0, 3])
def test_bfloat16_rows_are_turned_by_one_matmul_whose_weight_autocast_keeps(few_rows):
    """Three rows with a bias, from float32 weights under autocast and from bfloat16 weights."""
    torch.manual_seed(0)
    ours = Linear(512, 4099)
    ours.few_rows = few_rows
    x = torch.randn(1, 3, 512)
    expected = torch.nn.functional.linear(x, ours.weight, ours.bias)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket.__name__, tuple(args[0].shape)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = ours(x)
        with Watch():
            again = ours(x)
    casts = [shape for name, shape in seen if name == "_to_copy"]
    assert (4099, 512) not in casts  # the first call's cast was kept
    is_turned = ("mm", (4099, 512)) in seen
    assert is_turned == bool(few_rows)
    assert first.dtype == torch.bfloat16 and first.is_contiguous()
    assert torch.equal(first, again)
    torch.testing.assert_close(first.float(), expected, rtol=2e-2, atol=2e-2)
    half = ours.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=2e-2, atol=2e-2)
