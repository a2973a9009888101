"""Losses over trained positions. Each returns a SUM and a dict of sums.

The caller divides the sum once, by a `denominator` that is summed over all ranks. So any split over
micro-batches, packs or ranks gives the gradient of the whole.

P trained positions of a batch. `ratio` = exp(log-prob now - log-prob at sampling).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from mtsql.choices import KlEstimator, require_choices
from mtsql.learner.packing import Batch, Sample

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to this: exp of larger ones overflows


@dataclass(frozen=True)
class LossConfig:
    """The policy loss; the defaults are GRPO's (paper section 4.5)."""

    objective: Literal["clip", "cispo"] = "clip"
    """clip: PPO's clipped surrogate. cispo: the clipped ratio is only a weight of the log-prob
    (CISPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """token: each token's own ratio. sequence: the geometric mean over its trajectory (GSPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low. 1: it is not clipped below."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high. Larger than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = 3.0
    """If the advantage is negative, the loss is at most this many times -advantage. null: no
    limit."""
    tis_cap: float | None = None
    """Truncated importance sampling (Yao et al. 2025): each token's loss is multiplied by the
    probability that the learner gives it over the engine's at sampling, but at most by this number
    (often 2). It corrects for rollouts in lower precision. It needs old_logprobs=recomputed. null:
    off."""
    kl_coef: float = 0.001
    """Weight of the KL to the reference policy in the loss. 0: off."""
    kl_estimator: KlEstimator = "k3"
    """Estimator of that KL, with d = reference - policy in log-probs. k1: -d. k2: d^2 / 2. k3:
    exp(d) - d - 1 (paper). On the first step k2 has the gradient of KL(policy || reference), k3
    that of KL(reference || policy), and that of k1 is zero on average."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. 0: off."""
    aggregate: Literal["token", "trajectory", "constant"] = "token"
    """token: the mean over all trained tokens of the update. trajectory: the mean over trajectories
    of their token means. constant: the sum over tokens divided by trajectories * constant_length
    (Dr.GRPO)."""
    constant_length: int | None = None
    """Tokens that each trajectory counts as. For aggregate=constant only, else null."""

    def __post_init__(self) -> None:
        require_choices(self, "loss")
        if not 0 < self.clip_low <= 1 or self.clip_high <= 0:
            raise ValueError("loss.clip_low must be above 0 and at most 1, loss.clip_high above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("loss.dual_clip must be above 1, or null")
        if self.dual_clip is not None and self.objective == "cispo":
            raise ValueError(
                "loss.dual_clip has no effect with loss.objective=cispo: set it to null"
            )
        if self.tis_cap is not None and self.tis_cap < 1:
            raise ValueError("loss.tis_cap must be at least 1, or null")
        if self.kl_coef < 0:
            raise ValueError("loss.kl_coef must not be negative")
        if (self.constant_length is not None) != (self.aggregate == "constant"):
            raise ValueError("loss.constant_length and loss.aggregate=constant need each other")
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError("loss.constant_length must be at least 1")


def denominator(samples: list[Sample], config: LossConfig) -> float:
    """What this rank's `samples` add to the one denominator of an optimizer step. Sum it over
    ranks, then divide the loss by it.

    `samples` are all samples of the step, also those without an advantage: `with_gradient` leaves
    them out to save work, not to change the mean. Samples without a trained token do not count.
    """
    if config.aggregate == "token":
        return float(sum(sample.num_trained for sample in samples))
    num_trajectories = sum(sample.num_trained > 0 for sample in samples)
    return float(num_trajectories * (config.constant_length or 1))


def with_gradient(samples: list[Sample], config: LossConfig) -> list[Sample]:
    """The samples that can have a gradient: all of them if a KL or entropy term learns from them,
    else those with an advantage."""
    needs_all = bool(config.kl_coef or config.entropy_coef)
    return [sample for sample in samples if needs_all or any(sample.advantages)]


def store_scores(samples: list[Sample], batches: list[Batch], tokens: list[torch.Tensor]) -> None:
    """Give each sample that has a place for them (`Sample.scores`) the ratios and entropies of its
    tokens. `tokens` has for each of the `batches`, in which the samples were packed, (2, P): the
    differences to the old log-probs, and the entropies."""
    for batch, values in zip(batches, tokens, strict=True):
        differences, entropies = values.clamp(max=MAX_LOG_RATIO).float().cpu()  # (P,), (P,)
        found = zip(differences.exp().tolist(), entropies.tolist(), strict=True)
        for index in batch.indices:
            sample = samples[index]
            pairs = [next(found) if is_trained else (0.0, 0.0) for is_trained in sample.loss_mask]
            if sample.scores is not None:
                sample.scores.ratios = [ratio for ratio, _ in pairs]
                sample.scores.entropies = [entropy for _, entropy in pairs]


def sft_loss(logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy summed over trained tokens. logprobs (P,)."""
    return -logprobs.sum(), {}


def policy_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, batch: Batch, config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy-gradient loss with its KL and entropy terms, as a sum to be divided by
    `denominator` of all samples.

    logprobs, entropy (P,) with gradient. The stats are sums over tokens: tokens clipped on either
    side, ratios beyond a factor of two, ratio, entropy, |log-prob now - at sampling|, and, where
    they are used, KL, weights of truncated importance sampling and tokens whose weight is capped.
    """
    gap = (logprobs - batch.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = gap
    if config.ratio == "sequence":
        # The value is the trajectory's for each of its tokens; the gradient is each token's own, so
        # that advantages may differ by token. With one advantage per trajectory this is GSPO's
        # gradient.
        log_ratio = _trajectory_mean(gap.detach(), batch) + gap - gap.detach()
    ratio = log_ratio.exp()
    advantages = batch.advantages.to(logprobs.dtype)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.objective == "cispo":
        loss = -clipped.detach() * advantages * logprobs
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        if config.dual_clip is not None:
            bounded = torch.minimum(loss, -advantages * config.dual_clip)
            loss = torch.where(advantages < 0, bounded, loss)
    with torch.no_grad():
        is_low = ratio < 1 - config.clip_low
        is_high = ratio > 1 + config.clip_high
        if config.objective == "clip":  # only where the clipped side is the maximum
            is_low = is_low & (advantages < 0)
            is_high = is_high & (advantages > 0)
        stats = {
            "clip_low": is_low.sum(),
            "clip_high": is_high.sum(),
            "ratio": ratio.sum(),
            "ratio_far": ((ratio > 2) | (ratio < 0.5)).sum(),
            "entropy": entropy.sum(),
            "logprob_gap": gap.abs().sum(),
        }
    if config.tis_cap is not None:
        if batch.sampled_logprobs is None:
            raise ValueError(
                "loss.tis_cap is set, but the samples carry no log-probs of the engine"
            )
        gap = (batch.old_logprobs - batch.sampled_logprobs).to(logprobs.dtype)
        ratio = gap.clamp(max=MAX_LOG_RATIO).exp()  # of learner to engine, without a gradient
        weight = ratio.clamp(max=config.tis_cap)  # (P,)
        loss = loss * weight
        stats["tis_weight"] = weight.sum()
        stats["tis_capped"] = (ratio > config.tis_cap).sum()
    if config.kl_coef:
        if batch.ref_logprobs is None:
            raise ValueError("loss.kl_coef is set, but the samples carry no reference log-probs")
        kl = kl_estimate(logprobs, batch.ref_logprobs, config.kl_estimator)
        loss = loss + config.kl_coef * kl
        stats["kl"] = kl.detach().sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    if config.aggregate == "trajectory":
        loss = loss / _trajectory_length(batch).to(loss.dtype)
    return loss.sum(), stats


def kl_estimate(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: KlEstimator
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from one sample (Schulman, 2020). All (P,)."""
    d = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.exp() - d - 1


def _trajectory_length(batch: Batch) -> torch.Tensor:
    """(P,) trained tokens of the trajectory each position belongs to. A trajectory is never split
    over batches."""
    index = batch.trajectory_index
    # bincount would wait for the device, to learn the number of trajectories.
    lengths = index.new_zeros(len(batch.spans)).index_add_(0, index, torch.ones_like(index))
    return lengths[index]


def _trajectory_mean(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(P,) mean of `values` (P,) over the trajectory each position belongs to."""
    sums = values.new_zeros(len(batch.spans)).index_add_(0, batch.trajectory_index, values)
    return sums[batch.trajectory_index] / _trajectory_length(batch).to(values.dtype)
