"""Losses over trained positions. Each returns a SUM and a dict of sums; the caller divides once (design rule 6).

Legend: P trained positions of a batch. `ratio` = exp(log-prob now - log-prob at sampling).
"""

from dataclasses import dataclass

import torch

from mtsql.llm.packing import Batch

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class LossConfig:
    """GRPO's loss (paper section 4.5)."""

    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """... and above 1 + clip_high (DAPO's clip-higher: larger than clip_low)."""
    dual_clip: float | None = 3.0
    """For negative advantages the loss is at most this many times -advantage. None: off."""
    kl_coef: float = 0.001
    """Weight of the KL to the reference policy in the loss; 0 needs no reference."""
    kl_estimator: str = "k3"
    """k1: log ratio; k2: half its square; k3: exp(d) - d - 1 with d = reference - policy (paper)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self):
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError("loss.clip_low must be in (0, 1) and loss.clip_high above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("loss.dual_clip must be above 1, or null")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"loss.kl_estimator must be one of {', '.join(KL_ESTIMATORS)}")
        if self.kl_coef < 0:
            raise ValueError("loss.kl_coef must not be negative")


def sft_loss(logprobs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy summed over trained tokens. logprobs (P,)."""
    return -logprobs.sum(), {}


def policy_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, batch: Batch, config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss summed over trained tokens, with optional KL and entropy terms.

    logprobs, entropy (P,) with gradient. The stats are sums over tokens: clipped shares on either side, KL, entropy,
    the absolute gap between sampling and scoring, and the ratio.
    """
    gap = logprobs - batch.old_logprobs
    ratio = gap.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(loss, -batch.advantages * config.dual_clip)
        loss = torch.where(batch.advantages < 0, bounded, loss)
    with torch.no_grad():
        stats = {
            "clip_low": ((ratio < 1 - config.clip_low) & (batch.advantages < 0)).sum(),
            "clip_high": ((ratio > 1 + config.clip_high) & (batch.advantages > 0)).sum(),
            "entropy": entropy.sum(),
            "logprob_gap": gap.abs().sum(),
            "ratio": ratio.sum(),
        }
    if config.kl_coef:
        if batch.ref_logprobs is None:
            raise ValueError("loss.kl_coef is set, but the samples carry no reference log-probs")
        kl = kl_estimate(logprobs, batch.ref_logprobs, config.kl_estimator)
        loss = loss + config.kl_coef * kl
        stats["kl"] = kl.detach().sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    return loss.sum(), stats


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from one sample. All (P,)."""
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else d.exp() - d - 1
