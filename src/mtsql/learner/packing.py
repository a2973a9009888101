"""Samples to learn from, packed into flat micro-batches without padding. A prompt that samples
share is stored once.

T tokens of the flat batch, P trained positions. The shift between a token and the position that
predicts it happens in `_lay_out` and nowhere else: `sources[p]` is the flat index whose hidden
state predicts `targets[p]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass
class TokenScores:
    """What the learner has computed for the trained tokens of a sample in its newest optimizer
    step: one value for each token after the prompt, 0 where `loss_mask` is 0. Empty if the sample
    was not part of one."""

    ratios: list[float] = field(default_factory=list)
    """exp(log-prob - old log-prob), before any clipping and of each token alone."""
    entropies: list[float] = field(default_factory=list)
    """In nats, of the policy's distribution at the temperature of sampling."""


@dataclass(frozen=True)
class Sample:
    """One trajectory for the learner. Everything but `prompt_ids` has one entry per token after the
    prompt.

    A prompt P, a reply a0 a1 (a1 is its stop id), an observation E, and a second reply a2:

        prompt_ids   P P P
        ids                 a0   a1   E    a2
        loss_mask           1    1    0    1
        advantages          0.5  0.5  0.5  0.5
        old_logprobs       -1.0 -2.0  0.0 -3.0

    `loss_mask` is 1 on tokens the policy sampled, stop id included. What stands at the other tokens
    is ignored. `advantages` and `old_logprobs` are empty for SFT. `sampled_logprobs` are those of
    the engine where `old_logprobs` are recomputed and `loss.tis_cap` needs both. Samples with equal
    prompt ids share the prompt's computation.
    """

    prompt_ids: list[int]
    ids: list[int]
    loss_mask: list[int]
    advantages: Sequence[float] = ()
    old_logprobs: Sequence[float] = ()
    ref_logprobs: list[float] | None = None
    sampled_logprobs: Sequence[float] | None = None
    scores: TokenScores | None = field(default=None, compare=False, repr=False)
    """Where an optimizer step writes what it computes for each token. None: nowhere."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                "a sample needs a prompt: its first token is predicted from the prompt's last"
            )
        per_token = ("loss_mask", "advantages", "old_logprobs", "ref_logprobs", "sampled_logprobs")
        for name in per_token:
            values = getattr(self, name)
            if (values or name == "loss_mask") and len(values) != len(self.ids):
                raise ValueError(f"a sample has {len(self.ids)} ids but {len(values)} {name}")

    @property
    def num_trained(self) -> int:
        """Number of tokens that the loss is taken over."""
        return sum(self.loss_mask)

    def whole_text(self) -> "Sample":
        """The same tokens with a loss on each but the first, for SFT of a model that has not been
        pretrained. ValueError if it has advantages, which belong to sampled tokens only."""
        if self.advantages:
            raise ValueError("a sample with advantages has no loss on its prompt")
        ids = [*self.prompt_ids[1:], *self.ids]
        return Sample(self.prompt_ids[:1], ids, [1] * len(ids))


@dataclass(frozen=True)
class Batch:
    """A flat micro-batch.

    Two samples, a0 a1 E a2 and b0, share the prompt P P P; the observation E is not trained on:

        flat index          0  1  2  3  4  5  6  7
        ids                 P  P  P  a0 a1 E  a2 b0
        position_ids        0  1  2  3  4  5  6  3

        targets             a0 a1 a2 b0
        sources             2  3  5  2
        trajectory_index    0  0  0  1

        spans               (0, 3, 3, 7), (0, 3, 7, 8)
    """

    ids: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (T,) place in the own trajectory, prompt included
    sources: torch.Tensor  # (P,) flat index that predicts the target
    targets: torch.Tensor  # (P,) trained token ids
    trajectory_index: torch.Tensor  # (P,) number of the target's sample in this batch, from 0
    advantages: torch.Tensor  # (P,)
    old_logprobs: torch.Tensor  # (P,)
    ref_logprobs: torch.Tensor | None  # (P,)
    sampled_logprobs: torch.Tensor | None  # (P,)
    spans: tuple[tuple[int, int, int, int], ...]
    """Prompt start, prompt end, start and end of each sample, in flat indices, for attention."""
    indices: tuple[int, ...]
    """Place of each sample of the batch in the list that was packed."""
    num_distinct: int
    """Tokens of the batch without the prompts that an earlier batch of the same packing holds."""

    @property
    def num_computed(self) -> int:
        """Number of tokens that the forward pass computes."""
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        values: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            values[one.name] = _move(value, device) if isinstance(value, torch.Tensor) else value
        return Batch(**values)


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. A GPU copies pinned memory while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(samples: list[Sample], max_tokens: int) -> list[Batch]:
    """Pack samples into micro-batches of at most `max_tokens` tokens. A shared prompt counts once.

    Samples of one prompt stay together if they fit. If not, they are split into parts, and each
    part computes the prompt once. The longest part is placed first, each where it leaves least
    room; ties keep the given order. Samples without a trained token are left out. ValueError naming
    the sample if a sample with its prompt is over `max_tokens`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.num_trained:
            groups.setdefault(tuple(sample.prompt_ids), []).append(index)
    parts: list[list[int]] = []
    for group in groups.values():
        parts += _split(samples, group, max_tokens)
    parts.sort(key=lambda part: _cost(samples, part), reverse=True)
    bins: list[list[list[int]]] = []  # the parts of each micro-batch
    room: list[int] = []  # tokens that are left in each
    for part in parts:
        cost = _cost(samples, part)
        fits = [i for i, free in enumerate(room) if free >= cost]
        if fits:
            best = min(fits, key=lambda i: room[i])
            bins[best].append(part)
            room[best] -= cost
        else:
            bins.append([part])
            room.append(max_tokens - cost)
    seen: set[tuple[int, ...]] = set()
    return [_lay_out(samples, parts, seen) for parts in bins]


