"""Samples to learn from, packed into flat micro-batches without padding; a group's prompt is stored once.

Legend: T tokens of the flat batch, P trained positions, N samples. The shift between a token and the position that
predicts it happens in `_lay_out` and nowhere else: `sources[p]` is the flat index whose hidden state predicts
`targets[p]`.
"""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sample:
    """One trajectory for the learner. Everything but `prompt_ids` has one entry per token after the prompt.

    Samples with equal prompt ids share the prompt's computation. `advantages` is empty for SFT.
    """

    prompt_ids: list[int]
    ids: list[int]
    loss_mask: list[int]
    advantages: list[float] | tuple = ()
    old_logprobs: list[float] | tuple = ()
    ref_logprobs: list[float] | None = None

    def __post_init__(self):
        if not self.prompt_ids:
            raise ValueError("a sample needs a prompt: its first token is predicted from the prompt's last")
        for name in ("loss_mask", "advantages", "old_logprobs", "ref_logprobs"):
            values = getattr(self, name)
            if values and len(values) != len(self.ids):
                raise ValueError(f"a sample has {len(self.ids)} ids but {len(values)} {name}")

    @property
    def num_trained(self) -> int:
        """Tokens the loss is taken over."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class Batch:
    """A flat micro-batch.

    ids, position_ids (T,); sources, targets, trajectory, advantages, old_logprobs, ref_logprobs (P,);
    spans: one (prompt start, prompt end, start, end) a sample, in flat indices, for the attention.
    `trajectory` numbers the samples of this batch from 0 to `num_samples` - 1.
    """

    ids: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    trajectory: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    spans: tuple[tuple[int, int, int, int], ...]
    num_distinct: int

    @property
    def num_computed(self) -> int:
        """Tokens the forward computes."""
        return len(self.ids)

    @property
    def num_samples(self) -> int:
        """Samples in this batch."""
        return len(self.spans)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def pack(samples: list[Sample], max_tokens: int) -> list[Batch]:
    """Pack samples into micro-batches of at most `max_tokens` tokens, prompts counted once where they are shared.

    Groups stay together where they fit; a group over the budget is split and its prompt computed once in each part.
    Best fit, longest first, ties in the given order. Samples without a trained token are left out. ValueError if a
    single sample with its prompt is over the budget.
    """
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        if sample.num_trained:
            groups.setdefault(tuple(sample.prompt_ids), []).append(sample)
    parts = [part for group in groups.values() for part in _split(group, max_tokens)]
    parts.sort(key=_cost, reverse=True)
    bins: list[list[list[Sample]]] = []
    room: list[int] = []
    for part in parts:
        cost = _cost(part)
        fits = [i for i, free in enumerate(room) if free >= cost]
        if fits:
            best = min(fits, key=lambda i: room[i])
            bins[best].append(part)
            room[best] -= cost
        else:
            bins.append([part])
            room.append(max_tokens - cost)
    seen: set[tuple[int, ...]] = set()
    return [_lay_out(parts, seen) for parts in bins]


def _cost(part: list[Sample]) -> int:
    return len(part[0].prompt_ids) + sum(len(s.ids) for s in part)


def _split(group: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut a group into parts that fit, in order."""
    parts: list[list[Sample]] = []
    for sample in group:
        alone = _cost([sample])
        if alone > max_tokens:
            raise ValueError(f"a trajectory of {alone} tokens does not fit max_batch_tokens={max_tokens}: raise it")
        if parts and _cost(parts[-1]) + len(sample.ids) <= max_tokens:
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return parts


def _lay_out(parts: list[list[Sample]], seen: set[tuple[int, ...]]) -> Batch:
    """Flat tensors of one micro-batch. `seen` remembers the prompts of earlier ones, to count distinct tokens."""
    ids, positions, sources, targets, trajectory, spans = [], [], [], [], [], []
    advantages, old_logprobs, ref_logprobs = [], [], []
    num_repeated, has_ref = 0, all(s.ref_logprobs is not None for part in parts for s in part)
    for part in parts:
        prompt = part[0].prompt_ids
        num_repeated += len(prompt) if tuple(prompt) in seen else 0
        seen.add(tuple(prompt))
        prompt_start, prompt_end = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        for sample in part:
            start = len(ids)
            ids += sample.ids
            positions += range(len(prompt), len(prompt) + len(sample.ids))
            for i, is_trained in enumerate(sample.loss_mask):
                if is_trained:
                    sources.append(start + i - 1 if i else prompt_end - 1)
                    targets.append(sample.ids[i])
                    trajectory.append(len(spans))
                    advantages.append(sample.advantages[i] if sample.advantages else 0.0)
                    old_logprobs.append(sample.old_logprobs[i] if sample.old_logprobs else 0.0)
                    ref_logprobs.append(sample.ref_logprobs[i] if has_ref else 0.0)
            spans.append((prompt_start, prompt_end, start, len(ids)))
    return Batch(
        ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        trajectory=torch.tensor(trajectory),
        advantages=torch.tensor(advantages),
        old_logprobs=torch.tensor(old_logprobs),
        ref_logprobs=torch.tensor(ref_logprobs) if has_ref else None,
        spans=tuple(spans),
        num_distinct=len(ids) - num_repeated,
    )
