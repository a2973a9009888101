"""Advantages by hand and as properties."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtsql.learner.losses import kl_estimate
from mtsql.rl import advantages
from mtsql.rl.advantages import (
    TREATMENTS,
    AdvantageConfig,
    batch_advantages,
    kl_of_trajectory,
    treatment,
)


def advantages_of(rewards: list[float], **config) -> list[float]:
    """The advantages of a group that is alone."""
    [found] = batch_advantages([rewards], AdvantageConfig(**config))
    return found


def test_grpo_has_the_advantages_written_by_hand():
    """Mean 1, deviations -1 0 1, sample std 1: paper section 4.5."""
    expected = [-1 / (1 + 1e-6), 0, 1 / (1 + 1e-6)]
    assert advantages_of([0.0, 1.0, 2.0]) == pytest.approx(expected, abs=1e-12)


def test_dr_grpo_and_rloo_have_the_advantages_written_by_hand():
    rewards = [0.0, 1.0, 5.0]
    assert advantages_of(rewards, scale="none") == [-2.0, -1.0, 3.0]
    rloo = advantages_of(rewards, baseline="leave_one_out", scale="none")
    assert rloo == [0 - 3.0, 1 - 2.5, 5 - 0.5]


def test_batch_statistics_have_the_advantages_written_by_hand():
    groups = [[0.0, 2.0], [5.0, 5.0]]
    # group means leave -1 1 0 0, of sample std sqrt(2/3)
    centred = AdvantageConfig(scale="batch", eps=0.0)
    std = (2 / 3) ** 0.5
    assert batch_advantages(groups, centred) == [pytest.approx([-1 / std, 1 / std]), [0.0, 0.0]]
    over_all = AdvantageConfig(baseline="batch", scale="none")
    assert batch_advantages(groups, over_all) == [[-3.0, -1.0], [2.0, 2.0]]
    assert batch_advantages([[1.0], [3.0]], over_all) == [[-1.0], [1.0]]
    assert advantages_of([1.0, 2.0], baseline="none", scale="none") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", [[-2.0, -1.0, 3.0], [-0.5, 0.5]]),
        ("mask", [[-2.0, -1.0, None], [None, 0.5]]),
        ("drop", [[-0.5, 0.5, None], [None, None]]),
    ],
)
def test_trajectories_are_trained_on_masked_or_dropped(name, expected):
    groups = [[0.0, 1.0, 5.0], [1.0, 2.0]]
    treatments = [["train", "train", name], [name, "train"]]
    assert batch_advantages(groups, AdvantageConfig(scale="none"), treatments) == expected


def test_a_group_may_have_several_treatments():
    treatments = [["mask", "train", "drop"]]
    found = batch_advantages([[0.0, 1.0, 5.0]], AdvantageConfig(scale="none"), treatments)
    assert found == [[None, 0.5, None]]


@pytest.mark.parametrize("on_malformed", TREATMENTS)
@pytest.mark.parametrize("on_truncated", TREATMENTS)
def test_the_stricter_of_two_treatments_wins(on_truncated, on_malformed):
    config = AdvantageConfig(on_truncated=on_truncated, on_malformed=on_malformed)
    assert treatment(False, False, config) == "train"
    assert treatment(True, False, config) == on_truncated
    assert treatment(False, True, config) == on_malformed
    both = {on_truncated, on_malformed}
    stricter = "drop" if "drop" in both else "mask" if "mask" in both else "train"
    assert treatment(True, True, config) == stricter


rewards = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@given(rewards)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(values):
    rloo = {"baseline": "leave_one_out", "scale": "none"}
    for config in ({}, {"scale": "none"}, rloo):
        got = advantages_of(values, **config)
        assert sum(got) == pytest.approx(0, abs=1e-6)
        order = sorted(range(len(values)), key=values.__getitem__)
        assert all(got[a] <= got[b] for a, b in zip(order, order[1:], strict=False))


@given(st.floats(-10, 10), st.integers(2, 8), st.sampled_from(["mean", "leave_one_out"]))
def test_equal_rewards_give_advantages_of_exactly_zero(value, n, baseline):
    for eps in (1e-6, 0.0):
        assert advantages_of([value] * n, baseline=baseline, eps=eps) == [0.0] * n


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_that_of_the_loss_summed(estimator):
    policy, ref, mask = [-1.0, 0.0, -3.0, -40.0], [-2.0, 9.0, -2.5, -1.0], [1, 0, 1, 1]
    d = [q - p for p, q, m in zip(policy, ref, mask, strict=True) if m]
    d[-1] = 20.0  # the log ratio is clamped
    expected = {
        "k1": [-x for x in d],
        "k2": [x * x / 2 for x in d],
        "k3": [math.exp(x) - x - 1 for x in d],
    }[estimator]
    found = kl_of_trajectory(policy, ref, mask, estimator)
    assert found == pytest.approx(sum(expected))
    of_loss = kl_estimate(torch.tensor(policy).double(), torch.tensor(ref).double(), estimator)
    assert found == pytest.approx((of_loss * torch.tensor(mask)).sum().item())


def test_a_group_of_one_cannot_be_compared():
    with pytest.raises(ValueError, match="a group of 1 .* group_size must be at least 2"):
        advantages_of([1.0])


@pytest.mark.parametrize("name", ["kl_coef", "eps"])
def test_a_negative_value_is_named(name):
    with pytest.raises(ValueError, match=f"advantage.{name}"):
        AdvantageConfig(**{name: -1.0})


def test_imports_no_torch():
    tree = ast.parse(Path(advantages.__file__).read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {
        "collections.abc",
        "dataclasses",
        "math",
        "mtsql.choices",
        "statistics",
        "typing",
    }
