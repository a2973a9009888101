"""Intervals and tests against hand numbers, and how often an interval holds the true figure."""

import time

import numpy as np
import pytest

from mtsql.judge import intervals
from mtsql.judge.intervals import difference_interval, mcnemar, mean_interval


def _values(totals: list[tuple[int, int]]) -> list[tuple[str, float]]:
    """100 for each right turn and 0 for each wrong one, from (right, all) of each dialogue."""
    return [
        (f"dev:{index}", 100.0 * (place < right))
        for index, (right, count) in enumerate(totals)
        for place in range(count)
    ]


def test_a_symmetric_sample_has_the_percentiles_of_its_exact_bootstrap() -> None:
    # 40 dialogues of one turn, 20 right: no bias and no skew, so the interval ends at the 2.5 and
    # 97.5 % points of a binomial with n = 40 and p = 1/2, which are 14 and 26 of 40.
    values = _values([(1, 1)] * 20 + [(0, 1)] * 20)
    assert mean_interval(values, num_resamples=20_000) == (35.0, 65.0)


def test_the_turns_of_a_dialogue_stay_together() -> None:
    # Four equal turns in each dialogue say no more than one turn does.
    once = _values([(1, 1)] * 20 + [(0, 1)] * 20)
    four_times = [value for value in once for _ in range(4)]
    assert mean_interval(four_times) == mean_interval(once)
    as_single = [(f"{cluster}:{i}", value) for i, (cluster, value) in enumerate(four_times)]
    low, high = mean_interval(as_single) or (0, 0)
    assert high - low < 20  # half of 30: four times as many independent turns


def test_a_mean_is_over_turns_and_not_over_dialogues() -> None:
    # One long dialogue is wrong, 30 single turns are right. Over turns the mean is 50 %; the mean
    # over dialogues, 97 %, would have an interval above 85.
    low, high = mean_interval(_values([(0, 30)] + [(1, 1)] * 30)) or (0, 0)
    assert low < 50 < high


def test_order_and_number_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values([(index * 7 % 4, 3 + index % 3) for index in range(40)])
    expected = mean_interval(values)
    assert mean_interval(values[::-1]) == expected
    assert mean_interval(values, seed=1) != expected
    monkeypatch.setattr(intervals, "MAX_DRAWS", 1000)
    assert mean_interval(values) == expected


def test_without_spread_an_interval_has_no_width_or_is_missing() -> None:
    assert mean_interval([]) is None
    assert mean_interval([("a", 100.0), ("a", 0.0)]) is None
    assert mean_interval([("a", 0.1), ("b", 0.1), ("b", 0.1)]) == pytest.approx((0.1, 0.1))
    assert difference_interval([("a", 100, 100), ("b", 0, 0)]) == (0, 0)
    assert mean_interval([("a", 0.0), ("b", 100.0)]) == (0, 100)
    with pytest.raises(ValueError, match="num_resamples is 0"):
        mean_interval([], num_resamples=0)


def test_a_difference_is_paired() -> None:
    # B mends one turn in each of 10 dialogues and breaks none. The turns that are hard for both
    # widen the interval of each, not that of their difference.
    pairs = [("dev:0", 100.0, 0.0)]
    for index in range(40):
        pairs.append((f"dev:{index}", 100.0 * (index % 2), 100.0 * (index % 2 or index < 20)))
    low, high = difference_interval(pairs) or (0, 0)
    assert 0 < low < 100 * 9 / 41 < high < 50
    swapped = difference_interval([(cluster, b, a) for cluster, a, b in pairs]) or (0, 0)
    assert swapped == pytest.approx((-high, -low))


def test_mcnemar_is_the_two_sided_sign_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(1, 7) == mcnemar(7, 1) == 2 * (1 + 8) / 2**8
    assert mcnemar(10, 25) == pytest.approx(0.0167, abs=1e-4)
    assert 0 < mcnemar(900, 1100) < 1e-4
    with pytest.raises(ValueError, match="found -1 and 2"):
        mcnemar(-1, 2)


def test_a_difference_of_few_turns_is_not_taken_for_sure() -> None:
    # B mends 3 of 30 dialogues. In (27/30) ** 30 = 4 % of all resamples none of them is drawn.
    pairs = [(f"dev:{index}", 0.0, 100.0 * (index < 3)) for index in range(30)]
    assert (difference_interval(pairs) or (1, 1))[0] == 0
    assert (mean_interval([(cluster, b) for cluster, _, b in pairs]) or (0, 0))[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("num_dialogues", "share"), [(30, 0.2), (293, 0.03)])
def test_equal_systems_differ_in_5_percent_of_all_samples(num_dialogues: int, share: float) -> None:
    random = np.random.default_rng(0)
    num_alarms = 0
    for _ in range(600):
        pairs = []
        for index, count in enumerate(random.integers(1, 6, size=num_dialogues)):
            for draw in random.random(count):
                a, b = (100.0, 0.0) if draw < share / 2 else (0.0, 100.0 * (draw < share))
                pairs.append((f"dev:{index}", a, b))
        low, high = difference_interval(pairs, num_resamples=500) or (0, 0)
        num_alarms += low > 0 or high < 0
    assert 0.02 <= num_alarms / 600 <= 0.08


def _coverage(num_dialogues: int, share: float, num_tries: int) -> float:
    """How often the interval holds the true share, with turns that agree within a dialogue."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(num_tries):
        counts = random.integers(1, 6, size=num_dialogues)
        skills = random.beta(2.3 * share, 2.3 * (1 - share), size=num_dialogues)
        rights = random.binomial(counts, skills)
        values = _values(list(zip(rights.tolist(), counts.tolist(), strict=True)))
        low, high = mean_interval(values, num_resamples=500) or (0, 0)
        hits += low <= 100 * share <= high
    return hits / num_tries


def test_an_interval_holds_the_true_figure_in_95_percent_of_all_samples() -> None:
    assert 0.91 <= _coverage(60, 0.7, 150) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("num_dialogues", "share"), [(293, 0.8), (60, 0.95)])
def test_coverage(num_dialogues: int, share: float) -> None:
    assert 0.9 <= _coverage(num_dialogues, share, 600) <= 0.975


def test_twenty_figures_of_a_thousand_turns_take_less_than_a_second() -> None:
    values = _values([(2, 4)] * 100 + [(1, 3)] * 193)
    start = time.process_time()
    for seed in range(20):
        mean_interval(values, seed=seed)
    assert time.process_time() - start < 1
