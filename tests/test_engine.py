"""The engine against model.generate, a plain forward, and a slow engine of thirty lines."""

import functools

import numpy as np
import pytest
import torch
import transformers
from helpers.models import with_exact_norms
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.engine.engine import (
    Engine,
    EngineConfig,
    SamplingConfig,
    StopReason,
    check_attention,
)
from mtsql.engine.sampling import hash_key, uniform
from mtsql.model.decoder import from_transformers

VOCAB = 61
TINY = dict(
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
FAMILIES = {
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "llama": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def tiny(family: str = "qwen3", dtype=torch.float32, attention: str = "mtsql"):
    """A random model, ours or with attention "sdpa" that of transformers, the same weights in both.
    Larger weights than usual: no near-uniform logits."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**TINY | extra)
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.25)
    return from_transformers(model) if attention == "mtsql" else with_exact_norms(model)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in lengths]


def keys(num: int, turn: int = 0) -> list[tuple[int, int, int, int]]:
    return [(0, 0, turn, i) for i in range(num)]


def engine(model=None, stop_ids=(), blocks=200, rows=64, size=4, batch=64, **sampling):
    model = model or tiny()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = 2 * config.num_hidden_layers * size * config.num_key_value_heads * head_dim
    block_bytes *= model.lm_head.weight.dtype.itemsize
    limits = EngineConfig(rows, size, blocks * block_bytes, batch)
    return Engine(
        model, stop_ids, SamplingConfig(**dict(max_trajectory_tokens=100) | sampling), limits
    )


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
    for completions, prompt, given in zip(played.values(), groups, observations, strict=True):
        context = list(prompt)
        for i, done in enumerate(completions):
            expected = scored(model, context, done.ids, temperature)
            torch.testing.assert_close(
                torch.tensor(done.logprobs, dtype=expected.dtype), expected, atol=tolerance, rtol=0
            )
            if temperature == 0:
                ids = torch.tensor([context])
                mask = torch.ones_like(ids)
                out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
                assert done.ids == out[0, len(context) :].tolist()
            context += done.ids + (given[i] if i < len(given) else [])


@FAMILY
def test_greedy_dialogues_equal_generate(family):
    groups = prompts(3, 17, 8, 1, 24)
    observations = [prompts(5, 1), prompts(9, 2, 13), [], prompts(4), prompts(7, 7)]
    played = play(engine(tiny(family), temperature=0, max_reply_tokens=9), groups, observations)
    check_dialogues(tiny(family, attention="sdpa"), groups, observations, played, 0, 1e-4)


@FAMILY
def test_sampled_logprobs_equal_plain_forward_in_float64(family):
    model = tiny(family, torch.float64)
    groups, observations = prompts(3, 17, 8), [prompts(5, 1), prompts(9, 2), []]
    played = play(engine(model, temperature=0.7, max_reply_tokens=9), groups, observations)
    check_dialogues(tiny(family, torch.float64, "sdpa"), groups, observations, played, 0.7, 1e-9)


def replies(played) -> list[list[list[int]]]:
    return [[done.ids for done in completions] for completions in played.values()]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_same_tokens_alone_in_a_batch_and_after_being_put_off(temperature):
    model = tiny(dtype=torch.float64)
    options = dict(temperature=temperature, max_reply_tokens=6, stop_ids=(3,))
    groups = prompts(*range(5, 21))
    observations = [prompts(4, 3, seed=i) for i in range(16)]
    together = play(engine(model, **options), groups, observations, num_samples=4)
    assert len(together) == 64
    alone = []
    for turn in (0, 7, 15):
        one = engine(model, rows=1, batch=3, **options)
        for sample_index in range(4):
            handle = one.open_group(groups[turn], [keys(4, turn)[sample_index]])[0]
            alone.append([])
            for given in [*observations[turn], None]:
                done = []
                while not done:
                    done = one.step()
                alone[-1].append(done[0].ids)
                if given:
                    one.extend(handle, given)
            one.close(handle)
    assert alone == [replies(together)[4 * turn + i] for turn in (0, 7, 15) for i in range(4)]
    crowded = engine(model, blocks=35, **options)
    assert replies(play(crowded, groups, observations, num_samples=4)) == replies(together)
    assert crowded.tokens_computed > crowded.tokens_distinct  # somebody was put off


def test_each_distinct_token_is_computed_once():
    ours = engine(temperature=0, max_reply_tokens=5)
    played = play(ours, prompts(9, 14), [prompts(4), prompts(6)], num_samples=8)
    lengths = [sum(len(done.ids) for done in completions) for completions in played.values()]
    # The last sampled token of a trajectory is never computed.
    expected = 9 + 14 + sum(lengths) - 16 + 8 * (4 + 6)
    assert ours.tokens_computed == ours.tokens_distinct == expected


def test_long_prompt_does_not_stall_a_decoding_row():
    ours = engine(temperature=0, max_reply_tokens=20, batch=8, rows=4)
    short, long = prompts(4, 90)
    ours.open_group(short, keys(1))
    ours.step()
    handle = ours.open_group(long, keys(1))[0]
    for _ in range(12):
        before = ours.tokens_computed
        ours.step()
        assert ours.tokens_computed - before == 8  # one token decoded, seven of the prompt
    assert len(ours._rows[0].ids) == 13 and not ours._rows[handle].ids


class SlowEngine:
    """One row at a time, one whole forward per token, no cache, no batch."""

    def __init__(self, model, stop_ids, sampling):
        self.model, self.stop_ids, self.sampling = model, stop_ids, sampling
        self.rows = {}

    def open_group(self, prompt, noise_keys, handles):
        for handle, key in zip(handles, noise_keys, strict=True):
            self.rows[handle] = (prompt, hash_key(key), [])

    def extend(self, handle, ids):
        self.rows[handle][2].extend(ids)

    def reply(self, handle):
        prompt, key, ids = self.rows[handle]
        reply, logprobs = [], []
        while True:
            with torch.inference_mode():
                logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            probs = (logits / self.sampling.temperature).softmax(-1).tolist()
            noise, total = uniform(np.array([key], dtype=np.uint64), np.array([len(ids)]))[0], 0.0
            for token, prob in enumerate(probs):
                total += prob
                if total > noise:
                    break
            ids.append(token)
            reply.append(token)
            logprobs.append(float(np.log(probs[token])))
            if token in self.stop_ids:
                return reply, logprobs, StopReason.STOP_ID
            if len(ids) >= self.sampling.max_trajectory_tokens:
                return reply, logprobs, StopReason.TRAJECTORY_TOKENS
            if len(reply) >= self.sampling.max_reply_tokens:
                return reply, logprobs, StopReason.REPLY_TOKENS


ACTIONS = st.one_of(
    st.tuples(st.just("open"), st.integers(1, 14), st.integers(1, 4)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("extend"), st.integers(0, 50), st.integers(0, 5)),
    st.tuples(st.just("preempt"), st.integers(0, 50)),
    st.tuples(st.just("close"), st.integers(0, 50)),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(ACTIONS, min_size=4, max_size=25),
    st.integers(10, 40),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_any_schedule_gives_the_slow_engines_replies(actions, blocks, rows, extra):
    """Random openings, observations, evictions, closings, cache sizes: no token changes, no block
    leaks."""
    model = tiny(dtype=torch.float64)
    options = dict(max_reply_tokens=4, max_trajectory_tokens=20)
    ours = engine(model, (3, 4, 5), blocks, rows, batch=rows + extra, **options)
    slow = SlowEngine(tiny("qwen3", torch.float64, "sdpa"), (3, 4, 5), SamplingConfig(**options))
    open_rows, idle = [], []

    def step():
        before = ours.tokens_computed, sum(len(row.ids) for row in ours._rows.values())
        for done in ours.step():
            ids, logprobs, reason = slow.reply(done.handle)
            assert (done.ids, done.reason) == (ids, reason)
            assert done.logprobs == pytest.approx(logprobs, abs=1e-9)
            idle.append(done.handle)
        after = ours.tokens_computed, sum(len(row.ids) for row in ours._rows.values())
        assert after != before or not ours.has_work  # idle ones may hold all blocks

    for turn, (action, *numbers) in enumerate(actions):
        chosen = open_rows[numbers[0] % len(open_rows)] if open_rows else None
        if action == "open":
            prompt, noise_keys = prompts(numbers[0], seed=turn)[0], keys(numbers[1], turn)
            handles = ours.open_group(prompt, noise_keys)
            slow.open_group(prompt, noise_keys, handles)
            open_rows += handles
        elif action == "step":
            for _ in range(numbers[0]):
                if ours.has_work:
                    step()
        elif action == "extend" and idle:
            handle = idle[numbers[0] % len(idle)]
            given_ids = prompts(numbers[1], seed=turn)[0]
            if len(slow.rows[handle][2]) + len(given_ids) < 20:
                idle.remove(handle)
                ours.extend(handle, given_ids)
                slow.extend(handle, given_ids)
        elif action == "preempt" and chosen is not None:
            ours.preempt(chosen)
        elif action == "close" and chosen is not None:
            ours.close(chosen)
            open_rows.remove(chosen)
            idle[:] = [handle for handle in idle if handle != chosen]
    while len(open_rows):
        while ours.has_work:
            step()
        assert idle  # only idle rows can be in the way
        for handle in idle:
            ours.close(handle)
            open_rows.remove(handle)
        idle.clear()
    assert ours.pool.free == list(range(ours.pool.num_blocks)) and not any(ours.pool.refs)
    assert ours.tokens_computed >= ours.tokens_distinct


def finish(engine) -> list:
    completions = []
    while engine.has_work:
        completions += engine.step()
    return completions


def test_stop_id_as_first_token():
    (prompt,) = prompts(6)
    first = finish_one(engine(temperature=0, max_reply_tokens=1), prompt).ids
    done = finish_one(engine(stop_ids=(first[0],), temperature=0), prompt)
    assert (done.ids, done.reason) == (first, StopReason.STOP_ID) and len(done.logprobs) == 1


def finish_one(engine, prompt):
    engine.open_group(prompt, keys(1))
    (done,) = finish(engine)
    return done


def test_empty_observation_goes_on():
    (prompt,) = prompts(6)
    whole = finish_one(engine(max_reply_tokens=8), prompt).ids
    ours = engine(max_reply_tokens=4)
    first = finish_one(ours, prompt)
    ours.extend(first.handle, [])
    (second,) = finish(ours)
    assert first.ids + second.ids == whole


def test_budgets_name_their_reason():
    (prompt,) = prompts(6)
    ours = engine(max_reply_tokens=5, max_trajectory_tokens=9)
    first = finish_one(ours, prompt)
    assert (len(first.ids), first.reason) == (5, StopReason.REPLY_TOKENS)
    with pytest.raises(ValueError, match="no room for a reply in max_trajectory_tokens 9"):
        ours.extend(first.handle, [1, 2, 3, 4])
    ours.extend(first.handle, [1, 2])
    (second,) = finish(ours)
    assert (len(second.ids), second.reason) == (2, StopReason.TRAJECTORY_TOKENS)


def test_text_may_end_a_reply():
    (prompt,) = prompts(6)
    ours = engine(max_reply_tokens=8)
    ours.is_stopped = lambda ids: len(ids) == 3
    done = finish_one(ours, prompt)
    assert (len(done.ids), done.reason) == (3, StopReason.STOP_STRING)


def test_prompt_longer_than_the_cache_is_refused():
    ours = engine(blocks=20, max_trajectory_tokens=30)
    with pytest.raises(
        ValueError, match=r"prompt of 50 tokens .* needs 21 cache blocks and there are 20"
    ):
        ours.open_group(*prompts(50), keys(1))
    played = play(ours, prompts(48), [[]], num_samples=2)  # each needs all 20 blocks
    assert [len(completions[0].ids) for completions in played.values()] == [30, 30]


def test_misuse_is_named():
    ours = engine(max_reply_tokens=2)
    (handle,) = ours.open_group(*prompts(3), keys(1))
    with pytest.raises(ValueError, match="handle 0 is still decoding"):
        ours.extend(handle, [1])
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        ours.open_group([], keys(1))
    ours.close(handle)
    with pytest.raises(ValueError, match="handle 0 is not open"):
        ours.close(handle)
    ours.model = tiny().train()
    with pytest.raises(ValueError, match="training mode"):
        ours.step()
    tiny().eval()


def test_unsupported_models_are_refused_by_name():
    sliding = transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    with pytest.raises(ValueError, match="layers with sliding_attention are not supported"):
        check_attention(sliding)
    with pytest.raises(ValueError, match="model type 'mistral' is not supported"):
        check_attention(transformers.MistralConfig(**TINY))


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="max_scheduled_tokens is 5, less than engine.max_rows 6"):
        EngineConfig(max_rows=6, max_scheduled_tokens=5)
    with pytest.raises(ValueError, match="engine.cache_bytes is 0: it must be at least 1"):
        engine(blocks=0)