def _cost(samples: list[Sample], part: list[int]) -> int:
    """Tokens computed for the samples `part`, which have the same prompt."""
    return len(samples[part[0]].prompt_ids) + sum(len(samples[i].ids) for i in part)


def _split(samples: list[Sample], group: list[int], max_tokens: int) -> list[list[int]]:
    """Split the samples of one prompt, in order, into parts of at most `max_tokens` tokens."""
    parts: list[list[int]] = []
    for index in group:
        alone = _cost(samples, [index])
        if alone > max_tokens:
            raise ValueError(
                f"sample {index} has {alone} tokens, more than max_batch_tokens={max_tokens}: "
                "raise it"
            )
        if parts and _cost(samples, [*parts[-1], index]) <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _lay_out(samples: list[Sample], parts: list[list[int]], seen: set[tuple[int, ...]]) -> Batch:
    """Flat tensors of one micro-batch. `seen` holds the prompts of earlier ones, to count distinct
    tokens; this one's are added."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    sources, targets, trajectory_index = [], [], []
    advantages, old_logprobs, ref_logprobs, sampled_logprobs = [], [], [], []
    indices = tuple(index for part in parts for index in part)
    has_ref = all(samples[index].ref_logprobs is not None for index in indices)
    has_both = all(samples[index].sampled_logprobs is not None for index in indices)
    num_repeated = 0
    for part in parts:
        prompt = samples[part[0]].prompt_ids
        if tuple(prompt) in seen:
            num_repeated += len(prompt)
        seen.add(tuple(prompt))
        prompt_start = len(ids)
        ids += prompt
        prompt_end = len(ids)
        positions += range(len(prompt))
        for index in part:
            sample = samples[index]
            start = len(ids)
            ids += sample.ids
            positions += range(len(prompt), len(prompt) + len(sample.ids))
            for i, is_trained in enumerate(sample.loss_mask):
                if not is_trained:
                    continue
                # The token before predicts this one; before a sample's first stands the prompt.
                sources.append(start + i - 1 if i else prompt_end - 1)
                targets.append(sample.ids[i])
                trajectory_index.append(len(spans))
                advantages.append(sample.advantages[i] if sample.advantages else 0.0)
                old_logprobs.append(sample.old_logprobs[i] if sample.old_logprobs else 0.0)
                ref_logprobs.append(sample.ref_logprobs[i] if sample.ref_logprobs else 0.0)
                if sample.sampled_logprobs is not None:
                    sampled_logprobs.append(sample.sampled_logprobs[i])
            spans.append((prompt_start, prompt_end, start, len(ids)))
    return Batch(
        ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        trajectory_index=torch.tensor(trajectory_index),
        advantages=torch.tensor(advantages),
        old_logprobs=torch.tensor(old_logprobs),
        ref_logprobs=torch.tensor(ref_logprobs) if has_ref else None,
        sampled_logprobs=torch.tensor(sampled_logprobs) if has_both else None,
        spans=tuple(spans),
        indices=indices,
        num_distinct=len(ids) - num_repeated,
    )
