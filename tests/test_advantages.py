"""Group advantages by hand and as properties."""

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
    group_advantages,
    kl_penalty,
    treatment,
)


def test_grpo_by_hand():
    """Mean 1, deviations -1 0 1, sample std 1: paper section 4.5."""
    assert group_advantages([0.0, 1.0, 2.0]) == pytest.approx(
        [-1 / (1 + 1e-6), 0, 1 / (1 + 1e-6)], abs=1e-12
    )


def test_dr_grpo_and_rloo_by_hand():
    assert group_advantages([0.0, 1.0, 5.0], AdvantageConfig(scale="none")) == [-2.0, -1.0, 3.0]
    rloo = AdvantageConfig(baseline="leave_one_out", scale="none")
    assert group_advantages([0.0, 1.0, 5.0], rloo) == [0 - 3.0, 1 - 2.5, 5 - 0.5]


def test_over_the_batch_by_hand():
    groups = [[0.0, 2.0], [5.0, 5.0]]
    # group means leave -1 1 0 0, of sample std sqrt(2/3)
    centred = AdvantageConfig(scale="batch", eps=0.0)
    std = (2 / 3) ** 0.5
    assert batch_advantages(groups, centred) == [pytest.approx([-1 / std, 1 / std]), [0.0, 0.0]]
    assert batch_advantages(groups, AdvantageConfig(baseline="batch", scale="none")) == [
        [-3.0, -1.0],
        [2.0, 2.0],
    ]
    assert batch_advantages([[1.0], [3.0]], AdvantageConfig(baseline="batch", scale="none")) == [
        [-1.0],
        [1.0],
    ]
    assert group_advantages([1.0, 2.0], AdvantageConfig(baseline="none", scale="none")) == [
        1.0,
        2.0,
    ]


def test_trajectories_are_kept_masked_or_dropped():
    groups, plain = [[0.0, 1.0, 5.0], [1.0, 2.0]], AdvantageConfig(scale="none")
    for name, expected in {
        "train": [[-2.0, -1.0, 3.0], [-0.5, 0.5]],
        "mask": [[-2.0, -1.0, None], [None, 0.5]],
        "drop": [[-0.5, 0.5, None], [None, None]],
    }.items():
        assert (
            batch_advantages(groups, plain, [["train", "train", name], [name, "train"]]) == expected
        )
    assert batch_advantages([[0.0, 1.0, 5.0]], plain, [["mask", "train", "drop"]]) == [
        [None, 0.5, None]
    ]


def test_of_two_fates_the_stricter_wins():
    for cut in TREATMENTS:
        for void in TREATMENTS:
            config = AdvantageConfig(on_truncated=cut, on_malformed=void)
            treatments = [
                treatment(is_truncated, is_malformed, config)
                for is_truncated in (False, True)
                for is_malformed in (False, True)
            ]
            assert treatments == [
                "train",
                void,
                cut,
                TREATMENTS[max(TREATMENTS.index(cut), TREATMENTS.index(void))],
            ]


rewards = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@given(rewards)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(values):
    for config in (
        AdvantageConfig(),
        AdvantageConfig(scale="none"),
        AdvantageConfig("leave_one_out", "none"),
    ):
        got = group_advantages(values, config)
        assert sum(got) == pytest.approx(0, abs=1e-6)
        order = sorted(range(len(values)), key=values.__getitem__)
        assert all(got[a] <= got[b] for a, b in zip(order, order[1:], strict=False))


@given(st.floats(-10, 10), st.integers(2, 8), st.sampled_from(["mean", "leave_one_out"]))
def test_equal_rewards_teach_nothing_exactly(value, n, baseline):
    assert group_advantages([value] * n, AdvantageConfig(baseline=baseline)) == [0.0] * n
    assert group_advantages([value] * n, AdvantageConfig(baseline=baseline, eps=0.0)) == [0.0] * n


def test_penalties():
    assert kl_penalty([-1.0, 0.0, -3.0], [-2.0, 9.0, -2.5], [1, 0, 1]) == 0.5


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
    assert kl_penalty(policy, ref, mask, estimator) == pytest.approx(sum(expected))
    of_loss = kl_estimate(torch.tensor(policy).double(), torch.tensor(ref).double(), estimator)
    assert kl_penalty(policy, ref, mask, estimator) == pytest.approx(
        (of_loss * torch.tensor(mask)).sum().item()
    )


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="a group of 1 .* group_size must be at least 2"):
        group_advantages([1.0])
    with pytest.raises(ValueError, match="use batch_advantages"):
        group_advantages([1.0, 2.0], AdvantageConfig(scale="batch"))
    for changes in (
        {"baseline": "x"},
        {"scale": "x"},
        {"on_truncated": "x"},
        {"on_malformed": "x"},
        {"zero_variance": "x"},
        {"kl_estimator": "k4"},
        {"kl_coef": -1.0},
        {"eps": -1.0},
    ):
        with pytest.raises(ValueError, match=f"advantage.{next(iter(changes))}"):
            AdvantageConfig(**changes)


def test_imports_no_torch():
    tree = ast.parse(Path(advantages.__file__).read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"dataclasses", "math", "statistics", "typing"}
