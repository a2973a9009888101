"""Samples to learn from, packed into flat micro-batches without padding; a group's prompt is stored once.

Legend: T tokens of the flat batch, P trained positions. The shift between a token and the position that predicts it
happens in `_lay_out` and nowhere else: `sources[p]` is the flat index whose hidden state predicts `targets[p]`.
"""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sample:
    """One trajectory for the learner. Everything but `prompt_ids` has one entry per token after the
    prompt.

    `loss_mask` is 1 on tokens the policy sampled, stop id included. `advantages` and `old_logprobs`
    are empty for SFT. Samples with equal prompt ids share the prompt's computation.
    """

    prompt_ids: list[int]
    ids: list[int]
    loss_mask: list[int]
    advantages: list[float] | tuple = ()
    old_logprobs: list[float] | tuple = ()
    ref_logprobs: list[float] | None = None

    def __post_init__(self):
        if not self.prompt_ids:
            raise ValueError(
                "a sample needs a prompt: its first token is predicted from the prompt's last"
            )
        for name in ("loss_mask", "advantages", "old_logprobs", "ref_logprobs"):
            values = getattr(self, name)
            if (values or name == "loss_mask") and len(values) != len(self.ids):
                raise ValueError(f"a sample has {len(self.ids)} ids but {len(values)} {name}")

    @property
    def num_trained(self) -> int:
        """Tokens the loss is taken over."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class Batch:
    """A flat micro-batch.

    ids, position_ids (T,); sources, targets, trajectory, advantages, old_logprobs, ref_logprobs
    (P,); spans: one (prompt start, prompt end, start, end) a sample, in flat indices, for the
    attention. `trajectory` numbers the samples of this batch from 0; `indices[n]` is the place of
    number n in the list packed. num_distinct: len(ids) without prompts that an earlier batch of the
    same packing holds too.
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
    indices: tuple[int, ...]
    num_distinct: int

    @property
    def num_computed(self) -> int:
        """Tokens the forward computes."""
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        )


def pack(samples: list[Sample], max_tokens: int) -> list[Batch]:
    """Pack samples into micro-batches of at most `max_tokens` tokens, prompts counted once where
    they are shared.

    Groups stay together where they fit; a group over the budget is split and its prompt computed
    once in each part. Best fit, longest first, ties in the given order. Samples without a trained
    token are left out. ValueError naming the sample if one with its prompt is over the budget.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.num_trained:
            groups.setdefault(tuple(sample.prompt_ids), []).append(index)
    parts = [part for group in groups.values() for part in _split(samples, group, max_tokens)]
    parts.sort(key=lambda part: _cost(samples, part), reverse=True)
    bins: list[list[list[int]]] = []
    room: list[int] = []
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
    """Tokens computed for samples `part` of one prompt."""
    return len(samples[part[0]].prompt_ids) + sum(len(samples[i].ids) for i in part)


def _split(samples: list[Sample], group: list[int], max_tokens: int) -> list[list[int]]:
    """Cut a group into parts that fit, in order."""
    parts: list[list[int]] = []
    for index in group:
        alone = _cost(samples, [index])
        if alone > max_tokens:
            raise ValueError(
                f"sample {index} has {alone} tokens, more than max_batch_tokens={max_tokens}: raise it"
            )
        if parts and _cost(samples, [*parts[-1], index]) <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _lay_out(samples: list[Sample], parts: list[list[int]], seen: set[tuple[int, ...]]) -> Batch:
    """Flat tensors of one micro-batch. `seen` remembers the prompts of earlier ones, to count
    distinct tokens."""
    ids, positions, sources, targets, trajectory, spans = [], [], [], [], [], []
    advantages, old_logprobs, ref_logprobs = [], [], []
    indices = tuple(index for part in parts for index in part)
    num_repeated, has_ref = 0, all(samples[index].ref_logprobs is not None for index in indices)
    for part in parts:
        prompt = samples[part[0]].prompt_ids
        num_repeated += len(prompt) if tuple(prompt) in seen else 0
        seen.add(tuple(prompt))
        prompt_start, prompt_end = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        for sample in (samples[index] for index in part):
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
        indices=indices,
        num_distinct=len(ids) - num_repeated,
    )
