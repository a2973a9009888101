"""The learning rate of an update. test_sharding and test_resume test the state on disk."""

import pytest

from mtsql.learner.optimizer import OptimConfig, learning_rate


def test_the_rate_rises_in_the_warm_up_and_then_falls_to_a_tenth():
    warm = OptimConfig(lr=1.0, warmup_frac=0.1, schedule="cosine")
    assert [learning_rate(warm, update, 20) for update in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(warm, 20, 20) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0), 0, 1) == 1.0
