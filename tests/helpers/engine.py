"""Tiny models for the engine, a way to play dialogues with it, and what it is compared with."""

import functools

import numpy as np
import pytest
import torch

from helpers.models import FAMILIES, with_exact_norms
from mtsql.engine.completions import Completion
from mtsql.engine.config import CostTable, EngineConfig, block_bytes
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import NoiseKey, SamplingConfig
from mtsql.model.decoder import from_transformers

VOCAB = 61
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
SPECIAL = {
    "qwen3": dict(head_dim=12, tie_word_embeddings=True),
    "qwen2": dict(tie_word_embeddings=False),
    "llama": dict(num_key_value_heads=4, tie_word_embeddings=True),
}
"""What the model of a family does not have from `SHAPE`."""
FAMILY = pytest.mark.parametrize("family", FAMILIES)

Played = dict[int, list[Completion]]
"""The completions of each handle, in order."""


@functools.cache
def tiny(family: str = "qwen3", dtype: torch.dtype = torch.float32, kind: str = "ours"):
    """A random model: our decoder, or with kind "sdpa" that of transformers with the same weights.
    Larger weights than usual: no near-uniform logits."""
    config_class, model_class, _ = FAMILIES[family]
    config = config_class(**SHAPE | SPECIAL[family])
    torch.manual_seed(5)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.25)
    return from_transformers(model) if kind == "ours" else with_exact_norms(model)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random ids, a list of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in lengths]


def keys(num: int, turn: int = 0) -> list[NoiseKey]:
    """The noise keys of a group of `num` samples."""
    return [(0, 0, turn, i) for i in range(num)]


def make_engine(
    model: torch.nn.Module | None = None,
    stop_ids: tuple[int, ...] = (),
    blocks: int = 200,
    rows: int = 64,
    size: int = 4,
    scheduled: int = 64,
    max_draft: int = 8,
    step_costs: CostTable | None = None,
    **sampling,
) -> Engine:
    """An engine with a cache of `blocks` blocks of `size` tokens, that computes at most `scheduled`
    tokens in a step."""
    model = model or tiny()
    limits = EngineConfig(
        max_rows=rows,
        block_size=size,
        cache_bytes=blocks * block_bytes(model.config, size, model.lm_head.weight.dtype),
        max_scheduled_tokens=scheduled,
        max_draft=max_draft,
        step_costs=step_costs,
    )
    return Engine(
        model, stop_ids, SamplingConfig(**dict(max_trajectory_tokens=100) | sampling), limits
    )


def finish(engine: Engine) -> list[Completion]:
    """Step until all rows are idle."""
    completions = []
    while engine.has_work:
        completions += engine.step()
    return completions


def finish_one(engine: Engine, prompt: list[int]) -> Completion:
    """The first reply of one row."""
    engine.open_group(prompt, keys(1))
    (done,) = finish(engine)
    return done


def play(
    engine: Engine,
    groups: list[list[int]],
    observations: list[list[list[int]]],
    num_samples: int = 1,
) -> Played:
    """Open a group for each prompt, all at once, and give each row the observations of its prompt.
    At the end all blocks are free."""
    left: dict[int, list[list[int]]] = {}
    played: Played = {}
    for turn, (prompt, given) in enumerate(zip(groups, observations, strict=True)):
        for handle in engine.open_group(prompt, keys(num_samples, turn)):
            left[handle] = list(given)
            played[handle] = []
    while engine.has_work:
        for done in engine.step():
            played[done.handle].append(done)
            if left[done.handle]:
                engine.extend(done.handle, left[done.handle].pop(0))
            else:
                engine.close(done.handle)
    assert engine.pool.num_free == engine.pool.num_blocks
    return played


def replies(played: Played) -> list[list[list[int]]]:
    """The ids of each row's replies."""
    return [[done.ids for done in completions] for completions in played.values()]


def plain_logprobs(
    model: torch.nn.Module, context: list[int], reply: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of `reply` after `context` by one plain forward of the same weights."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + reply])).logits[0, len(context) - 1 : -1]
    return (logits / (temperature or 1)).log_softmax(-1)[range(len(reply)), reply]


def check_dialogues(
    model: torch.nn.Module,
    groups: list[list[int]],
    observations: list[list[list[int]]],
    played: Played,
    temperature: float,
    tolerance: float,
) -> None:
    """Every reply's log-probs equal the plain forward's; greedy replies equal model.generate's."""
    for completions, prompt, given in zip(played.values(), groups, observations, strict=True):
        context = list(prompt)
        for i, done in enumerate(completions):
            expected = plain_logprobs(model, context, done.ids, temperature)
            torch.testing.assert_close(
                torch.tensor(done.logprobs, dtype=expected.dtype), expected, atol=tolerance, rtol=0
            )
            if temperature == 0:
                ids = torch.tensor([context])
                mask = torch.ones_like(ids)
                out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
                assert done.ids == out[0, len(context) :].tolist()
            context += done.ids
            if i < len(given):
                context += given[i]
