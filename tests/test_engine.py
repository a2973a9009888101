"""The engine against model.generate, a plain forward, and a slow engine of thirty lines."""

import functools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.llm.attention import register_attention
from mtsql.llm.engine import Engine, EngineLimits, Sampling, StopReason
from mtsql.llm.sampling import hash_key, sample, uniform

register_attention()
VOCAB = 61
TINY = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "llama": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def tiny(family: str = "qwen3", dtype=torch.float32, attention: str = "mtsql"):
    """A random model, the same weights for each attention. Larger weights than usual: no near-uniform logits."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**TINY | extra, attn_implementation=attention)
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.25)
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in lengths]


def keys(num: int, turn: int = 0) -> list[tuple[int, int, int, int]]:
    return [(0, 0, turn, i) for i in range(num)]


def engine(model=None, stop_ids=(), blocks: int = 200, rows: int = 64, size: int = 4, batch: int = 64, **sampling):
    model = model or tiny()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = 2 * config.num_hidden_layers * size * config.num_key_value_heads * head_dim
    block_bytes *= model.dtype.itemsize
    limits = EngineLimits(rows, size, blocks * block_bytes, batch)
    return Engine(model, stop_ids, Sampling(**dict(max_trajectory_tokens=100) | sampling), limits)


def play(engine, groups, observations, num_samples=1):
    """Open all groups at once and give each row its observations; handle -> its completions."""
    script, played = {}, {}
    for turn, (prompt, given) in enumerate(zip(groups, observations, strict=True)):
        for handle in engine.open_group(prompt, keys(num_samples, turn)):
            script[handle], played[handle] = list(given), []
    while engine.has_work:
        for done in engine.step():
            played[done.handle].append(done)
            if script[done.handle]:
                engine.extend(done.handle, script[done.handle].pop(0))
            else:
                engine.close(done.handle)
    assert sorted(engine.pool.free) == list(range(engine.pool.num_blocks))
    return played


def scored(model, context: list[int], reply: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of `reply` after `context` by one plain forward of the same weights."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + reply])).logits[0, len(context) - 1 : -1]
    return (logits / (temperature or 1)).log_softmax(-1)[range(len(reply)), reply]


def check_dialogues(model, groups, observations, played, temperature, tolerance):
    """Every reply's log-probs equal the plain forward's; greedy replies equal generate's."""
    for completions, (prompt, given) in zip(played.values(), zip(groups, observations, strict=True), strict=True):
        context = list(prompt)
        for i, done in enumerate(completions):
            expected = scored(model, context, done.ids, temperature)
            torch.testing.assert_close(
                torch.tensor(done.logprobs, dtype=expected.dtype), expected, atol=tolerance, rtol=0
            )
            if temperature == 0:
                ids = torch.tensor([context])
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
                assert done.ids == out[0, len(context) :].tolist()
            context += done.ids + (given[i] if i < len(given) else [])


@FAMILY
def test_greedy_dialogues_equal_generate(family):
    groups = prompts(3, 17, 8, 1, 24)
    observations = [prompts(5, 1), prompts(9, 2, 13), [], prompts(4), prompts(7, 7)]
    played = play(engine(tiny(family), temperature=0, max_step_tokens=9), groups, observations)
    check_dialogues(tiny(family, attention="sdpa"), groups, observations, played, 0, 1e-4)


@FAMILY
def test_sampled_logprobs_equal_plain_forward_in_float64(family):
    model = tiny(family, torch.float64)
    groups, observations = prompts(3, 17, 8), [prompts(5, 1), prompts(9, 2), []]
    played = play(engine(model, temperature=0.7, max_step_tokens=9), groups, observations)
    check_dialogues(tiny(family, torch.float64, "sdpa"), groups, observations, played, 0.7, 1e-9)
