"""Log-prob and entropy at trained positions only, a chunk at a time, recomputed in backward: logits never pile up.

Legend: P trained positions, W hidden width, V vocabulary.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Batch, Sample, pack
from mtsql.model.copies import without_adapters
from mtsql.model.sizes import max_positions

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist at a time, however many positions there are; a little more where that were too
few rows."""
MIN_CHUNK = 128
"""Rows below which a matrix product gets slow."""
PIECE_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Logits that are worked on at a time between the products: on a CPU as many as its cache holds."""


class _HeadLogprobs(torch.autograd.Function):
    """(hidden (P, W), weight (V, W), bias (V,) or None, targets (P,)) -> (log-probs (P,), entropy
    (P,)) of softmax((hidden weight^T + bias) / temperature). Keeps no logits: backward computes
    them again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk):
        logprobs, entropy = [], []
        for rows, goals in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _scaled_logits(rows, weight, bias, temperature)
            num = _piece(logits)
            for z, goal in zip(logits.split(num), goals.split(num), strict=True):
                logp = z.log_softmax(-1)
                logprobs.append(logp.gather(1, goal[:, None])[:, 0])
                entropy.append(_entropy(logp.exp(), logp))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), torch.cat(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, targets = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=wide)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _scaled_logits(hidden[part], weight, bias, ctx.temperature)  # (chunk, V)
            num = _piece(logits)
            pulls = [
                None if g is None else g[part].split(num) for g in (grad_logprobs, grad_entropy)
            ]
            for i, (z, goal) in enumerate(
                zip(logits.split(num), targets[part].split(num), strict=True)
            ):
                _replace_by_gradient(
                    z, goal, *(None if pull is None else pull[i][:, None] for pull in pulls)
                )
            if ctx.temperature != 1:
                logits.div_(ctx.temperature)
            grad = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])  # in place: no second tensor of V x W
            elif grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _scaled_logits(hidden, weight, bias, temperature):
    """(rows, V) in fp32 or wider, whatever the product was computed in."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _piece(logits):
    """Rows worked on at a time."""
    return max(1, PIECE_LOGITS.get(logits.device.type, PIECE_LOGITS["cpu"]) // logits.shape[1])


def _replace_by_gradient(z, goal, grad_logprobs, grad_entropy):
    """Write the loss's gradient over the scaled logits z (rows, V). goal (rows,); the others (rows,
    1) or None.

    d logp[goal] / dz = onehot - p,  d entropy / dz = -p (logp + entropy)."""
    if grad_entropy is None:
        z.copy_(z.softmax(-1)).mul_(-grad_logprobs)
    else:
        logp = z.log_softmax(-1)
        torch.exp(logp, out=z)
        pull = logp.add_(_entropy(z, logp)[:, None]).mul_(grad_entropy)
        z.mul_((pull if grad_logprobs is None else pull.add_(grad_logprobs)).neg_())
    if grad_logprobs is not None:
        z.scatter_add_(1, goal[:, None], grad_logprobs)


def _entropy(probs, logp):
    return -torch.linalg.vecdot(probs, logp)


def head_logprobs(hidden, weight, bias, targets, temperature=1.0, chunk=None):
    """Log-prob of `targets` (P,) and entropy at each row of `hidden` (P, W), under a head of
    `weight` (V, W) and `bias` (V,) or None; both (P,), in fp32 or wider, differentiable in hidden,
    weight and bias.

    `chunk` rows of logits exist at a time (default: by CHUNK_LOGITS). Under autocast the product is
    taken in its type.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden, weight, bias = (
        hidden.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    chunk = chunk or max(MIN_CHUNK, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // len(weight))
    with torch.autocast(
        device, enabled=False
    ):  # backward recomputes outside autocast: both have to agree
        return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


class PolicyModule(nn.Module):
    """The policy as the learner calls it: a batch in, log-probs and entropy at its trained
    positions out.

    The whole computation lies inside `forward`, so wrappers (DDP, FSDP) see every use of a
    parameter. `temperature` is the one sampling used: what is scored is what was sampled.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature

    @property
    def _no_split_modules(self) -> list[str]:
        """The layer classes Accelerate shards one by one; it asks the module it is given."""
        return list(getattr(self.model, "_no_split_modules", None) or [])

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

    This is where `ref_logprobs` come from (adapters off, or a frozen copy), and `old_logprobs` for
    several passes.
    """
    scores = [[0.0] * len(sample.ids) for sample in samples]
    for batch in pack(samples, max_tokens):
        logprobs = iter(module(batch.to(device))[0].tolist())
        for index in batch.indices:
            for i, is_trained in enumerate(samples[index].loss_mask):
                if is_trained:
                    scores[index][i] = next(logprobs)
    return scores
