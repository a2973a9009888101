"""Bootstrap intervals by dialogue for a mean and for the difference of two runs; McNemar's test.

The turns of a dialogue resemble each other: who fails on the first turn often fails on the next
one, too. So the bootstrap draws whole dialogues, not turns. A resample holds as many dialogues as
the data, drawn with replacement, with all their turns. Its figure is the mean over its turns, so a
long dialogue weighs more than a short one, as it does in EX and EM.

The interval of a mean is a BCa interval (bias-corrected and accelerated; Efron, "Better Bootstrap
Confidence Intervals", 1987). Close to 0 or 100 % the resamples are skewed, and plain percentiles
miss the true figure too often: simulated with 30 dialogues and a true figure of 95 %, percentiles
held it in 84 % of the samples and BCa intervals in 92 %. With 300 dialogues both held it in 93 % or
more. The interval of a difference has plain percentiles. Where only few turns differ, BCa would
exclude 0 too often although two systems are equally good: with 5 such turns in 9 to 11 % of the
samples, percentiles in 5 %.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]

TAILS = (0.025, 0.975)
"""The quantiles between which an interval holds 95 %."""
MAX_DRAWS = 1 << 22
"""Dialogues that are drawn at a time. It bounds the memory and does not change the result."""
_NORMAL = NormalDist()


def mean_interval(
    values: Sequence[tuple[str, float]], *, seed: int = 0, num_resamples: int = 2000
) -> Interval | None:
    """The 95 % interval of a mean, in the unit of the values.

    values: (cluster, value) of each turn, in any order; a cluster is the id of its dialogue.
    None with fewer than two clusters: nothing tells then how dialogues differ. If all clusters have
    the same mean, the interval is that mean: a bootstrap knows no spread that the data do not show.
    ValueError if num_resamples is below 1.
    """
    return _interval(values, seed, num_resamples, is_bca=True)


def difference_interval(
    pairs: Sequence[tuple[str, float, float]], *, seed: int = 0, num_resamples: int = 2000
) -> Interval | None:
    """The 95 % interval of mean b - mean a over the same turns, in the unit of the values.

    pairs: (cluster, a, b) of each turn. A turn counts in both means of a resample or in none, so
    what is easy or hard for both cancels out. Otherwise as `mean_interval`.
    """
    differences = [(cluster, b - a) for cluster, a, b in pairs]
    return _interval(differences, seed, num_resamples, is_bca=False)


def mcnemar(only_a: int, only_b: int) -> float:
    """The p-value of McNemar's exact two-sided test: how often two equally good systems differ in
    their counts at least that much.

    only_a, only_b: the turns that only A, or only B, has right. The turns on which both agree say
    nothing. 1 if there are no others. Unlike `difference_interval`, the test takes the turns of a
    dialogue as independent.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts must not be negative, found {only_a} and {only_b}")
    num_turns = only_a + only_b
    ways = 1  # to choose k of the turns
    tail = 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (num_turns - k) // (k + 1)
    both_tails: float = 2 * tail / 2**num_turns
    return min(1.0, both_tails)


def _interval(
    values: Sequence[tuple[str, float]], seed: int, num_resamples: int, is_bca: bool
) -> Interval | None:
    """What `mean_interval` returns, from BCa levels or from plain percentiles."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: it must be at least 1")
    sums, counts = _totals(values)
    if len(sums) < 2:
        return None
    mean = float(sums.sum() / counts.sum())
    if np.allclose(sums, mean * counts, rtol=1e-12, atol=1e-12):
        return mean, mean
    means = _resampled(sums, counts, seed, num_resamples)
    ends = _bca_levels(mean, means, sums, counts) if is_bca else TAILS
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def _totals(values: Sequence[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """-> (sum of the values, number of values) of each cluster, in the order of the names."""
    names, places = np.unique([cluster for cluster, _ in values], return_inverse=True)
    numbers = np.array([value for _, value in values], dtype=np.float64)
    sums = np.bincount(places, weights=numbers, minlength=len(names))
    return sums, np.bincount(places, minlength=len(names)).astype(np.float64)


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int, num_resamples: int) -> np.ndarray:
    """The means of the resamples: num_resamples."""
    random = np.random.default_rng(seed)
    num_clusters = len(sums)
    rows = max(1, MAX_DRAWS // num_clusters)
    means = []
    for start in range(0, num_resamples, rows):
        shape = (min(rows, num_resamples - start), num_clusters)
        drawn = random.integers(num_clusters, size=shape)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _bca_levels(
    mean: float, means: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> tuple[float, float]:
    """The quantiles of the resamples' means at which the interval ends.

    The bias is how far the resamples' median lies from the mean, the acceleration how the spread
    grows with the mean: the skewness of the means that leave one cluster out.
    """
    tolerance = 1e-9 * (means.max() - means.min())
    below = np.count_nonzero(means < mean - tolerance)
    equal = np.count_nonzero(abs(means - mean) <= tolerance)
    least = 0.5 / len(means)
    bias = _NORMAL.inv_cdf(min(max((below + equal / 2) / len(means), least), 1 - least))
    without = (sums.sum() - sums) / (counts.sum() - counts)
    shifts = without.mean() - without
    scale = (shifts**2).sum() ** 1.5
    acceleration = (shifts**3).sum() / (6 * scale) if scale > 0 else 0.0
    ends = []
    for share in TAILS:
        shifted = bias + _NORMAL.inv_cdf(share)
        ends.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    return ends[0], ends[1]
