"""Group-relative advantages: how a trajectory's reward compares with its group's.

Plain Python. A new estimator is a branch here. Rewards come in groups: one list for each prompt
with one number for each of its trajectories.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from mtsql.choices import KlEstimator, require_choices

Treatment = Literal["train", "mask", "drop"]
TREATMENTS: tuple[Treatment, ...] = ("train", "mask", "drop")  # from mild to strict
MAX_LOG_RATIO = 20.0  # as in the loss


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages. The defaults are GRPO's (paper section 4.5)."""

    credit: Literal["trajectory", "reply"] = "trajectory"
    """What an advantage belongs to. trajectory: all tokens of a trajectory have the same (paper).
    reply: each reply has its own, without the process reward that earlier replies have earned,
    compared with the same reply of the group's other trajectories (rl/credit.py). It needs
    baseline=leave_one_out."""
    baseline: Literal["mean", "leave_one_out", "batch", "none"] = "mean"
    """What is subtracted from a reward. mean: the mean of its group (GRPO). leave_one_out: the mean
    of the other samples of its group (RLOO). batch: the mean of the update (REINFORCE++). none:
    nothing."""
    scale: Literal["group", "batch", "none"] = "group"
    """What the difference is divided by. group: the sample standard deviation of the group's
    rewards (GRPO), plus eps. batch: that of the update's differences, plus eps. none: nothing (Dr.
    GRPO). With credit=reply, both are those of the differences of all replies."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    on_truncated: Treatment = "train"
    """What happens to trajectories that ended on a token or reply budget. train: train on them.
    mask: use their reward in the baseline only (DAPO's overlong filtering). drop: ignore them."""
    on_malformed: Treatment = "train"
    """The same for trajectories without one well-formed tool call or answer. The stricter of two
    treatments wins. A trajectory without a sampled token is never trained on."""
    zero_variance: Literal["count", "drop"] = "count"
    """Groups in which no trajectory has an advantage. count: the loss is a mean over them too, and
    its KL and entropy terms learn from them (paper, verl). drop: they are not part of the update
    (DAPO's dynamic sampling)."""
    kl_coef: float = 0.0
    """Weight of the KL penalty in the reward: the KL to the reference policy, summed over a
    trajectory's sampled tokens. 0: off. Not together with loss.kl_coef. With scale=group, a group
    of equal rewards is scaled by the spread of its KL alone, however small that is."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of that KL, as in the loss. k1 and k3 are unbiased; k3 varies less and is never
    negative."""

    def __post_init__(self) -> None:
        require_choices(self, "advantage")
        if self.eps < 0 or self.kl_coef < 0:
            raise ValueError("advantage.eps and advantage.kl_coef must not be negative")
        if self.credit == "reply" and self.baseline != "leave_one_out":
            raise ValueError(
                "advantage.credit=reply compares each reply with those of the other trajectories: "
                f"set advantage.baseline to leave_one_out, not {self.baseline}"
            )

    @property
    def compares(self) -> bool:
        """Whether a group needs at least two samples."""
        return self.baseline in ("mean", "leave_one_out") or self.scale == "group"


def treatment(is_truncated: bool, is_malformed: bool, config: AdvantageConfig) -> Treatment:
    """What happens to a trajectory. If it is truncated and malformed, the stricter treatment
    wins."""
    of_truncated = config.on_truncated if is_truncated else "train"
    of_malformed = config.on_malformed if is_malformed else "train"
    return max(of_truncated, of_malformed, key=TREATMENTS.index)


def batch_advantages(
    groups: list[list[float]],
    config: AdvantageConfig = AdvantageConfig(),
    treatments: list[list[Treatment]] | None = None,
) -> list[list[float | None]]:
    """Advantages of all groups of an update; None for a trajectory that is not trained on.

    `treatments` has one value for each trajectory (default: train). If a group must be compared
    and fewer than two trajectories are left in it, all its advantages are None. ValueError for a
    group that is given with fewer than two. Example, with scale=none:

        rewards     0 1 5              0 1 5
        treatments  train train mask   train train drop
        mean        2                  0.5
        advantages  -2 -1 None         -0.5 0.5 None
    """
    smallest = min((len(rewards) for rewards in groups), default=2)
    if config.compares and smallest < 2:
        raise ValueError(
            f"a group of {smallest} cannot be compared with itself: group_size must be at least 2"
        )
    if treatments is None:
        treatments = [["train"] * len(rewards) for rewards in groups]
    counted = []  # for each group, the rewards that are not dropped
    for rewards, kinds in zip(groups, treatments, strict=True):
        left = [r for r, kind in zip(rewards, kinds, strict=True) if kind != "drop"]
        is_too_small = config.compares and len(left) < 2
        counted.append([] if is_too_small else left)
    overall = [r for rewards in counted for r in rewards]
    centred = [_centred(rewards, overall, config.baseline) for rewards in counted]
    batch_std = standard_deviation([c for values in centred for c in values])

    advantages = []
    for rewards, values, kinds in zip(counted, centred, treatments, strict=True):
        if config.scale == "group":
            values = scaled(values, standard_deviation(rewards) + config.eps)
        elif config.scale == "batch":
            values = scaled(values, batch_std + config.eps)
        advantages.append(_placed(values, kinds))
    return advantages


def _centred(rewards: list[float], overall: list[float], baseline: str) -> list[float]:
    """A group's rewards minus their baseline. The mean is exact: equal rewards give exact zeros."""
    if baseline == "none" or not rewards:
        return rewards
    middle = mean(overall if baseline == "batch" else rewards)
    # r minus the mean of the n - 1 others is (r - mean of all n) * n / (n - 1)
    correction = len(rewards) / (len(rewards) - 1) if baseline == "leave_one_out" else 1.0
    return [(r - middle) * correction for r in rewards]


def scaled(values: Sequence[float], divisor: float) -> list[float]:
    """The values divided. A zero stays zero when the divisor is zero too."""
    return [value / divisor if value else 0.0 for value in values]


def _placed(values: list[float], kinds: list[Treatment]) -> list[float | None]:
    """One entry for each trajectory of a group: its value, or None if it is not trained on.

    `values` has an entry for each trajectory that is not dropped, or none at all if the group is
    too small to be compared.
    """
    if not values:
        return [None] * len(kinds)
    remaining = iter(values)
    placed: list[float | None] = []
    for kind in kinds:
        value = None if kind == "drop" else next(remaining)
        placed.append(value if kind == "train" else None)
    return placed


def standard_deviation(values: list[float]) -> float:
    """Sample standard deviation; 0 for fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0


def kl_of_trajectory(
    logprobs: Sequence[float],
    ref_logprobs: Sequence[float],
    loss_mask: Sequence[int],
    estimator: KlEstimator,
) -> float:
    """The estimated KL(policy || reference) of one trajectory, summed over its sampled tokens. The
    estimators are those of the loss (learner/losses.py, `kl_estimate`)."""
    total = 0.0
    for p, q, is_sampled in zip(logprobs, ref_logprobs, loss_mask, strict=True):
        d = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, q - p))
        if not is_sampled:
            continue
        if estimator == "k1":
            total += -d
        elif estimator == "k2":
            total += d * d / 2
        else:
            total += math.exp(d) - d - 1
    return total
