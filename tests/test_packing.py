"""The layout of a flat batch, number by number; properties of the packing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtsql.learner.packing import Sample, pack


def test_layout_of_a_shared_prompt():
    """Two samples share the prompt 1 2 3. The first token of a sample is predicted by the prompt's
    last token."""
    first = Sample(
        prompt_ids=[1, 2, 3],
        ids=[4, 5, 6, 7],
        loss_mask=[1, 1, 0, 1],
        advantages=[0.5, 0.5, 0.0, 2.0],
        old_logprobs=[-1.0, -2.0, 0.0, -3.0],
    )
    second = Sample(
        prompt_ids=[1, 2, 3],
        ids=[8, 9],
        loss_mask=[0, 1],
        advantages=[0.0, -0.5],
        old_logprobs=[0.0, -4.0],
    )
    [batch] = pack([first, second], max_tokens=9)
    #                                 P  P  P  a0 a1 E  a2 E  b0
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4]
    assert batch.sources.tolist() == [2, 3, 5, 7]
    assert batch.targets.tolist() == [4, 5, 7, 9]
    assert batch.trajectory_index.tolist() == [0, 0, 0, 1]
    assert batch.advantages.tolist() == [0.5, 0.5, 2.0, -0.5]
    assert batch.old_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert batch.ref_logprobs is None
    assert batch.spans == ((0, 3, 3, 7), (0, 3, 7, 9))
    assert batch.indices == (0, 1)
    assert (batch.num_computed, batch.num_distinct) == (9, 9)


def test_a_group_over_the_budget_repeats_its_prompt_and_counts_it():
    samples = [Sample([1, 2, 3], [4] * 4, [1] * 4) for _ in range(3)]
    first, second = pack(samples, max_tokens=12)
    assert (first.indices, first.num_computed, first.num_distinct) == ((0, 1), 11, 11)
    assert (second.indices, second.num_computed, second.num_distinct) == ((2,), 7, 4)


def test_best_fit_puts_a_part_where_it_leaves_least_room():
    costs = [6, 7, 3, 4]  # budget 10: 7 | 6, then 4 joins the 6, then 3 joins the 7
    samples = [Sample([i], [9] * (cost - 1), [1] * (cost - 1)) for i, cost in enumerate(costs)]
    assert [batch.indices for batch in pack(samples, 10)] == [(1, 2), (0, 3)]


def test_a_sample_that_cannot_be_packed_is_refused_by_name():
    with pytest.raises(ValueError, match="sample 1 has 6 tokens, more than max_batch_tokens=5"):
        pack([Sample([1], [2], [1]), Sample([1, 2], [3] * 4, [1] * 4)], 5)
    with pytest.raises(ValueError, match="2 ids but 1 loss_mask"):
        Sample([1], [2, 3], [1])
    with pytest.raises(ValueError, match="2 ids but 0 loss_mask"):
        Sample([1], [2, 3], [])
    with pytest.raises(ValueError, match="needs a prompt"):
        Sample([], [2], [1])


def test_samples_without_a_trained_token_give_no_batch():
    assert pack([], 10) == []
    assert pack([Sample([1], [2, 3], [0, 0])], 10) == []


prompts = st.sampled_from([(1,), (1, 2), (3, 4, 5)])
masks = st.lists(st.integers(0, 1), min_size=1, max_size=6)


@given(st.lists(st.tuples(prompts, masks), max_size=12), st.integers(9, 40))
def test_every_trained_token_is_packed_once_within_the_budget(drawn, max_tokens):
    samples = []
    for k, (prompt, mask) in enumerate(drawn):
        ids = [100 * k + i for i in range(len(mask))]  # every token has an id of its own
        samples.append(Sample(list(prompt), ids, mask))
    batches = pack(samples, max_tokens)
    assert all(batch.num_computed <= max_tokens for batch in batches)
    trained = sorted(k for k, sample in enumerate(samples) if sample.num_trained)
    assert sorted(index for batch in batches for index in batch.indices) == trained
    targets = sorted(target for batch in batches for target in batch.targets.tolist())
    expected = []
    for sample in samples:
        pairs = zip(sample.ids, sample.loss_mask, strict=True)
        expected += [id for id, is_trained in pairs if is_trained]
    assert targets == sorted(expected)
    prompts_packed = {tuple(samples[k].prompt_ids) for k in trained}
    num_distinct = sum(len(prompt) for prompt in prompts_packed)
    num_distinct += sum(len(samples[k].ids) for k in trained)
    assert sum(batch.num_distinct for batch in batches) == num_distinct


def test_a_whole_text_has_a_loss_on_every_token_but_the_first():
    sample = Sample(prompt_ids=[1, 2, 3], ids=[4, 5, 6], loss_mask=[1, 0, 1])
    [batch] = pack([sample.whole_text()], max_tokens=9)
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.targets.tolist() == [2, 3, 4, 5, 6]
    assert batch.sources.tolist() == [0, 1, 2, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    scored = Sample([1, 2], [3], [1], advantages=[1.0], old_logprobs=[-1.0])
    with pytest.raises(ValueError, match="advantages"):
        scored.whole_text()
