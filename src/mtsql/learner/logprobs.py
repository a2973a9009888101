"""Log-prob and entropy at the trained positions only. Logits exist for one chunk of positions at a
time and are computed again in backward.

Legend: P trained positions, W hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Batch, Sample, pack
from mtsql.model.copies import without_adapters
from mtsql.model.sizes import max_positions

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Number of logits that exist at a time, unless MIN_CHUNK asks for more."""
HALF_CHUNK_LOGITS = 2**25
"""The same on a CPU for logits of two bytes, which take no more memory: of those in float32 only a
piece exists."""
MIN_CHUNK = 128
"""Rows below which a matmul gets slow."""
PIECE_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Number of logits that the softmax works on at a time: on a CPU as many as its cache holds."""


class PolicyModule(nn.Module):
    """The policy as the learner calls it: it takes a batch and returns log-probs and entropy at its
    trained positions.

    The whole computation is inside `forward`, so wrappers (DDP, FSDP) see every use of a parameter.
    `temperature` is that of sampling: the learner scores what was sampled.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP2 shards one by one. Accelerate asks the module that it is given."""
        return without_adapters(self.model)._no_split_modules

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs (P,), entropy (P,)) of `batch`."""
        return token_logprobs(self.model, batch, self.temperature)


def token_logprobs(
    model: nn.Module, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs (P,), entropy (P,)) at the trained positions of `batch`, at the sampling
    temperature. `model` is a `CausalLM`, or peft's wrapper of one.

    ValueError for an adapted head, and for a sample longer than the model's positions.
    """
    causal_lm = without_adapters(model)
    head = causal_lm.lm_head
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the output head is a {type(head).__name__}, not a plain linear layer: leave it "
            "unadapted"
        )
    _require_positions(batch, max_positions(causal_lm.config))
    context = PackedContext(batch.spans, batch.ids.device)
    hidden = causal_lm.model(batch.ids, batch.position_ids, context, batch.sources)  # (P, W)
    return head_logprobs(hidden, head.weight, head.bias, batch.targets, temperature)


def _require_positions(batch: Batch, positions: int | None) -> None:
    lengths = [
        (prompt_end - prompt_start) + (end - start)
        for prompt_start, prompt_end, start, end in batch.spans
    ]
    longest = max(lengths, default=0)
    if positions is not None and longest > positions:
        raise ValueError(
            f"a sample of {longest} tokens, its prompt included, is longer than the model's "
            f"{positions} positions (max_position_embeddings): lower max_prompt_tokens or "
            "sampling.max_trajectory_tokens"
        )


@torch.no_grad()
def score(
    module: nn.Module, samples: list[Sample], max_tokens: int, device: torch.device
) -> list[list[float]]:
    """Log-probs of each sample under `module` (a PolicyModule), one per token of its ids, 0 where
    the mask is 0.

    The learner computes `ref_logprobs` with it (adapters off, or a frozen copy), and `old_logprobs`
    if an update has several passes.
    """
    scores = [[0.0] * len(sample.ids) for sample in samples]
    for batch in pack(samples, max_tokens):
        logprobs, _ = module(batch.to(device))
        remaining = iter(logprobs.tolist())  # those of all samples of the batch, one after another
        for index in batch.indices:
            for position, is_trained in enumerate(samples[index].loss_mask):
                if is_trained:
                    scores[index][position] = next(remaining)
    return scores


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `targets` (P,) and entropy at each row of `hidden` (P, W), under a head of
    `weight` (V, W) and `bias` (V,) or None. Both are (P,), in fp32 or wider, and differentiable in
    hidden, weight and bias.

    `chunk` rows of logits exist at a time (default: by CHUNK_LOGITS). Under autocast the matmul is
    computed in its type.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden = hidden.to(dtype)
    if chunk is None:
        limit = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"])
        if device == "cpu" and dtype.itemsize == 2:
            limit = HALF_CHUNK_LOGITS
        chunk = max(MIN_CHUNK, limit // len(weight))
    # Backward recomputes the logits outside autocast, so forward must compute them without it too.
    with torch.autocast(device, enabled=False):
        return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


class _HeadLogprobs(torch.autograd.Function):
    """(hidden (P, W), weight (V, W), bias (V,) or None, targets (P,)) -> (log-probs (P,), entropy
    (P,)) of softmax((hidden weight^T + bias) / temperature). Keeps no logits: backward computes
    them again.

    Matmuls are computed in the type of `hidden`, and the gradient of the weight is summed in fp32
    or wider: it is rounded to the type of the weight only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        logprobs = []
        entropy = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[part], weight, bias)  # (chunk, V)
            for rows in _pieces(logits):
                logp = _scaled(logits[rows], temperature).log_softmax(-1)
                logprobs.append(logp.gather(1, targets[part][rows, None])[:, 0])
                entropy.append(_entropy(logp.exp(), logp))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), torch.cat(entropy)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = nn.functional.linear(hidden[part], weight, bias)  # (chunk, V): logits at first
            for rows in _pieces(grad):
                z = _scaled(grad[rows], ctx.temperature)
                _replace_by_gradient(
                    z,
                    targets[part][rows],
                    None if grad_logprobs is None else grad_logprobs[part][rows, None],
                    None if grad_entropy is None else grad_entropy[part][rows, None],
                )
                if ctx.temperature != 1:
                    z.div_(ctx.temperature)
                if z.dtype != grad.dtype:  # otherwise z is a view
                    grad[rows].copy_(z)
            if of_hidden is not None:
                of_hidden[part] = grad @ weight
            if of_weight is not None and of_weight.dtype == grad.dtype:
                of_weight.addmm_(grad.t(), hidden[part])  # in place: no second tensor of V x W
            elif of_weight is not None:
                of_weight += grad.t() @ hidden[part]
            if of_bias is not None:
                of_bias += grad.sum(0)
        if of_weight is not None:
            of_weight = of_weight.to(ctx.weight_dtype)
        if of_bias is not None:
            of_bias = of_bias.to(ctx.bias_dtype)
        return of_hidden, of_weight, of_bias, None, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (rows, V) / temperature in fp32 or wider. They are overwritten if they have that type
    already."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _pieces(logits: torch.Tensor) -> list[slice]:
    """Slices of the rows of logits (rows, V), each of at most PIECE_LOGITS logits."""
    limit = PIECE_LOGITS.get(logits.device.type, PIECE_LOGITS["cpu"])
    num = max(1, limit // logits.shape[1])
    return [slice(start, start + num) for start in range(0, len(logits), num)]


def _replace_by_gradient(
    z: torch.Tensor,
    targets: torch.Tensor,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Overwrite the scaled logits z (rows, V) by the loss's gradient with respect to them. targets
    (rows,); the two others (rows, 1).

    d logp[target] / dz = onehot - p,  d entropy / dz = -p (logp + entropy)."""
    if grad_entropy is not None:
        logp = z.log_softmax(-1)
        torch.exp(logp, out=z)
        pull = logp.add_(_entropy(z, logp)[:, None]).mul_(grad_entropy)
        if grad_logprobs is not None:
            pull = pull.add_(grad_logprobs)
        z.mul_(pull.neg_())
    elif grad_logprobs is not None:
        z.copy_(z.softmax(-1)).mul_(-grad_logprobs)
    else:
        z.zero_()
    if grad_logprobs is not None:
        z.scatter_add_(1, targets[:, None], grad_logprobs)


def _entropy(probs: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    return -torch.linalg.vecdot(probs, logp)
