"""Group-relative advantages: what a trajectory earned against its siblings. Plain Python; a new estimator is a branch
here. Rewards come in groups: one list for each prompt, one number for each of its trajectories."""

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

BASELINES = ("mean", "leave_one_out", "batch", "none")
SCALES = ("group", "batch", "none")
TREATMENTS = ("train", "mask", "drop")  # from mild to strict
ZERO_VARIANCE = ("count", "drop")
KL_ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # as in the loss

# Published algorithms as sets of ordinary keys: the objective, not the sizes of a run (batch, group, learning rate).
# Two depend on the run: constant_length only scales the step, overlong_buffer is a fifth of the embedded default's
# trajectory budget, as DAPO's is of its own (4096 of 20480 tokens).
PRESETS: dict[str, dict[str, object]] = {
    # As MTSQL-R1 runs it (paper section 4.5). DeepSeekMath's first form: loss.aggregate=trajectory, loss.kl_coef=0.04,
    # loss.dual_clip=null.
    "grpo": {"advantage.zero_variance": "count", "loss.kl_coef": 0.001},
    # Liu et al. 2025: neither the length nor the spread of a group's rewards weighs a trajectory; no KL.
    "dr_grpo": {
        "advantage.scale": "none",
        "advantage.zero_variance": "count",
        "loss.aggregate": "constant",
        "loss.constant_length": 1024,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
    # Yu et al. 2025: clip-higher, dynamic sampling, token mean, overlong filtering and soft overlong punishment, no KL.
    # The paper takes 16 optimizer steps a batch (`minibatches`), without which nothing is ever clipped.
    "dapo": {
        "loss.clip_high": 0.28,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "loss.aggregate": "token",
        "advantage.on_truncated": "mask",
        "advantage.zero_variance": "drop",
        "curriculum.resample_rounds": 4,
        "reward.overlong_buffer": 128,
    },
    # Zheng et al. 2025. Its clip range is narrower than the rounding between engine and learner in bf16, hence
    # recomputed old log-probs; the paper takes 4 optimizer steps a batch.
    "gspo": {
        "loss.ratio": "sequence",
        "loss.aggregate": "trajectory",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "advantage.zero_variance": "count",
        "old_logprobs": "recomputed",
    },
    # MiniMax 2025: only the weight's upper bound is tuned (not printed; the 5 here is ours); token mean, no KL.
    "cispo": {
        "loss.objective": "cispo",
        "loss.clip_low": 1.0,
        "loss.clip_high": 4.0,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
        "advantage.zero_variance": "count",
    },
    # Ahmadian et al. 2024: a trajectory is one action (the sum over its tokens), the KL stands in its reward
    # (the coefficient is a usual one).
    "rloo": {
        "advantage.baseline": "leave_one_out",
        "advantage.scale": "none",
        "advantage.zero_variance": "count",
        "advantage.kl_coef": 0.03,
        "loss.aggregate": "constant",
        "loss.constant_length": 1024,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
    # Hu 2025, with group_size > 1. Each token there pays the KL from itself on; here all pay the trajectory's.
    "reinforce_pp": {
        "advantage.baseline": "batch",
        "advantage.scale": "batch",
        "advantage.zero_variance": "count",
        "advantage.kl_coef": 0.01,
        "loss.dual_clip": None,
        "loss.kl_coef": 0.0,
    },
}


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages; the defaults are GRPO's (paper section 4.5)."""

    baseline: str = "mean"
    """What is subtracted: the group's mean (mean: GRPO), the mean of its other samples
    (leave_one_out: RLOO), the mean of the whole update (batch: REINFORCE++), or nothing (none)."""
    scale: str = "group"
    """What divides: the sample standard deviation of the group's rewards (group: GRPO) or of the
    whole update's centred rewards (batch), each + eps; or nothing (none: Dr.GRPO)."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    on_truncated: Literal["train", "mask", "drop"] = "train"
    """Trajectories that ended on a budget instead of an answer: keep them; mask: they count for the
    baseline but are not trained on (DAPO's overlong filtering); drop: not even that."""
    on_malformed: Literal["train", "mask", "drop"] = "train"
    """Trajectories without one well-formed tool call or answer: keep, mask or drop them, as above.
    Of two treatments the stricter wins. One without a single sampled token is never trained on."""
    zero_variance: str = "count"
    """Groups in which nobody has an advantage. count: the loss is a mean over them too, and its KL
    and entropy terms learn from them (paper, verl). drop: they are no part of the update (DAPO's
    dynamic sampling)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy in the reward, over a trajectory's sampled tokens; 0
    needs no reference. Not together with loss.kl_coef."""
    kl_estimator: str = "k1"
    """Its estimate: k1, k2 or k3 as in the loss. k1 and k3 are unbiased, k3 varies less and is
    never negative."""

    def __post_init__(self):
        for name, allowed in (
            ("baseline", BASELINES),
            ("scale", SCALES),
            ("on_truncated", TREATMENTS),
            ("on_malformed", TREATMENTS),
            ("zero_variance", ZERO_VARIANCE),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"advantage.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if self.eps < 0 or self.kl_coef < 0:
            raise ValueError("advantage.eps and advantage.kl_coef must not be negative")

    @property
    def compares(self) -> bool:
        """Whether a group needs at least two samples."""
        return self.baseline in ("mean", "leave_one_out") or self.scale == "group"

    @property
    def needs_batch(self) -> bool:
        """Whether an advantage depends on other groups: then the groups of all ranks belong into
        one call."""
        return "batch" in (self.baseline, self.scale)


def group_advantages(
    rewards: list[float], config: AdvantageConfig = AdvantageConfig()
) -> list[float]:
    """One advantage per sample of a group; all zero when every reward is equal. ValueError for
    fewer than 2 samples, and for a config that compares across groups."""
    if config.needs_batch:
        raise ValueError(
            "advantage.baseline=batch and advantage.scale=batch need every group: use batch_advantages"
        )
    return batch_advantages([rewards], config)[0]


def treatment(is_truncated: bool, is_malformed: bool, config: AdvantageConfig) -> str:
    """keep, mask or drop: the stricter of what `config` has for a trajectory that was cut, or is
    void."""
    return max(
        "train",
        config.on_truncated if is_truncated else "train",
        config.on_malformed if is_malformed else "train",
        key=TREATMENTS.index,
    )


def batch_advantages(
    groups: list[list[float]],
    config: AdvantageConfig = AdvantageConfig(),
    treatments: list[list[str]] | None = None,
) -> list[list[float | None]]:
    """Advantages of all groups of an update; None for a trajectory that is not to be trained on.

    `treatments` says keep, mask or drop for each trajectory (default: keep). A group that dropping
    leaves with fewer than two has nothing to compare: all None. ValueError for a group of fewer
    than two given to a baseline or scale of groups.
    """
    compares = config.compares
    small = min((len(rewards) for rewards in groups), default=2)
    if compares and small < 2:
        raise ValueError(
            f"a group of {small} cannot be compared with itself: group_size must be at least 2"
        )
    if treatments is None:
        treatments = [["train"] * len(rewards) for rewards in groups]
    is_dropped = [[value == "drop" for value in values] for values in treatments]
    counted = [
        [r for r, out in zip(*pair, strict=True) if not out]
        for pair in zip(groups, is_dropped, strict=True)
    ]
    counted = [rewards if len(rewards) > 1 or not compares else [] for rewards in counted]
    overall = [r for rewards in counted for r in rewards]
    centred = [_centred(rewards, overall, config.baseline) for rewards in counted]
    batch_std = _std([c for values in centred for c in values])
    results = []
    for rewards, values, dropped, treatment_of in zip(
        counted, centred, is_dropped, treatments, strict=True
    ):
        std = {"group": _std(rewards), "batch": batch_std, "none": None}[config.scale]
        left = iter(
            values if std is None else [c / (std + config.eps) if c else 0.0 for c in values]
        )
        mine = [None if out else next(left, None) for out in dropped]
        results.append(
            [a if value == "train" else None for a, value in zip(mine, treatment_of, strict=True)]
        )
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


def kl_penalty(
    logprobs: list[float], ref_logprobs: list[float], loss_mask: list[int], estimator: str = "k1"
) -> float:
    """KL(policy || reference) of one trajectory as sampled, summed over its sampled tokens: to be
    subtracted from its reward, times a coefficient. The estimators are those of the loss
    (llm/losses.py kl_estimate)."""
    total = 0.0
    for p, q, is_sampled in zip(logprobs, ref_logprobs, loss_mask, strict=True):
        d = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, q - p))
        if is_sampled:
            total += {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[estimator]
    return total
