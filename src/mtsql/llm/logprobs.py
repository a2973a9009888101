"""Log-prob and entropy at trained positions only, a chunk at a time, recomputed in backward: logits never pile up.

Legend: P trained positions, W hidden width, V vocabulary.
"""

import torch
from torch import nn

from mtsql.llm.attention import PackedContext
from mtsql.llm.packing import Batch

CHUNK = 1024


class _TokenLogprobs(torch.autograd.Function):
    """(hidden (P, W), weight (V, W), targets (P,)) -> (log-probs (P,), entropy (P,)) of softmax(hidden weight^T / t).

    Peak extra memory is one chunk of logits, in forward and in backward, whatever P is.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, entropy = [], []
        for rows, goal in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp = _log_softmax(rows, weight, temperature)
            logprobs.append(logp.gather(1, goal[:, None])[:, 0])
            entropy.append(-(logp.exp() * logp).sum(1))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(logprobs), torch.cat(entropy)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logp = _log_softmax(hidden[part], weight, ctx.temperature)
            probs = logp.exp()
            # d logp[target] / d z = onehot - p ;  d entropy / d z_v = -p_v (logp_v + entropy)
            entropy = -(probs * logp).sum(1, keepdim=True)
            grad = -probs * (grad_logprobs[part, None] + grad_entropy[part, None] * (logp + entropy))
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None].to(grad.dtype))
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _log_softmax(hidden, weight, temperature):
    logits = hidden @ weight.t()
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def head_logprobs(hidden, weight, targets, temperature=1.0, chunk=CHUNK):
    """Log-prob of `targets` and entropy at each row of `hidden` (P, W) under a head `weight` (V, W); both (P,), fp32 or
    wider. Differentiable in hidden and weight."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)


class PolicyModule(nn.Module):
    """The policy as the learner calls it: a batch in, log-probs and entropy at its trained positions out.

    The whole computation lies inside `forward`, so wrappers (DDP, FSDP) see every use of a parameter. `temperature` is
    the one sampling used: what is scored is what was sampled.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs (P,), entropy (P,)) of `batch`."""
        return token_logprobs(self.model, batch, self.temperature)


def token_logprobs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs (P,), entropy (P,)) at the trained positions of `batch`, at the sampling temperature."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the output head {type(head).__name__} is not a plain linear layer without bias")
    hidden = causal_lm.get_decoder()(
        input_ids=batch.ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        attention_context=PackedContext(batch.spans, batch.ids.device),
    ).last_hidden_state[0]  # (T, W)
    return head_logprobs(hidden[batch.sources], head.weight, batch.targets, temperature)
