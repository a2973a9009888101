"""The engine against model.generate, a plain forward, and a slow engine of thirty lines."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.engine import (
    FAMILY,
    check_dialogues,
    finish,
    finish_one,
    keys,
    make_engine,
    play,
    prompts,
    replies,
    tiny,
)
from mtsql.engine.completions import StopReason
from mtsql.engine.config import EngineConfig
from mtsql.engine.sampling import SamplingConfig, hash_key, uniform


@FAMILY
def test_greedy_dialogues_equal_generate(family):
    groups = prompts(3, 17, 8, 1, 24)
    observations = [prompts(5, 1), prompts(9, 2, 13), [], prompts(4), prompts(7, 7)]
    engine = make_engine(tiny(family), temperature=0, max_reply_tokens=9)
    played = play(engine, groups, observations)
    check_dialogues(tiny(family, kind="sdpa"), groups, observations, played, 0, 1e-4)


@FAMILY
def test_sampled_logprobs_equal_a_plain_forward_in_float64(family):
    engine = make_engine(tiny(family, torch.float64), temperature=0.7, max_reply_tokens=9)
    groups = prompts(3, 17, 8)
    observations = [prompts(5, 1), prompts(9, 2), []]
    played = play(engine, groups, observations)
    check_dialogues(tiny(family, torch.float64, "sdpa"), groups, observations, played, 0.7, 1e-9)


def test_gathered_blocks_change_no_token():
    """The path of a GPU without flash-attn, with preemptions in a small cache."""
    model = tiny(dtype=torch.float64)
    groups = prompts(9, 30, 17)
    observations = [prompts(5, 9), prompts(9, 2), [[]]]
    played = []
    for by_tables in (False, True):
        engine = make_engine(model, blocks=40, temperature=0.9, max_reply_tokens=9)
        engine.pool.by_tables = by_tables
        played.append(play(engine, groups, observations, num_samples=3))
        assert engine.counts.computed > engine.counts.distinct
    assert replies(played[0]) == replies(played[1])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_are_the_same_alone_in_a_batch_and_after_preemption(temperature):
    model = tiny(dtype=torch.float64)
    options = dict(temperature=temperature, max_reply_tokens=6, stop_ids=(3,))
    groups = prompts(*range(5, 21))
    observations = [prompts(4, 3, seed=i) for i in range(16)]
    together = play(make_engine(model, **options), groups, observations, num_samples=4)
    assert len(together) == 64
    for turn in (0, 7, 15):
        one = make_engine(model, rows=1, scheduled=3, **options)
        for sample_index in range(4):
            (handle,) = one.open_group(groups[turn], [keys(4, turn)[sample_index]])
            alone = []
            for observation in [*observations[turn], None]:
                (done,) = finish(one)
                alone.append(done.ids)
                if observation is not None:
                    one.extend(handle, observation)
            one.close(handle)
            assert alone == replies(together)[4 * turn + sample_index]
    crowded = make_engine(model, blocks=35, **options)
    assert replies(play(crowded, groups, observations, num_samples=4)) == replies(together)
    assert crowded.counts.computed > crowded.counts.distinct  # some row was preempted


def test_each_distinct_token_is_computed_once():
    engine = make_engine(temperature=0, max_reply_tokens=5)
    played = play(engine, prompts(9, 14), [prompts(4), prompts(6)], num_samples=8)
    lengths = [sum(len(done.ids) for done in completions) for completions in played.values()]
    # The last sampled token of a trajectory is never computed.
    expected = 9 + 14 + sum(lengths) - 16 + 8 * (4 + 6)
    refused = engine.counts.drafted - engine.counts.accepted
    assert engine.counts.computed - refused == engine.counts.distinct == expected


def test_a_long_prompt_does_not_stall_a_decoding_row():
    engine = make_engine(temperature=0, max_reply_tokens=20, scheduled=8, rows=4)
    short, long = prompts(4, 90)
    engine.open_group(short, keys(1))
    engine.step()
    (handle,) = engine.open_group(long, keys(1))
    for _ in range(12):
        before = engine.counts.computed
        engine.step()
        assert engine.counts.computed - before == 8  # one token decoded, seven of the prompt
    assert len(engine._rows[0].ids) == 13
    assert not engine._rows[handle].ids


class SlowEngine:
    """One row at a time, one whole forward per token, no cache, no batch."""

    def __init__(self, model, stop_ids, sampling):
        self.model = model
        self.stop_ids = stop_ids
        self.sampling = sampling
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
            noise = uniform(np.array([key], dtype=np.uint64), np.array([len(ids)]))[0]
            total = 0.0
            for token in range(len(probs)):
                total += probs[token]
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
    """Random openings, observations, preemptions, closings and cache sizes change no token and leak
    no block."""
    options = dict(max_reply_tokens=4, max_trajectory_tokens=20)
    model = tiny(dtype=torch.float64)
    engine = make_engine(model, (3, 4, 5), blocks, rows, scheduled=rows + extra, **options)
    slow = SlowEngine(tiny("qwen3", torch.float64, "sdpa"), (3, 4, 5), SamplingConfig(**options))
    open_rows, idle = [], []

    def progress():
        return engine.counts.computed, sum(len(row.ids) for row in engine._rows.values())

    def step():
        before = progress()
        for done in engine.step():
            ids, logprobs, reason = slow.reply(done.handle)
            assert (done.ids, done.reason) == (ids, reason)
            assert done.logprobs == pytest.approx(logprobs, abs=1e-9)
            idle.append(done.handle)
        assert progress() != before or not engine.has_work  # idle rows may hold all blocks

    for turn, (action, *numbers) in enumerate(actions):
        chosen = open_rows[numbers[0] % len(open_rows)] if open_rows else None
        if action == "open":
            (prompt,) = prompts(numbers[0], seed=turn)
            noise_keys = keys(numbers[1], turn)
            handles = engine.open_group(prompt, noise_keys)
            slow.open_group(prompt, noise_keys, handles)
            open_rows += handles
        elif action == "step":
            for _ in range(numbers[0]):
                if engine.has_work:
                    step()
        elif action == "extend" and idle:
            handle = idle[numbers[0] % len(idle)]
            (observation,) = prompts(numbers[1], seed=turn)
            if len(slow.rows[handle][2]) + len(observation) < 20:
                idle.remove(handle)
                engine.extend(handle, observation)
                slow.extend(handle, observation)
        elif action == "preempt" and chosen is not None:
            engine.scheduler.preempt(engine._rows[chosen])
        elif action == "close" and chosen is not None:
            engine.close(chosen)
            open_rows.remove(chosen)
            idle[:] = [handle for handle in idle if handle != chosen]
    while open_rows:
        while engine.has_work:
            step()
        assert idle  # only idle rows can hold the blocks that others wait for
        for handle in idle:
            engine.close(handle)
            open_rows.remove(handle)
        idle.clear()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not any(engine.pool.refs)
    assert engine.counts.computed >= engine.counts.distinct


def test_a_stop_id_may_be_the_first_token():
    (prompt,) = prompts(6)
    first = finish_one(make_engine(temperature=0, max_reply_tokens=1), prompt).ids
    done = finish_one(make_engine(stop_ids=(first[0],), temperature=0), prompt)
    assert (done.ids, done.reason) == (first, StopReason.STOP_ID)
    assert len(done.logprobs) == 1


def test_an_empty_observation_continues_the_text():
    (prompt,) = prompts(6)
    whole = finish_one(make_engine(max_reply_tokens=8), prompt).ids
    engine = make_engine(max_reply_tokens=4)
    first = finish_one(engine, prompt)
    engine.extend(first.handle, [])
    (second,) = finish(engine)
    assert first.ids + second.ids == whole


def test_a_truncated_reply_names_its_budget():
    (prompt,) = prompts(6)
    engine = make_engine(max_reply_tokens=5, max_trajectory_tokens=9)
    first = finish_one(engine, prompt)
    assert (len(first.ids), first.reason) == (5, StopReason.REPLY_TOKENS)
    with pytest.raises(ValueError, match="no room for a reply in max_trajectory_tokens 9"):
        engine.extend(first.handle, [1, 2, 3, 4])
    engine.extend(first.handle, [1, 2])
    (second,) = finish(engine)
    assert (len(second.ids), second.reason) == (2, StopReason.TRAJECTORY_TOKENS)


def test_a_prompt_longer_than_the_cache_is_refused():
    engine = make_engine(blocks=20, max_trajectory_tokens=30)
    with pytest.raises(
        ValueError, match=r"prompt of 50 tokens .* needs 21 cache blocks and there are 20"
    ):
        engine.open_group(*prompts(50), keys(1))
    played = play(engine, prompts(48), [[]], num_samples=2)  # each needs all 20 blocks
    assert [len(completions[0].ids) for completions in played.values()] == [30, 30]


def test_misuse_is_refused_in_words():
    engine = make_engine(max_reply_tokens=2)
    (handle,) = engine.open_group(*prompts(3), keys(1))
    with pytest.raises(ValueError, match="handle 0 is still decoding"):
        engine.extend(handle, [1])
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        engine.open_group([], keys(1))
    engine.close(handle)
    with pytest.raises(ValueError, match="handle 0 is not open"):
        engine.close(handle)
    engine.model = tiny().train()
    with pytest.raises(ValueError, match="training mode"):
        engine.step()
    tiny().eval()


def test_limits_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_scheduled_tokens is 5, less than engine.max_rows 6"):
        EngineConfig(max_rows=6, max_scheduled_tokens=5)
    with pytest.raises(ValueError, match="engine.cache_bytes is 0: it must be at least 1"):
        make_engine(blocks=0)


class CountCasts(TorchDispatchMode):
    """Counts the casts of a model's weights."""

    def __init__(self, model):
        super().__init__()
        self.num = 0
        self.places = {weight.data_ptr() for weight in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_cast = func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
        if is_cast and args[0].data_ptr() in self.places:
            self.num += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_the_weights_once_and_not_in_every_step():
    with torch.autocast("cpu", torch.bfloat16):
        engine = make_engine(temperature=0, max_reply_tokens=9)
        engine.open_group(prompts(6)[0], keys(2))
        casts = []
        for _ in range(3):
            with CountCasts(engine.model) as mode:
                engine.step()
            casts.append(mode.num)
    assert casts[0] > 0
    assert casts[2] == 0
