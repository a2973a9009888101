"""Siblings compared: advantages, what is left out of learning, and why."""

from types import SimpleNamespace

import pytest

from mtsql.agent.env import Outcome
from mtsql.episodes import Scored, compare
from mtsql.llm.losses import LossConfig, denominator
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.trajectory import Trajectory

ALONE = SimpleNamespace(process_index=0, num_processes=1)


def group(*rewards, outcomes=(), lengths=()):
    """A group of trajectories with these rewards; all answered and two tokens long unless said otherwise."""
    scored = []
    for i, reward in enumerate(rewards):
        outcome = outcomes[i] if outcomes else Outcome.ANSWERED
        trajectory = Trajectory(None, i, [1], SimpleNamespace(outcome=outcome))
        if length := lengths[i] if lengths else 2:
            trajectory.add_sampled([7] * length, [-1.0] * length)
        scored.append(Scored(trajectory, {}, reward))
    return scored


def advantages(groups, keep_equal=False, **config):
    samples = compare(ALONE, groups, AdvantageConfig(**{"scale": "none", **config}), keep_equal)
    return [s.advantages[0] for s in samples]


def test_equal_groups_are_left_out_unless_another_term_learns_from_them():
    groups = [group(1, 1), group(0, 2)]
    assert advantages(groups) == [-1, 1]
    assert advantages(groups, keep_equal=True) == [0, 0, -1, 1]


def test_a_trajectory_without_a_sampled_token_counts_for_the_baseline_only():
    assert advantages([group(0, 2, 4, lengths=(0, 2, 3))]) == [0, 2]


def test_cut_trajectories_are_kept_masked_or_dropped():
    groups = [group(0, 2, 4, outcomes=(Outcome.STEP_TOKENS, Outcome.ANSWERED, Outcome.NO_ACTION))]
    assert advantages(groups) == [-2, 0, 2]
    assert advantages(groups, cut="mask") == [0, 2]
    assert advantages(groups, cut="drop") == [-1, 1]


def test_a_batch_baseline_reaches_over_groups():
    assert advantages([group(0, 0), group(2, 2)], baseline="batch") == [-1, -1, 1, 1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 9), ({"aggregate": "trajectory"}, 3), ({"aggregate": "constant", "constant_length": 8}, 24)],
)
def test_the_denominator_is_that_of_the_loss(config, expected):
    samples = compare(ALONE, [group(0, 2, 5, lengths=(2, 3, 4))], AdvantageConfig(), keep_equal=False)
    assert denominator(samples, LossConfig(**config)) == expected
