"""Group-relative advantages: what a trajectory earned against its siblings. Plain Python; a new estimator is a branch
here. Rewards come in groups: one list for each prompt, one number for each of its trajectories."""

from dataclasses import dataclass
from statistics import mean, stdev

BASELINES = ("mean", "leave_one_out", "batch", "none")
SCALES = ("group", "batch", "none")
CUT = ("keep", "mask", "drop")

# Published algorithms as sets of ordinary keys. constant_length is the trajectory budget of the run.
PRESETS: dict[str, dict[str, object]] = {
    "grpo": {},
    "dr_grpo": {"advantage.scale": "none", "loss.aggregate": "constant", "loss.constant_length": 1024},
    "dapo": {"loss.clip_high": 0.28, "loss.dual_clip": None, "loss.kl_coef": 0.0, "advantage.cut": "mask"},
    "gspo": {
        "loss.ratio": "sequence", "loss.aggregate": "trajectory", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4,
        "loss.dual_clip": None, "loss.kl_coef": 0.0,
    },
    "cispo": {
        "loss.objective": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 4.0, "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
    "rloo": {"advantage.baseline": "leave_one_out", "advantage.scale": "none"},
    "reinforce_pp": {"advantage.baseline": "batch", "advantage.scale": "batch"},
}  # fmt: skip


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages; the defaults are GRPO's (paper section 4.5)."""

    baseline: str = "mean"
    """What is subtracted: the group's mean (mean: GRPO), the mean of its other samples (leave_one_out: RLOO), the mean
    of the whole update (batch: REINFORCE++), or nothing (none)."""
    scale: str = "group"
    """What divides: the sample standard deviation of the group's rewards (group: GRPO) or of the whole update's centred
    rewards (batch), each + eps; or nothing (none: Dr.GRPO)."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    cut: str = "keep"
    """Trajectories that ended on a budget instead of an answer: keep them; mask: they count for the baseline but are
    not trained on (DAPO's overlong filtering); drop: not even that."""

    def __post_init__(self):
        for name, allowed in (("baseline", BASELINES), ("scale", SCALES), ("cut", CUT)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"advantage.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.eps < 0:
            raise ValueError("advantage.eps must not be negative")

    @property
    def compares(self) -> bool:
        """Whether a group needs at least two samples."""
        return self.baseline in ("mean", "leave_one_out") or self.scale == "group"

    @property
    def needs_batch(self) -> bool:
        """Whether an advantage depends on other groups: then the groups of all ranks belong into one call."""
        return "batch" in (self.baseline, self.scale)


def group_advantages(rewards: list[float], config: AdvantageConfig = AdvantageConfig()) -> list[float]:
    """One advantage per sample of a group; all zero when every reward is equal. ValueError for fewer than 2 samples,
    and for a config that compares across groups."""
    if config.needs_batch:
        raise ValueError("advantage.baseline=batch and advantage.scale=batch need every group: use batch_advantages")
    return batch_advantages([rewards], config)[0]


def batch_advantages(
    groups: list[list[float]], config: AdvantageConfig = AdvantageConfig(), is_cut: list[list[bool]] | None = None
) -> list[list[float | None]]:
    """Advantages of all groups of an update; None for a trajectory that is not to be trained on.

    `is_cut` marks the trajectories that `config.cut` speaks of. A group that dropping leaves with fewer than two has
    nothing to compare: all None. ValueError for a group of fewer than two given to a baseline or scale of groups.
    """
    compares = config.compares
    small = min((len(rewards) for rewards in groups), default=2)
    if compares and small < 2:
        raise ValueError(f"a group of {small} cannot be compared with itself: group_size must be at least 2")
    if is_cut is None or config.cut == "keep":
        is_cut = [[False] * len(rewards) for rewards in groups]
    is_dropped = [[cut and config.cut == "drop" for cut in cuts] for cuts in is_cut]
    counted = [[r for r, out in zip(*pair, strict=True) if not out] for pair in zip(groups, is_dropped, strict=True)]
    counted = [rewards if len(rewards) > 1 or not compares else [] for rewards in counted]
    overall = [r for rewards in counted for r in rewards]
    centred = [_centred(rewards, overall, config.baseline) for rewards in counted]
    batch_std = _std([c for values in centred for c in values])
    results = []
    for rewards, values, dropped, cuts in zip(counted, centred, is_dropped, is_cut, strict=True):
        std = {"group": _std(rewards), "batch": batch_std, "none": None}[config.scale]
        left = iter(values if std is None else [c / (std + config.eps) if c else 0.0 for c in values])
        mine = [None if out else next(left, None) for out in dropped]
        results.append([None if cut else a for a, cut in zip(mine, cuts, strict=True)])
    return results


def _centred(rewards: list[float], overall: list[float], baseline: str) -> list[float]:
    """A group's rewards less their baseline. The mean is exact: equal rewards give exact zeros."""
    if baseline == "none" or not rewards:
        return rewards
    middle = mean(overall if baseline == "batch" else rewards)
    correction = len(rewards) / (len(rewards) - 1) if baseline == "leave_one_out" else 1.0
    return [(r - middle) * correction for r in rewards]


def _std(values: list[float]) -> float:
    """Sample standard deviation; 0 for fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment of length, to be added to a reward: 0 up to max_tokens - buffer, then linearly down to -1
    at max_tokens and beyond."""
    return -min(1.0, max(0.0, (num_tokens - (max_tokens - buffer)) / buffer))


def kl_penalty(logprobs: list[float], ref_logprobs: list[float], loss_mask: list[int]) -> float:
    """KL(policy || reference) of one trajectory as sampled (k1 summed over its trained tokens), to be subtracted from
    its reward, times a coefficient: the KL in the reward instead of in the loss."""
    return sum(p - q for p, q, m in zip(logprobs, ref_logprobs, loss_mask, strict=True) if m)
