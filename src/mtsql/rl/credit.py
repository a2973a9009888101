"""Credit by reply: each reply of a trajectory gets an advantage of its own.

Plain Python. With R the reward of a trajectory and c(k) the process reward that its replies before
reply k have earned (k counts from 0, and c(0) = 0):

    return of reply k       R - p * c(k)
    baseline of reply k     the mean over the returns of reply k of the other trajectories of the
                            group, and one more value: the mean over all others, each with the
                            return of reply k, or of its end if it ended before
    advantage of reply k    its return minus its baseline, divided by the scale

p is 1 if the process reward always counts (`reward.process_after=any`). Otherwise it estimates the
chance that it counts, from the others: (those for which it did + 1) / (others + 2).

So a reply is not paid for what earlier replies have earned, and each term acts on the reply that
earned it and on those before it. What only the end decides acts on all replies: the outcome, the
penalties, the components of the group and the KL penalty.

R minus the advantage of reply k does not depend on what reply k says: c(k) is known before it, and
the rest comes from other trajectories. Such a number adds nothing on average (Williams 1992), so
the expected gradient is that of R, and a trajectory gains nothing by being longer. In particular, a
trajectory that is longer than all others is compared with what the others had at their ends.
tests/test_credit.py compares the expectation with the exact gradient of a small decision process.

This is exact for the advantages that are returned with `scale=none` if every trajectory is trained
on. A divisor that depends on the samples makes it an approximation (a standard deviation, the
denominator of the loss), and so does what chooses among the samples by what they say (`mask`,
`drop`, resampling). Components of the group make the rewards of its trajectories depend on each
other; with them it is an approximation, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from mtsql.rl.advantages import (
    AdvantageConfig,
    Treatment,
    batch_advantages,
    scaled,
    standard_deviation,
)

ROUNDING = 1e-9
"""Advantages below this are 0. They come from rounding, and would make a group look unequal."""


@dataclass(frozen=True)
class Returns:
    """What the advantages of a trajectory are computed from."""

    reward: float
    """The whole reward, after the KL penalty."""
    num_replies: int
    so_far: tuple[float, ...] = ()
    """The weighted process reward after each reply. Empty if no component of it has a weight."""
    is_paid: bool | None = None
    """Whether the process reward is part of `reward`. None: it is, however the episode ends."""

    def before(self, reply: int) -> float:
        """The process reward that the replies before this one have earned."""
        earned = self.so_far[:reply]
        return earned[-1] if earned else 0.0

    def left(self, reply: int, chance: float) -> float:
        """The return of a reply. Beyond the end, it is that of a reply that earns nothing."""
        return self.reward - chance * self.before(reply)


def advantages_by_reply(
    groups: list[list[Returns]], config: AdvantageConfig, treatments: list[list[Treatment]]
) -> list[list[list[float] | None]]:
    """For each trajectory of each group one advantage for each of its replies, or None if it is not
    trained on. `treatments` has one value for each trajectory."""
    if config.credit == "reply":
        return _of_replies(groups, config, treatments)
    rewards = [[one.reward for one in group] for group in groups]
    values = batch_advantages(rewards, config, treatments)
    return [
        [None if v is None else [v] * one.num_replies for one, v in zip(group, row, strict=True)]
        for group, row in zip(groups, values, strict=True)
    ]


def _of_replies(
    groups: list[list[Returns]], config: AdvantageConfig, treatments: list[list[Treatment]]
) -> list[list[list[float] | None]]:
    centred = [_centred(*pair) for pair in zip(groups, treatments, strict=True)]
    batch_std = _std(row for group in centred for row in group)
    advantages = []
    for group, kinds in zip(centred, treatments, strict=True):
        divisor = 1.0
        if config.scale == "group":
            divisor = _std(group) + config.eps
        elif config.scale == "batch":
            divisor = batch_std + config.eps
        of_group = [
            scaled(row, divisor) if row is not None and kind == "train" else None
            for row, kind in zip(group, kinds, strict=True)
        ]
        advantages.append(of_group)
    return advantages


def _std(rows: Iterable[list[float] | None]) -> float:
    return standard_deviation([value for row in rows for value in row or ()])


def _centred(group: list[Returns], kinds: list[Treatment]) -> list[list[float] | None]:
    """The returns of each trajectory minus their baselines. None for a dropped trajectory, and for
    all of a group in which fewer than two are left."""
    left = [place for place, kind in enumerate(kinds) if kind != "drop"]
    rows: list[list[float] | None] = [None] * len(group)
    if len(left) < 2:
        return rows
    for place in left:
        one = group[place]
        others = [group[other] for other in left if other != place]
        chance = _chance_of_pay(others)
        row = []
        for reply in range(one.num_replies):
            returns = [other.left(reply, chance) for other in others]
            same = [
                value for value, o in zip(returns, others, strict=True) if o.num_replies > reply
            ]
            value = one.left(reply, chance) - mean([*same, mean(returns)])
            row.append(value if abs(value) > ROUNDING else 0.0)
        rows[place] = row
    return rows


def _chance_of_pay(others: list[Returns]) -> float:
    """The chance that the process reward of one more trajectory counts."""
    if any(other.is_paid is None for other in others):
        return 1.0
    return (sum(bool(other.is_paid) for other in others) + 1) / (len(others) + 2)
