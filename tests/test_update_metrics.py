"""The metrics of an update, from trajectories and optimizer steps with known numbers."""

import pytest
import torch

from helpers.collecting import scored
from mtsql.agent.env import Outcome
from mtsql.learner.losses import LossConfig, policy_loss
from mtsql.learner.packing import Sample, pack
from mtsql.model.flops import ModelFlops, Work
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.update_metrics import LOSS_STATS, learning_flops, update_metrics, work_of
from mtsql.run.ranks import Ranks
from mtsql.sql.query import QueryStatus

SAMPLE = Sample([1], [7, 7], [1, 1], [1.0, 1.0], [-1.0, -1.0])
STEP = {
    "loss": 1.0,
    "grad_norm": 3.0,
    "num_computed": 9.0,
    "num_distinct": 6.0,
    "num_tokens": 4.0,
    "ratio": 4.0,
    "logprob_gap": 1.0,
}


def test_trajectories_are_counted_by_outcome_and_treatment():
    group = [
        scored(0, Outcome.REPLY_TOKENS, is_malformed=True),
        scored(2, is_malformed=True),
        scored(4),
        scored(6),
    ]
    for one in group:
        one.kl = 0.5
    group[3].components["ex"] = 1.0
    config = AdvantageConfig(on_truncated="mask", on_malformed="drop", kl_coef=0.1)
    metrics = update_metrics([group], [SAMPLE, SAMPLE], [{}], config, Ranks(), learn_flops=7.0)
    usual = {f"outcome/{outcome.value}": 0 for outcome in Outcome}
    usual |= {f"queries/{status.value}": 0 for status in QueryStatus}
    usual |= {f"loss/{name}": None for name in LOSS_STATS}
    assert metrics == usual | {
        "reward": 3,
        "reward_std": pytest.approx(5**0.5),
        "reward_kl": 0.5,
        "reward/ex": 0.25,
        "outcome/answered": 0.75,
        "outcome/reply_tokens": 0.25,
        "queries/ok": 0.5,
        "truncated_frac": 0.25,
        "malformed_frac": 0.5,
        "masked_frac": 0,
        "dropped_frac": 0.5,
        "kept_frac": 0.5,
        "response_tokens": 2,
        "num_trajectories": 4,
        "num_tokens": 4,
        "num_sampled": 8,
        "learn_flops": 7.0,
        "num_steps": 0,
        "num_computed": 0,
        "loss": None,
        "grad_norm": None,
        "engine_gap": None,
        "learn_computed_per_distinct": None,
    }


def test_every_update_has_the_same_keys():
    """A table of all updates then has no holes."""
    config = AdvantageConfig()
    without = update_metrics([[scored(0)]], [], [{}], config, Ranks())
    step = {**STEP, **dict.fromkeys(("clip_low", "clip_high", "ratio_far", "entropy"), 1.0)}
    other = [scored(1, Outcome.MAX_REPLIES, is_malformed=True)]
    with_step = update_metrics([other], [SAMPLE], [step], config, Ranks())
    assert list(without) == list(with_step)


def test_the_names_of_the_loss_statistics_are_those_of_the_loss():
    minus = [-1.0, -1.0]
    sample = Sample([1], [7, 7], [1, 1], [1.0, 1.0], minus, minus, minus)
    [batch] = pack([sample], 9)
    zeros = torch.zeros(2)
    _, stats = policy_loss(zeros, zeros, batch, LossConfig(kl_coef=0.1, tis_cap=2.0))
    assert set(stats) == set(LOSS_STATS)


def test_losses_are_means_over_the_tokens_of_all_steps():
    other = {**STEP, "loss": 2.0, "num_tokens": 6.0, "ratio": 11.0, "logprob_gap": 9.0}
    steps = [STEP, {}, other]
    group = [scored(0), scored(2)]
    metrics = update_metrics([group], [SAMPLE, SAMPLE], steps, AdvantageConfig(), Ranks())
    assert metrics["loss"] == 1.5 and metrics["grad_norm"] == 3.0 and metrics["num_steps"] == 2
    assert metrics["loss/ratio"] == 1.5 and metrics["loss/logprob_gap"] == 1.0
    assert metrics["learn_computed_per_distinct"] == 1.5
    assert metrics["engine_gap"] == 0.25  # of the first step
    metrics = update_metrics([group], [SAMPLE], steps, AdvantageConfig(), Ranks(), engine_gap=0.125)
    assert metrics["engine_gap"] == 0.125


def test_samples_of_a_prompt_compute_it_once():
    one = Sample([1, 2, 3], [4, 5], [1, 0])
    other = Sample([1, 2, 3], [6], [1])
    untrained = Sample([9] * 50, [1], [0])
    # The prompt attends to 1 + 2 + 3 tokens, the samples to 4 + 5 and to 4.
    assert work_of([one, other, untrained]) == Work(tokens=6, attended=19, predicted=2)
    assert work_of([]) == Work()


def test_learning_counts_each_pass_and_the_scoring_before_it():
    model = ModelFlops(per_token=10.0, per_pair=1.0, per_predicted=5.0)
    other = Sample([1, 2], [4], [1])
    once = 3 * (10.0 * 3 + 6 + 5.0 * 2)  # SAMPLE: three tokens, two predicted

    def flops(**options):
        usual = {"num_passes": 1, "has_reference": False, "is_recomputed": False}
        return learning_flops([SAMPLE, other], [SAMPLE], model, **usual | options)

    assert flops() == once
    assert flops(num_passes=2) == 2 * once
    assert flops(is_recomputed=True) == once + once / 3
    assert flops(has_reference=True) == once + once / 3 + (10.0 * 3 + 6 + 5.0)
