"""Prompts that begin alike share blocks, and change no token."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cache_check import check_cache
from helpers.engine import finish, finish_one, keys, make_engine, play, prompts, tiny
from mtsql.engine.blocks import BlockPool
from mtsql.engine.engine import Engine
from mtsql.engine.prefixes import Prefixes, Prompt

SIZE = 4  # tokens in a block


def make_prefixes(num_blocks: int = 20) -> Prefixes:
    pool = BlockPool(1, num_blocks, SIZE, 1, 1, torch.float32, torch.device("cpu"))
    return Prefixes(pool)


def compute(prefixes: Prefixes, ids: list[int]) -> tuple[Prompt, int]:
    """Attach a prompt and compute all of it that is not known. Returns it, and how many tokens were
    computed."""
    prompt = Prompt(ids)
    prefixes.attach(prompt)
    num = len(ids) - prompt.cached
    prefixes.computed(prompt, num)
    prompt.hidden = torch.zeros(1)
    return prompt, num


def test_a_prompt_finds_the_blocks_of_its_beginning():
    prefixes = make_prefixes()
    _, num = compute(prefixes, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    assert num == 10
    second, num = compute(prefixes, [1, 1, 1, 1, 2, 2, 2, 2, 4])
    assert (num, len(second.path)) == (1, 3)
    _, num = compute(prefixes, [9, 9, 9, 9, 2, 2, 2, 2])  # the same block after another one
    assert num == 8
    assert prefixes.num_hits == 8


def test_a_block_begins_as_a_copy_of_what_it_has_in_common_with_another_one():
    prefixes = make_prefixes()
    first, _ = compute(prefixes, [1, 2, 3, 4, 5])
    prefixes.pool.data[:, :, first.blocks[0]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    second, num = compute(prefixes, [1, 2, 3, 9])
    assert num == 1
    copied = prefixes.pool.data[0, 0, second.blocks[0]]
    assert copied[:3].tolist() == [1, 2, 3]
    third, num = compute(prefixes, [1, 2])  # known, but not the hidden state of its last token
    assert num == 1 and third.blocks[0] not in (*first.blocks, *second.blocks)


def test_a_prompt_that_is_wholly_known_computes_its_last_token_again_for_its_hidden_state():
    prefixes = make_prefixes()
    for length in (4, 7):
        ids = [5] * length
        first, num = compute(prefixes, ids)
        second, num = compute(prefixes, ids)
        assert num == 1 and second.path == first.path
        prefixes.detach(second)
        prefixes.attach(second)  # as after a preemption: it has its hidden state
        assert second.is_ready


def test_unused_blocks_are_forgotten_last_the_end_of_a_prompt_before_its_beginning():
    prefixes = make_prefixes(6)
    for number in (1, 2):
        prefixes.detach(compute(prefixes, [number] * 8)[0])
    pool = prefixes.pool
    assert (len(pool.empty), len(pool.unused), pool.num_free) == (2, 4, 6)
    held = pool.take(3)  # the two empty ones, and the end of the first prompt
    assert compute(prefixes, [1] * 4)[1] == 1
    pool.release(held)
    assert compute(prefixes, [2] * 8)[1] == 1
    assert compute(prefixes, [1] * 8)[1] == 4


def test_tokens_that_are_computed_again_are_not_distinct():
    prefixes = make_prefixes(4)
    prompt = Prompt([1] * 8)
    prefixes.attach(prompt)
    assert [prefixes.computed(prompt, num) for num in (3, 5)] == [3, 5]
    prefixes.detach(prompt)
    prefixes.pool.release(prefixes.pool.take(4))  # forgets it
    again = Prompt([1] * 9)
    prefixes.attach(again)
    assert again.cached == 0
    assert [prefixes.computed(again, num) for num in (3, 6)] == [0, 1]


def test_a_partly_computed_block_is_continued_and_an_untouched_one_forgotten():
    prefixes = make_prefixes()
    prompt = Prompt([1] * 12)
    prefixes.attach(prompt)
    prefixes.computed(prompt, 6)
    prefixes.detach(prompt)
    assert len(prefixes.pool.unused) == 2
    assert compute(prefixes, [1] * 12)[1] == 6


@pytest.mark.parametrize("scheduled", [5, 15, 64])
def test_prompts_that_are_opened_together_compute_their_beginning_once(scheduled):
    common, *ends = prompts(22, 3, 5, 4, 9)
    ends.append(ends[0])  # the first prompt again
    groups = [common + end for end in ends]
    engine = make_engine(rows=5, scheduled=scheduled, temperature=0, max_reply_tokens=1)
    play(engine, groups, [[] for _ in groups])
    assert engine.counts.computed == 22 + 3 + 5 + 4 + 9 + 1
    assert engine.counts.distinct == engine.counts.computed - 1
    assert engine.counts.prompt == sum(map(len, groups))
    assert engine.counts.prefix_hits == engine.counts.prompt - engine.counts.computed
    without = make_engine(rows=5, scheduled=scheduled, temperature=0, max_reply_tokens=1)
    without.scheduler.prefixes.is_shared = False
    play(without, groups, [[] for _ in groups])
    assert without.counts.computed == without.counts.prompt
    assert without.counts.prefix_hits == 0


def test_a_preempted_prompt_is_continued_by_the_one_that_waits_for_it():
    common, *ends = prompts(30, 3, 5)
    engine = make_engine(scheduled=8, rows=4, temperature=0, max_reply_tokens=1)
    handles = [engine.open_group(common + end, keys(1, turn))[0] for turn, end in enumerate(ends)]
    engine.step()
    engine.close(handles[0])
    finish(engine)
    assert engine.counts.computed == 30 + 5


def test_decoding_rows_visit_no_unused_block():
    """Prompts in use lie together at the top, whatever is known besides."""
    engine = make_engine(blocks=60, temperature=0, max_reply_tokens=3)
    groups = prompts(*[9] * 15)
    for prompt in groups:
        engine.close(finish_one(engine, prompt).handle)
    handles = [engine.open_group(groups[turn], keys(1))[0] for turn in (0, 4, 9)]
    engine.step()
    engine.step()
    check_cache(engine)
    used = {block for handle in handles for block in engine._rows[handle].prompt.blocks}
    assert min(used) >= 60 - 1.1 * len(used)
    for turn, done in zip((0, 4, 9), finish(engine), strict=True):
        assert (
            done.ids == finish_one(make_engine(temperature=0, max_reply_tokens=3), groups[turn]).ids
        )


def test_an_engine_whose_weights_have_changed_is_refused():
    model = tiny("qwen2")
    engine = make_engine(model, max_reply_tokens=1)
    (prompt,) = prompts(5)
    finish_one(engine, prompt)
    with torch.no_grad():
        model.model.norm.weight.add_(0)
    with pytest.raises(ValueError, match="weights have changed since this engine was made"):
        engine.open_group(prompt, keys(1))


PROMPTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 13), st.integers(1, 3), st.integers(0, 9)),
    min_size=2,
    max_size=12,
)
"""Which of three beginnings, how much of it, how many tokens after it, and which."""


@settings(max_examples=20, deadline=None)
@given(PROMPTS, st.integers(14, 50), st.integers(1, 6), st.integers(0, 30), st.integers(0, 99))
def test_shared_beginnings_change_no_token_and_lose_no_block(drawn, blocks, rows, extra, seed):
    """Random prompts, cache sizes, preemptions and closings, against an engine for each group that
    shares nothing."""
    model = tiny(dtype=torch.float64)
    beginnings = prompts(13, 13, 13)
    beginnings[1] = beginnings[0][:7] + beginnings[1][7:]
    options = dict(stop_ids=(3, 4, 5), max_reply_tokens=4, max_trajectory_tokens=14)
    groups = [
        beginnings[which][:length] + prompts(num, seed=end)[0] for which, length, num, end in drawn
    ]
    observations = [prompts(2, seed=turn) for turn in range(len(groups))]
    engine = make_engine(model, blocks=blocks, rows=rows, scheduled=rows + extra, **options)
    alone = []
    for turn, (prompt, observation) in enumerate(zip(groups, observations, strict=True)):
        one = make_engine(model, **options)
        alone += play_and_check(one, [prompt], [observation], [turn])
    assert play_and_check(engine, groups, observations, range(len(groups)), seed) == alone
    assert engine.counts.prefix_hits <= engine.counts.prompt
    assert engine.pool.num_free == engine.pool.num_blocks


def play_and_check(
    engine: Engine,
    groups: list[list[int]],
    observations: list[list[list[int]]],
    turns: Iterable[int],
    seed: int | None = None,
) -> list[list[list[int]]]:
    """The replies of two samples of each group. With a seed, rows are preempted in the first
    steps."""
    left: dict[int, list[list[int]]] = {}
    played: dict[int, list[list[int]]] = {}
    for prompt, later, turn in zip(groups, observations, turns, strict=True):
        for handle in engine.open_group(prompt, keys(2, turn)):
            left[handle] = list(later)
            played[handle] = []
    step = 0
    while engine.has_work:
        step += 1
        cached = engine.scheduler.cached
        if seed is not None and step < 20 and (step + seed) % 3 == 0 and cached:
            engine.scheduler.preempt(cached[(seed + step) % len(cached)])
        for done in engine.step():
            played[done.handle].append(done.ids)
            if left[done.handle]:
                engine.extend(done.handle, left[done.handle].pop(0))
            else:
                engine.close(done.handle)
        check_cache(engine)
        assert step < 2000
    assert not engine._rows
    return list(played.values())


def test_an_engine_that_forgets_its_prompts_computes_the_bits_of_a_new_engine():
    """Also the log-probs of its rows, and what it counts."""
    common = prompts(30)[0]
    groups = [[*common, *end] for end in prompts(3, 5, 9, 12, seed=1)]
    observations = [[list(prompt[:4])] for prompt in groups]
    sampling = {"max_reply_tokens": 7, "blocks": 70, "rows": 5}

    def found(engine: Engine) -> list:
        played = play(engine, groups[1:], observations[1:], num_samples=3)
        return [[(done.ids, done.logprobs) for done in row] for row in played.values()]

    new, used = make_engine(**sampling), make_engine(**sampling)
    expected = found(new)
    play(used, groups, observations, num_samples=2)
    used.forget_prompts()
    assert used.pool.empty == list(range(used.pool.num_blocks)) and not used.pool.content
    before = replace(used.counts)
    assert found(used) == expected
    assert used.counts - before == new.counts and new.counts.prefix_hits > 0
    (handle,) = used.open_group(groups[0], keys(1))
    with pytest.raises(ValueError, match="a row is open"):
        used.forget_prompts()
    used.close(handle)
