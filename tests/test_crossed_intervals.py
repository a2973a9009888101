"""Intervals over seeds and dialogues, and rank correlations: hand numbers and coverage."""

import numpy as np
import pytest

from mtsql.judge.crossed_intervals import crossed_correlation, crossed_mean, spearman


def test_a_mean_is_over_turns_and_its_interval_over_seeds_and_dialogues():
    # Every turn of a seed has the same value, so only the draws of seeds matter: three draws of
    # 0, 30 and 90 have a mean of 0 with probability 1/27 (above 2.5 %) and likewise of 90.
    values = [(seed, f"d{i}", x) for seed, x in enumerate((0.0, 30.0, 90.0)) for i in range(5)]
    found = crossed_mean(values)
    assert (found.value, found.interval, found.count) == (40.0, (0.0, 90.0), 15)
    assert found.by_seed == (0.0, 30.0, 90.0)
    # Of equal seeds only the draws of dialogues matter: 40 dialogues, 20 of them right. The 2.5
    # and 97.5 % points of a binomial with n = 40 are 14 and 26.
    values = [(seed, f"d{i}", 100.0 * (i < 20)) for seed in range(3) for i in range(40)]
    assert crossed_mean(values, num_resamples=20_000).interval == (35.0, 65.0)
    long = [(0, "long", 0.0)] * 3 + [(0, "short", 100.0)]
    assert crossed_mean(long).value == 25.0


def test_two_sets_share_the_draws_of_seeds_and_dialogues():
    # Both sets differ between seeds and dialogues in the same way, so their difference is sure.
    values = [(seed, f"d{i}", 7.0 * seed + i) for seed in range(3) for i in range(10)]
    more = [(seed, name, value + 5) for seed, name, value in values]
    found = crossed_mean(more, values)
    assert found.value == pytest.approx(5)
    assert found.interval == pytest.approx((5, 5))
    assert found.is_above_0 and not found.is_below_0
    assert crossed_mean(values, more).is_below_0


def test_order_changes_nothing_and_one_dialogue_gives_no_interval():
    values = [(seed, f"d{i}", float(seed * i % 3)) for seed in range(3) for i in range(10)]
    assert crossed_mean(values) == crossed_mean(values[::-1])
    assert crossed_mean([(0, "d", 1.0), (1, "d", 3.0)]).interval is None
    with pytest.raises(ValueError, match="no value"):
        crossed_mean([])
    with pytest.raises(ValueError, match="num_resamples is 0"):
        crossed_mean(values, num_resamples=0)


@pytest.mark.parametrize(
    ("spread", "noise", "least", "most"), [(0, 35, 0.94, 1), (10, 10, 0.6, 0.9)]
)
def test_an_interval_holds_the_true_difference_as_often_as_is_said(spread, noise, least, most):
    rng = np.random.default_rng(3)
    num_held = 0
    num_tries = 150
    for _ in range(num_tries):
        table = rng.normal(4, spread, (3, 1)) + rng.normal(0, 15, (1, 100))
        table = table + rng.normal(0, noise, (3, 100))
        values = [(s, f"d{d}", table[s, d]) for s in range(3) for d in range(100)]
        low, high = crossed_mean(values, num_resamples=400).interval or (0, 0)
        num_held += low <= 4 <= high
    assert least <= num_held / num_tries <= most


def test_spearman_against_hand_numbers():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 25])) == pytest.approx(0.8)
    tied = spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3]))
    assert tied == pytest.approx(np.sqrt(3) / 2)
    assert spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])) == 0
    assert spearman(np.zeros((2, 3, 4)), np.ones((2, 3, 4))).shape == (2, 3)


def test_a_correlation_is_computed_for_each_seed_and_averaged():
    def models(rises: dict[int, float]) -> list[list[tuple[int, str, float]]]:
        return [
            [
                (seed, f"d{i}", step * sign + 0.001 * i)
                for seed, sign in rises.items()
                for i in range(6)
            ]
            for step in range(4)
        ]

    both = crossed_correlation(models({0: 1, 1: 1}), models({0: 2, 1: 2}))
    assert both.value == pytest.approx(1) and both.interval == pytest.approx((1, 1))
    rare = models({0: 1, 1: 1})
    rare[0] = [value for value in rare[0] if value[1] == "d0"]  # some resamples do not draw it
    found = crossed_correlation(rare, models({0: 2, 1: 2}))
    assert found.value == pytest.approx(1) and found.interval == pytest.approx((1, 1))
    mixed = crossed_correlation(models({0: 1, 1: 1}), models({0: 2, 1: -2}))
    assert mixed.value == pytest.approx(0) and mixed.interval == pytest.approx((-1, 1))
    with pytest.raises(ValueError, match="three or more"):
        crossed_correlation(models({0: 1})[:2], models({0: 1})[:2])
    lacking = [*models({0: 1, 1: 1})[:2], [(0, "d", 1.0)]]
    assert crossed_correlation(models({0: 1, 1: 1})[:3], lacking) is None


def test_luck_on_the_same_dialogues_is_no_correlation():
    rng = np.random.default_rng(5)
    found = []
    for _ in range(6):
        x, y = [], []
        for _ in range(8):  # equal models; what is right by luck is high in x and in y
            luck = rng.normal(0, 1, (2, 100))
            both = [(s, f"d{d}", luck[s, d]) for s in range(2) for d in range(100)]
            x.append(both)
            y.append([(s, name, value + rng.normal(0, 0.1)) for s, name, value in both])
        found.append(crossed_correlation(x, y, num_resamples=10).value)
    assert abs(np.mean(found)) < 0.3  # 0.9 and more from the means of the same dialogues
