"""The learning rate of an update. test_sharding and test_resume test the state on disk."""

import math
from typing import get_args

import pytest

from mtsql.learner.optimizer import OptimConfig, Schedule, learning_rate


def rates(num_updates: int, **options) -> list[float]:
    config = OptimConfig(lr=2.0, **options)
    return [learning_rate(config, update, num_updates) / 2.0 for update in range(num_updates)]


def test_cosine_by_its_formula():
    expected = [0.5, 1.0] + [
        0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * place / 18)) for place in range(18)
    ]
    found = rates(20, warmup_frac=0.1, schedule="cosine")
    assert found == pytest.approx(expected, rel=1e-14)


def test_the_other_schedules_by_hand():
    assert rates(4, warmup_frac=0.5) == [0.5, 1, 1, 1]
    assert rates(6, warmup_frac=0.34, schedule="linear", min_lr_frac=0.0) == pytest.approx(
        [0.5, 1, 1, 0.75, 0.5, 0.25]
    )
    assert rates(4, schedule="linear", min_lr_frac=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    wsd = rates(10, warmup_frac=0.2, schedule="wsd", decay_frac=0.4, min_lr_frac=0.0)
    half = math.sqrt(0.5) / 2
    assert wsd[1:] == pytest.approx([1, 1, 1, 1, 1, 1, 0.5 + half, 0.5, 0.5 - half])
    assert wsd[0] == 0.5


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("warmup_frac", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("min_lr_frac", [0.0, 0.1])
@pytest.mark.parametrize("num_updates", [1, 2, 3, 40])
def test_no_update_is_without_a_rate(schedule, warmup_frac, min_lr_frac, num_updates):
    options = {"warmup_frac": warmup_frac, "min_lr_frac": min_lr_frac}
    found = rates(num_updates, schedule=schedule, **options)
    assert all(0 < rate <= 1 for rate in found)
    num_warmup = round(warmup_frac * num_updates)
    assert found[:num_warmup] == sorted(found[:num_warmup])
    assert found[num_warmup:] == sorted(found[num_warmup:], reverse=True)
    assert max(found) == 1


def test_a_rate_depends_on_its_update_only():
    """So a resumed run has the rates of one that was not interrupted."""
    config = OptimConfig(lr=1e-3, warmup_frac=0.1, schedule="wsd")
    backwards = [learning_rate(config, update, 30) for update in reversed(range(30))]
    assert backwards[::-1] == [learning_rate(config, update, 30) for update in range(30)]


@pytest.mark.parametrize(
    ("key", "value"), [("min_lr_frac", 1.0), ("min_lr_frac", -0.1), ("decay_frac", 0.0)]
)
def test_a_fraction_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=f"optim.{key} is {value}"):
        OptimConfig(**{key: value})
