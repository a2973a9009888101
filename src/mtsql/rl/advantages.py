"""Group-relative advantages: what a trajectory earned against its siblings. Plain Python; a new one is a branch here."""

from dataclasses import dataclass
from statistics import mean, stdev

BASELINES = ("mean", "leave_one_out")


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards of one group become advantages."""

    baseline: str = "mean"
    """mean: the group's mean (GRPO). leave_one_out: the mean of the other samples (RLOO)."""
    divide_by_std: bool = True
    """Divide by the group's sample standard deviation + eps (GRPO; Dr.GRPO does not)."""
    eps: float = 1e-6
    """Added to the standard deviation (paper section 4.5)."""

    def __post_init__(self):
        if self.baseline not in BASELINES:
            raise ValueError(f"advantage.baseline must be one of {', '.join(BASELINES)}, not {self.baseline!r}")


def group_advantages(rewards: list[float], config: AdvantageConfig = AdvantageConfig()) -> list[float]:
    """One advantage per sample of a group; all zero when every reward is equal. ValueError for fewer than 2 samples."""
    n = len(rewards)
    if n < 2:
        raise ValueError(f"a group of {n} cannot be compared with itself: group_size must be at least 2")
    if max(rewards) == min(rewards):
        return [0.0] * n
    centred = [r - mean(rewards) for r in rewards]
    if config.baseline == "leave_one_out":
        centred = [c * n / (n - 1) for c in centred]
    scale = stdev(rewards) + config.eps if config.divide_by_std else 1.0
    return [c / scale for c in centred]
