"""From scored groups to samples: advantages, and which trajectories give no sample and why."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.collecting import scored
from mtsql.agent.env import Outcome
from mtsql.learner.losses import LossConfig, denominator, with_gradient
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.samples import compute_advantages, has_signal, measure_kl
from mtsql.run.ranks import Ranks


def advantages(*groups, **config) -> list[float]:
    """The advantage of each sample, without division by a standard deviation."""
    config = AdvantageConfig(**{"scale": "none", **config})
    return [sample.advantages[0] for sample in compute_advantages(list(groups), Ranks(), config)]


def rewards(*values: float) -> list:
    return [scored(value) for value in values]


def test_zero_variance_groups_count_or_are_no_part_of_the_update():
    equal, unequal = rewards(1, 1), rewards(0, 2)
    assert advantages(equal, unequal) == [0, 0, -1, 1]
    assert advantages(equal, unequal, zero_variance="drop") == [-1, 1]
    config = AdvantageConfig()
    assert has_signal(unequal, config) and not has_signal(equal, config)


def test_samples_without_a_gradient_count_in_the_denominator_only():
    """Zero-variance groups count in the mean. They are computed only if a KL or entropy term learns
    from them too."""
    groups = [rewards(1, 1), rewards(0, 2), rewards(0, 1, 2)]
    samples = compute_advantages(groups, Ranks(), AdvantageConfig(scale="none"))
    plain = LossConfig(kl_coef=0.0)
    assert [s.advantages[0] for s in with_gradient(samples, plain)] == [-1, 1, -1, 1]
    assert denominator(samples, plain) == 14
    for config in (LossConfig(kl_coef=0.1), LossConfig(kl_coef=0.0, entropy_coef=0.1)):
        assert with_gradient(samples, config) == samples


def test_a_trajectory_without_a_sampled_token_counts_for_the_baseline_only():
    group = [scored(0, num_tokens=0), scored(2), scored(4, num_tokens=3)]
    assert advantages(group) == [0, 2]


def test_truncated_trajectories_are_trained_on_masked_or_dropped():
    group = [scored(0, Outcome.REPLY_TOKENS), scored(2), scored(4, Outcome.NO_ACTION)]
    assert advantages(group) == [-2, 0, 2]
    assert advantages(group, on_truncated="mask") == [0, 2]
    assert advantages(group, on_truncated="drop") == [-1, 1]


def test_malformed_trajectories_are_trained_on_masked_or_dropped():
    outcome = Outcome.NO_ACTION
    group = [scored(0, outcome, is_malformed=True), scored(2, outcome), scored(4, outcome)]
    assert advantages(group, on_truncated="drop") == [-2, 0, 2]
    assert advantages(group, on_malformed="mask") == [0, 2]
    assert advantages(group, on_malformed="drop") == [-1, 1]


def test_a_group_that_dropping_leaves_with_one_trajectory_gives_no_sample():
    group = [scored(0, is_malformed=True), scored(2, is_malformed=True), scored(4)]
    assert advantages(group, on_malformed="drop") == []


def test_a_batch_baseline_is_the_mean_over_all_groups():
    assert advantages(rewards(0, 0), rewards(2, 2), baseline="batch") == [-1, -1, 1, 1]


def test_the_kl_penalty_is_subtracted_before_advantages_are_computed():
    group = rewards(1, 1)

    def with_reference(samples):
        """The second trajectory's log-probs differ from the reference's by 0.5 a token."""
        assert [sample.old_logprobs for sample in samples] == [[-1.0, -1.0]] * 2
        return [replace(s, ref_logprobs=[-1.0 - i / 2] * 2) for i, s in enumerate(samples)]

    config = AdvantageConfig(scale="none", kl_coef=0.2)
    measure_kl([group], SimpleNamespace(with_reference=with_reference), config)
    assert [one.kl for one in group] == [0, 1] and [one.reward for one in group] == [1, 1]
    assert advantages(group, kl_coef=0.2) == pytest.approx([0.1, -0.1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 9),
        ({"aggregate": "trajectory"}, 3),
        ({"aggregate": "constant", "constant_length": 8}, 24),
    ],
)
def test_the_denominator_is_that_of_the_loss(config, expected):
    group = [scored(0, num_tokens=2), scored(2, num_tokens=3), scored(5, num_tokens=4)]
    samples = compute_advantages([group], Ranks(), AdvantageConfig())
    assert denominator(samples, LossConfig(**config)) == expected
