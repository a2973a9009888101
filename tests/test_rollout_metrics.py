"""Counts of engines become metrics: sums over ranks, fractions, rates."""

from dataclasses import asdict

import pytest

from mtsql.engine.counts import EngineCounts
from mtsql.model.flops import FlopMeter, ModelFlops
from mtsql.rl.rollout_metrics import RolloutCounts, engine_metrics, rollout_metrics
from mtsql.run.ranks import Ranks

MODEL = ModelFlops(per_token=10.0, per_pair=1.0, per_predicted=5.0)
COUNTS = EngineCounts(
    computed=120,
    distinct=100,
    row_steps=20,
    drafted=40,
    accepted=20,
    prompt=80,
    prefix_hits=60,
    steps=50,
    eager_steps=10,
    preemptions=3,
    sampled=40,
    attended=700,
    sql_wait_secs=1.5,
    judge_wait_secs=0.5,
)


def test_the_counts_of_two_engines_add_up():
    both = asdict(COUNTS + COUNTS)
    assert both == {name: 2 * value for name, value in asdict(COUNTS).items()}
    assert COUNTS + EngineCounts() == COUNTS


def test_the_rollouts_of_an_update_add_up():
    counts = RolloutCounts()
    counts.add(COUNTS, 2)
    counts.add(COUNTS, 1)
    values = counts.values()
    assert values["computed"] == 240 and values["with_signal"] == 3 and values["deadline"] == 0


def test_counts_become_metrics():
    metrics = engine_metrics(COUNTS, FlopMeter(MODEL, peak=950.0), Ranks(), secs=4.0)
    assert metrics == {
        "rollout_flops": 1000 + 700 + 200,
        "rollout_computed_per_distinct": 1.2,
        "prefix_hit_frac": 0.75,
        "drafted": 40,
        "accepted_frac": 0.5,
        "tokens_per_row_step": 2.0,
        "preemptions": 3,
        "eager_frac": 0.2,
        "sql_wait_secs": 1.5,
        "judge_wait_secs": 0.5,
        "num_sampled": 40,
        "rollout_tokens_per_sec": 10.0,
        "rollout_mfu": 0.5,
        "sql_wait_frac": 0.375,
    }


def test_seconds_are_means_over_ranks():
    total = {name: 2.0 * value for name, value in asdict(COUNTS).items()}
    metrics = rollout_metrics(total, MODEL, num_ranks=2)
    assert metrics["sql_wait_secs"] == 1.5 and metrics["drafted"] == 80


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("prefix_hit_frac", EngineCounts()),
        ("accepted_frac", EngineCounts()),
        ("tokens_per_row_step", EngineCounts()),
        ("eager_frac", EngineCounts(steps=9, eager_steps=9)),
    ],
)
def test_what_did_not_occur_is_none(key, counts):
    assert rollout_metrics(asdict(counts), MODEL, num_ranks=1)[key] is None
