"""Credit by reply: advantages by hand, and the expected gradient of a small decision process, which
is computed over all groups of trajectories and compared with the exact one."""

from collections import defaultdict
from statistics import mean

import numpy as np
import pytest
import train_rl

from helpers.decision_process import (
    REPLIES,
    Policy,
    always_paid,
    paid_if_right,
    shared_out_afterwards,
)
from mtsql.agent.env import EnvConfig
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.checks import check_config
from mtsql.rl.credit import Returns, advantages_by_reply

REPLY = AdvantageConfig(credit="reply", baseline="leave_one_out", scale="none")
NO_LOOK = ("good", "bad", "answer")
TRAJECTORY = AdvantageConfig(baseline="leave_one_out", scale="none")


def advantages(*group, config=REPLY, treatments=None):
    [found] = advantages_by_reply([list(group)], config, [treatments or ["train"] * len(group)])
    return found


def by_reply(group):
    return advantages(*group)


def by_trajectory(group):
    return advantages(*group, config=TRAJECTORY)


def test_a_reply_is_not_paid_for_what_earlier_replies_have_earned():
    """Both earn 3 in all. The first earns 0.5 of it with its first reply, the second 1."""
    first = Returns(3.0, 2, (0.5, 1.0))
    second = Returns(3.0, 3, (1.0, 1.0))
    # Of reply 1 remain 2.5 and 2. The second trajectory's reply 2 has no equal: 3 - 1 is compared
    # with what the first one has left at its end, 3 - 1.
    assert advantages(first, second) == [[0.0, 0.5], [0.0, -0.5, 0.0]]


def test_a_baseline_joins_those_that_have_the_reply_and_all_others():
    """Of reply 1 remain 4 and 2 of those that have it. Those of all: 4, 2 and 1."""
    group = [Returns(5.0, 2, (1.0, 1.0)), Returns(2.0, 2), Returns(1.0, 1)]
    found = advantages(*group)
    assert found[0] == pytest.approx([5 - 1.5, 4 - mean([2, 1.5])])
    assert found[1] == pytest.approx([2 - 3, 2 - mean([4, 2.5])])
    assert found[2] == pytest.approx([1 - 3.5])


def test_what_may_not_be_paid_counts_by_its_chance():
    paid, spared = Returns(3.0, 2, (0.5, 1.0), True), Returns(0.0, 2, (0.75, 0.75), False)
    found = advantages(paid, spared, paid)
    half = (1 + 1) / (2 + 2)  # of the others of a paid one, one is paid
    left = [3 - half * 0.5, 0 - half * 0.75]
    assert found[0] == pytest.approx([3 - 1.5, left[0] - mean([left[0], left[1]])])
    three_quarters = (2 + 1) / (2 + 2)
    assert found[1] == pytest.approx([-3.0, -three_quarters * 0.75 - (3 - three_quarters * 0.5)])


def test_credit_by_trajectory_gives_each_reply_the_same():
    group = [Returns(0.0, 1), Returns(1.0, 3, (0.5, 0.5, 0.5)), Returns(5.0, 2)]
    found = advantages(*group, config=TRAJECTORY)
    assert found == [[0 - 3.0], [1 - 2.5] * 3, [5 - 0.5] * 2]


def test_equal_trajectories_have_advantages_of_exactly_zero():
    one = Returns(2.9, 3, (0.1, 0.7, 0.9))
    for scale in ("none", "group", "batch"):
        config = AdvantageConfig(credit="reply", baseline="leave_one_out", scale=scale, eps=0.0)
        assert advantages(one, one, one, config=config) == [[0.0] * 3] * 3
    # Rounding is no difference: 0.3 - 0.1 - 0.2 is not 0 in floating point.
    assert advantages(Returns(0.3, 2, (0.1,)), Returns(0.2, 2))[0][1] == 0.0


def test_masked_trajectories_are_in_the_baseline_and_dropped_ones_are_not():
    group = [Returns(0.0, 1), Returns(1.0, 1), Returns(5.0, 2)]
    assert advantages(*group, treatments=["train", "train", "mask"]) == [[-3.0], [-1.5], None]
    assert advantages(*group, treatments=["train", "train", "drop"]) == [[-1.0], [1.0], None]
    assert advantages(*group, treatments=["train", "drop", "drop"]) == [None] * 3


