"""What is sampled, and from which noise. R rows, V vocabulary.

The noise of a token is a hash of who it is (seed, update, turn, sample, position), not the state of
a generator, so it is the same alone, in any batch, after a preemption and on any rank. So is the
token, unless the noise falls between the roundings of two batches: matmuls of other sizes sum in
another order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NoiseKey = tuple[int, int, int, int]  # seed, update, turn, sample

CPU_ELEMENTS = 1 << 18
"""Logits sampled together on a CPU: their intermediate results then stay in its cache, which is
twice as fast."""
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 40 << 20}
"""Elements of logits computed together. 40 Mi are 256 rows of 152,000 words. With 16-bit logits,
sampling takes 18 bytes for each, 0.75 GB together."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingConfig:
    """How replies are drawn and how long they may get."""

    temperature: float = 1.0
    """Temperature of sampling. 0: the most probable token is taken."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability. 1: from all."""
    top_k: int = 0
    """Sample from this many of the most probable tokens. 0: from all."""
    max_reply_tokens: int = 512
    """Maximum tokens of a reply, its stop token included."""
    max_trajectory_tokens: int = 4096
    """Maximum tokens of a trajectory after its prompt, observations included."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"sampling.temperature must be 0 (greedy) or more, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must be 0 (off) or more, not {self.top_k}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                "sampling.top_p and sampling.top_k have no effect at sampling.temperature 0: "
                "leave them off"
            )
        for name in ("max_reply_tokens", "max_trajectory_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}: it must be at least 1")


def hash_key(key: NoiseKey) -> int:
    """Fold a noise key into 64 bits; every part and its place counts."""
    state = 0
    for part in key:
        mixed_in = ((state ^ (part & _MASK)) + _GOLDEN) & _MASK
        state = int(_mix(np.array([mixed_in], dtype=np.uint64))[0])
    return state


def uniform(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Noise in [0, 1) for each (hashed key, position of the token after the prompt): (R,) float64.

    This is the counter-based generator SplitMix64 (Steele, Lea, Flood 2014) with the key as seed
    and the position as counter.
    """
    counter = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(keys + counter) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 arrays; multiplication wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    """How many rows the head computes logits for, and `sample` draws from, in one go."""
    return max(1, LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cuda"]) // vocab_size)


def sample(logits: Tensor, sampling: SamplingConfig, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id for each row, by inverting the cumulated distribution at the row's noise.

    logits (R, V), noise (R,) in [0, 1) -> ids (R,) and their log-probs (R,) in float32 or better.
    The log-probs are those of the distribution that the ids come from: divided by the temperature,
    truncated and renormalised. For greedy ids, whose distribution is a single point, they are those
    of the model at temperature 1.
    """
    rows_at_once = max(1, CPU_ELEMENTS // logits.shape[-1])
    if logits.device.type == "cpu" and len(logits) > rows_at_once:
        parts = zip(logits.split(rows_at_once), noise.split(rows_at_once), strict=True)
        drawn = [sample(part, sampling, part_noise) for part, part_noise in parts]
        return torch.cat([ids for ids, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        best, ids = logits.max(-1)
        return ids, best - logits.logsumexp(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1:
        logits = _truncate(logits, sampling.top_k, sampling.top_p)
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    # Sums of up to V terms need double precision. A CPU uses it for float32, a GPU if it is asked.
    wide = None if logits.device.type == "cpu" else torch.float64
    mass = (logits - top).exp_().cumsum(-1, dtype=wide)  # (R, V)
    # The drawn token is the first whose cumulated mass exceeds the target, so it has mass of its
    # own. If rounding lifted the target to the whole mass, no token would exceed it.
    whole = mass[:, -1:]
    below = torch.nextafter(whole, torch.zeros_like(whole))
    target = torch.minimum(noise.to(mass.dtype)[:, None] * whole, below)
    ids = torch.searchsorted(mass, target, right=True)  # (R, 1)
    return ids[:, 0], (logits.gather(-1, ids) - top - whole.log().to(logits.dtype))[:, 0]


def _truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the most probable tokens to -inf. Ties with the last one kept are kept too."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the tokens ahead of each
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
