"""A trajectory only grows, and each token has its mask and its log-prob."""

from types import SimpleNamespace

import pytest

from mtsql.agent.env import Outcome
from mtsql.rl.trajectory import Trajectory

ENV = SimpleNamespace(outcome=Outcome.ANSWERED)


def two_replies() -> Trajectory:
    """P P P a0 a1 E a2"""
    trajectory = Trajectory(turn=None, sample=0, prompt_ids=[1, 2, 3], env=ENV)
    trajectory.add_sampled([10, 11], [-0.5, -0.25])
    trajectory.add_context([20])
    trajectory.add_sampled([12], [-1.0])
    return trajectory


def test_the_mask_is_one_where_the_policy_sampled():
    trajectory = two_replies()
    # ids                         a0    a1   E   a2
    assert trajectory.ids == [10, 11, 20, 12]
    assert trajectory.loss_mask == [1, 1, 0, 1]
    assert trajectory.logprobs == [-0.5, -0.25, 0.0, -1.0]
    assert trajectory.reply_spans == [(0, 2), (3, 4)]
    assert trajectory.num_sampled == 3 and trajectory.outcome is Outcome.ANSWERED


def test_each_sampled_token_needs_a_logprob():
    with pytest.raises(ValueError, match="2 sampled ids but 1 log-probs"):
        two_replies().add_sampled([1, 2], [-0.5])


def test_a_sample_has_an_entry_for_each_token_after_the_prompt():
    trajectory = two_replies()
    sample = trajectory.to_sample([0.5] * 4)
    assert (sample.prompt_ids, sample.ids) == ([1, 2, 3], [10, 11, 20, 12])
    assert (sample.loss_mask, sample.old_logprobs) == ([1, 1, 0, 1], trajectory.logprobs)
    assert (sample.advantages, sample.ref_logprobs) == ([0.5] * 4, None)