def test_scales_are_standard_deviations_over_all_replies():
    groups = [[Returns(0.0, 1), Returns(2.0, 2)], [Returns(1.0, 1), Returns(1.0, 1)]]
    treatments = [["train"] * 2] * 2
    plain = advantages_by_reply(groups, REPLY, treatments)
    assert plain == [[[-2.0], [2.0, 2.0]], [[0.0], [0.0]]]
    for scale, values in (("group", [-2, 2, 2]), ("batch", [-2, 2, 2, 0, 0])):
        config = AdvantageConfig(credit="reply", baseline="leave_one_out", scale=scale, eps=0.0)
        found = advantages_by_reply(groups, config, treatments)
        assert found[0][1] == pytest.approx([2 / np.std(values, ddof=1)] * 2)
        assert found[1] == [[0.0], [0.0]]


@pytest.mark.parametrize("baseline", ["mean", "batch", "none"])
def test_another_baseline_is_refused_by_name(baseline):
    with pytest.raises(ValueError, match="set advantage.baseline to leave_one_out"):
        AdvantageConfig(credit="reply", baseline=baseline)


def test_an_episode_of_one_reply_has_nothing_to_share():
    config = train_rl.Config(advantage=REPLY, env=EnvConfig(max_replies=1))
    with pytest.raises(ValueError, match="advantage.credit=reply has no effect"):
        check_config(config)
    check_config(train_rl.Config(advantage=REPLY))


@pytest.mark.parametrize(
    ("max_replies", "size", "kinds", "returns", "most"),
    [
        (3, 2, NO_LOOK, always_paid, 0.9),
        (2, 3, REPLIES, always_paid, 0.9),
        (3, 2, NO_LOOK, paid_if_right, 1.01),  # too few others to estimate the chance of pay
        (2, 3, REPLIES, paid_if_right, 0.99),
    ],
)
def test_the_expected_gradient_is_the_exact_one_and_varies_less(
    max_replies, size, kinds, returns, most
):
    """`most` is the largest variance allowed, as a share of that of credit by trajectory."""
    policy = Policy(0, max_replies, kinds)
    exact = policy.exact_gradient(returns)
    assert np.abs(exact).max() > 0.05
    found, variance = policy.estimated(size, returns, by_reply)
    np.testing.assert_allclose(found, exact, atol=1e-12)
    broadcast, variance_before = policy.estimated(size, returns, by_trajectory)
    np.testing.assert_allclose(broadcast, exact, atol=1e-12)
    print(f"{variance / variance_before:.3f} of the variance")
    assert variance < most * variance_before


@pytest.mark.slow
@pytest.mark.parametrize(("returns", "most"), [(always_paid, 0.93), (paid_if_right, 0.98)])
def test_in_groups_of_eight_the_gradient_varies_less(returns, most):
    """The mean over five policies, each with the same groups for both estimates."""
    ratios = []
    for seed in range(5):
        policy = Policy(seed, 3)
        exact = policy.exact_gradient(returns)
        errors = []
        for group in policy.sampled_groups(8, 800):
            given = [returns(one) for one in group]
            for estimate in (by_reply, by_trajectory):
                pairs = zip(group, estimate(given), strict=True)
                gradient = sum(policy.gradient(*pair) for pair in pairs) / 8
                errors.append(np.sum((gradient - exact) ** 2))
        ratios.append(np.mean(errors[::2]) / np.mean(errors[1::2]))
    print(f"{mean(ratios):.3f} of the variance")
    assert mean(ratios) < most


def test_sharing_a_mean_out_afterwards_pays_for_poor_calls():
    """The reply that makes a mean smaller would not pay for it."""
    policy = Policy(0, 3, NO_LOOK)
    exact = policy.exact_gradient(always_paid)
    np.testing.assert_allclose(exact, policy.exact_gradient(shared_out_afterwards), atol=1e-12)
    found, _ = policy.estimated(2, shared_out_afterwards, by_reply)
    assert np.abs(found - exact).max() > 0.01
    bad_after_good = policy.places["good",].start + policy.replies.index("bad")
    assert found[bad_after_good] > exact[bad_after_good] + 0.005


def test_a_policy_that_only_talks_longer_gains_nothing():
    """Looks change no reward: their expected advantage is 0 at each place, and so is the expected
    gradient."""
    policy = Policy(0, 4, ("look", "answer"), must_answer=True)
    np.testing.assert_allclose(policy.exact_gradient(always_paid), 0, atol=1e-12)
    found, _ = policy.estimated(3, always_paid, by_reply)
    np.testing.assert_allclose(found, 0, atol=1e-12)
    earned = defaultdict(float)
    for group, chance in policy.groups(3):
        advantages_of_group = by_reply([always_paid(one) for one in group])
        for one, values in zip(group, advantages_of_group, strict=True):
            for place, value in enumerate(values):
                earned[one.replies[: place + 1]] += chance * value
    assert len(earned) == 7 and max(map(abs, earned.values())) < 1e-12
