"""Drafts change no token, whatever they say; they come from text that occurred before; and their
length follows the cost of a step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import Played, keys, make_engine, play, prompts, replies, tiny
from mtsql.engine.drafts import Drafter, GroupText
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig
from mtsql.engine.scheduler import Prompt, Row
from mtsql.engine.step_costs import Costs

FLAT = ((1, 1.0), (2, 1.0))  # more tokens cost nothing: draft as much as possible
STEEP = ((1, 1.0), (2, 2.0))  # a token costs the same in any step: drafts gain nothing


def logprobs(played: Played) -> list[float]:
    return [
        value for completions in played.values() for done in completions for value in done.logprobs
    ]


def repetitive(*lengths: int) -> list[list[int]]:
    """Prompts in which a few tokens repeat."""
    return [[ids[i % 5] for i in range(len(ids))] for ids in prompts(*lengths)]


SAMPLINGS = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=0.4),
    "top-p": dict(temperature=0.8, top_p=0.6),
    "budgets": dict(temperature=0.4, max_reply_tokens=14, max_trajectory_tokens=29),
    "stop ids": dict(temperature=0.4, stop_ids=(3, 17, 40, 44)),
}


@pytest.mark.parametrize("blocks", [200, 27], ids=["roomy", "tiny cache"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_are_the_same_with_drafts_and_without(name, blocks):
    model = tiny(dtype=torch.float64)
    options = dict(max_reply_tokens=20, max_trajectory_tokens=60, blocks=blocks) | SAMPLINGS[name]
    groups = repetitive(14, 9, 18)
    room = 4 if name == "budgets" else 12
    observations = [prompts(room, seed=i) for i in range(3)]
    without = make_engine(model, max_draft=0, **options)
    expected = play(without, groups, observations, num_samples=4)
    engine = make_engine(model, step_costs=FLAT, **options)
    played = play(engine, groups, observations, num_samples=4)
    assert replies(played) == replies(expected)
    np.testing.assert_allclose(logprobs(played), logprobs(expected), rtol=0, atol=1e-9)
    assert 0 < engine.counts.accepted < engine.counts.drafted
    assert engine.counts.distinct == without.counts.distinct
    assert engine.counts.steps <= without.counts.steps
    if blocks == 27:
        assert engine.counts.preemptions


def test_tokens_in_single_precision_are_the_same_up_to_ties():
    groups = repetitive(14, 9, 18)
    options = dict(temperature=0.4, max_reply_tokens=20)
    expected = play(make_engine(max_draft=0, **options), groups, [[], [], []], num_samples=8)
    played = play(make_engine(step_costs=FLAT, **options), groups, [[], [], []], num_samples=8)
    pairs = zip(replies(played), replies(expected), strict=True)
    assert sum(one != other for one, other in pairs) <= 1


class Guesses(Drafter):
    """Drafts that are right for a random number of tokens and then random, of random lengths."""

    def __init__(self, engine: Engine, truth: dict[int, list[int]], seed: int) -> None:
        super().__init__(8, Costs(FLAT), engine.stop_ids, engine.sampling)
        self.truth = truth
        self.rng = np.random.default_rng(seed)

    def choose(self, rows: list[Row], num_chunk: int, max_tokens: int) -> list[list[int]]:
        drafts = []
        for row in rows:
            right = self.truth[row.handle][len(row.ids) :][: self.rng.integers(0, 9)]
            guess = [*right, *self.rng.integers(1, 60, 8).tolist()]
            num = min(self.rng.integers(0, 9), self.max_length(row), max_tokens)
            drafts.append(guess[:num])
            max_tokens -= num
        return drafts

    def record(self, index: int, num_drafted: int, num_accepted: int) -> None:
        pass


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(14, 60), st.integers(6, 40))
def test_any_draft_gives_the_same_tokens(seed, blocks, scheduled):
    """Stop ids and budgets in the middle of drafts, small caches, few tokens a step."""
    model = tiny(dtype=torch.float64)
    options = dict(stop_ids=(5, 9, 11, 30), max_reply_tokens=12, max_trajectory_tokens=40)
    options |= dict(blocks=blocks, rows=6, scheduled=scheduled)
    groups = prompts(6, 9)
    observations = [prompts(5), prompts(3, 4)]
    expected = play(make_engine(model, max_draft=0, **options), groups, observations, 3)
    truth = {}
    for handle, completions in expected.items():
        texts = [done.ids for done in completions]
        between = [*observations[handle // 3], []]
        truth[handle] = [id for pair in zip(texts, between, strict=True) for id in sum(pair, [])]
    engine = make_engine(model, step_costs=FLAT, **options)
    engine.drafter = Guesses(engine, truth, seed)
    assert replies(play(engine, groups, observations, 3)) == replies(expected)


def test_a_step_never_exceeds_the_scheduled_tokens_and_a_draft_preempts_nobody():
    options = dict(temperature=0, max_reply_tokens=30, rows=4, scheduled=12, blocks=44)
    engine = make_engine(step_costs=FLAT, **options)
    for turn, prompt in enumerate(repetitive(10, 10, 10, 10)):
        engine.open_group(prompt, keys(1, turn))
    most = 0
    while engine.has_work:
        before = engine.counts.computed
        engine.step()
        most = max(most, engine.counts.computed - before)
    assert most == 12
    assert engine.counts.accepted
    assert not engine.counts.preemptions  # the rows need all 44 blocks


def group_text(*texts: list[int]) -> GroupText:
    """A group whose prompt is the first text."""
    group = GroupText(texts[0])
    for ids in texts[1:]:
        group.add(group.start([]), ids)
    return group


def test_a_draft_follows_the_longest_suffix_and_then_the_latest():
    group = group_text([1, 2, 3, 4, 9, 2, 3, 5], [7, 2, 3, 6])
    assert group.find([8, 2, 3], 2) == ([6], 2)  # the latest
    assert group.find([8, 1, 2, 3], 2) == ([4, 9], 3)  # the longest
    assert group.find([3, 1], 2) == ([], 1)
    assert group.find([3, 5], 2) == ([], 1)  # nothing has followed it yet


def drafter(costs: tuple[tuple[int, float], ...] = FLAT, **sampling: int) -> Drafter:
    return Drafter(8, Costs(costs), frozenset({0}), SamplingConfig(**sampling))


def open_rows(drafter: Drafter, prompt: list[int], *texts: list[int]) -> list[Row]:
    group = Prompt(prompt)
    rows = [Row(handle, group, key=0, ids=list(ids)) for handle, ids in enumerate(texts)]
    for row in rows:
        drafter.open(row)
    return rows


def test_a_draft_goes_on_at_another_place_where_a_text_ends_and_stops_at_a_stop_id():
    one = drafter()
    rows = open_rows(one, [1, 2, 3, 4, 5, 6, 0, 8], [9, 4, 5], [1, 2, 3, 4])
    assert one.choose(rows, 0, 99) == [[6, 0], [5, 6, 0]]
    rows[0].ids += [7, 7]
    rows[1].ids += [5, 7]
    assert one.choose(rows, 0, 99) == [[], [7]]


def test_budgets_leave_room_for_the_token_after_the_draft():
    one = drafter(max_reply_tokens=4)
    (row,) = open_rows(one, [1, 2, 3, 4, 5, 6, 7], [1, 2])
    row.logprobs = [0.0, 0.0]
    assert one.choose([row], 0, 99) == [[3]]
    row.ids.append(3)
    row.logprobs.append(0.0)
    assert one.choose([row], 0, 99) == [[]]


def test_drafts_are_as_long_as_the_cost_of_a_step_allows():
    texts = [[1, 2], [9, 9, 9, 1, 2]]
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    one = drafter(STEEP)
    assert one.choose(open_rows(one, prompt, *texts), 0, 99) == [[], []]
    one = drafter(((1, 1.0), (2, 1.0), (3, 1.0), (4, 99.0)))
    assert one.choose(open_rows(one, prompt, *texts), 0, 99) == [[], [3]]  # the longer row
    one = drafter()
    assert one.choose(open_rows(one, prompt, *texts), 0, 3) == [[3], [3, 4]]
    assert one.choose(open_rows(drafter(), prompt), 0, 3) == []


def test_refused_drafts_make_drafts_shorter_until_the_next_rollout():
    costs = ((1, 1.0), (101, 51.0))  # a token more costs half of the first
    one = drafter(costs)
    prompt = [1, 2, 3, 4, 5]
    (row,) = open_rows(one, prompt, [1, 2])
    assert one.choose([row], 0, 99) == [[3]]
    for _ in range(20):
        one.record(0, 1, 0)
    assert one.choose([row], 0, 99) == [[]]
    one.close(row)
    assert one.choose(open_rows(one, prompt, [1, 2]), 0, 99) == [[3]]


def test_a_group_is_forgotten_with_its_last_row_and_until_then_its_rows_help_each_other():
    one = drafter()
    first, second = open_rows(one, [1, 2], [5, 6, 7, 8], [5])
    one.close(first)  # its text remains
    second.ids.append(6)
    assert one.choose([second], 0, 99) == [[7, 8]]
    one.close(second)
    assert not one._groups


def test_a_prompt_is_indexed_when_a_row_of_it_decodes():
    """An evaluation opens all of its turns at once, most of which wait for a long time."""
    one = drafter()
    (row,) = open_rows(one, list(range(1, 500)), [])
    (group,) = one._groups.values()
    assert not group._latest
    row.ids = [7, 8]
    assert one.choose([row], 0, 99) == [list(range(9, 17))]
    assert len(group._latest) > 490
