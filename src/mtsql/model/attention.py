"""The one attention function that generation and training share.

Hugging Face's decoder layers look their attention up by name. We register one function, "mtsql", that hands the
projected and rotated queries, keys and values to a *context*: an object passed down through
`model(..., attention_context=context)` that knows which token may see which. Training passes a `PackedContext`
(segments of a flat batch), generation one of the engine's. Nothing else differs between the two.

Legend: T tokens of the flat batch, H query heads, Hkv key heads, D head width.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

try:  # needs CUDA to build, so it is optional (requirements-gpu.txt)
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

ATTENTION_NAME = "mtsql"
CAUSAL_TOKENS = 256
"""The CPU's kernel computes whole blocks of 512 keys, those a causal mask hides too: a longer span
is cut up."""
PIECE_TOKENS = 96
"""Fewest queries worth a thread of their own."""
Span = tuple[int, int]


class Part(NamedTuple):
    """Queries that see keys. `num` pieces of equal length are computed as a batch, over which and
    over key heads the CPU's kernel spreads its threads: each piece of the queries sees all of
    `keys` or, if causal, itself."""

    queries: Span
    keys: Span
    is_causal: bool
    num: int
    is_first: bool
    """Nothing has been computed for these queries before."""


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    attention_context=None,
    **kwargs,
):
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D), weights None."""
    if attention_context is None:
        raise ValueError(
            "this model was loaded with attention 'mtsql': call it with attention_context=..."
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention uses {name}, which mtsql does not compute")
    if dropout:
        raise ValueError("attention_dropout must be 0: what is trained has to be what was sampled")
    return attention_context.attend(module.layer_idx, query, key, value, scaling), None


def register_attention() -> None:
    """Make "mtsql" known to transformers. No mask function is registered: the context replaces
    masks."""
    AttentionInterface.register(ATTENTION_NAME, _attend)


class PackedContext:
    """Attention over a flat training batch: a sample sees its group's prompt and, causally, its own
    tokens.

    A group's prompt is computed once and the gradient through it is the sum over its samples. No
    token is padded. Three ways to the same numbers: on a CPU in two parts joined by their
    log-sum-exps (`_TwoPart`); on a GPU by flash-attn, the prompt's keys repeated for each sample;
    elsewhere sample by sample.
    """

    def __init__(self, spans: tuple[tuple[int, int, int, int], ...], device: torch.device):
        """spans: (prompt start, prompt end, start, end) of each sample in the flat batch, as `pack`
        lays them out: each prompt is followed by its samples, with nothing between."""
        groups: dict[Span, list[Span]] = {}
        for prompt_start, prompt_end, start, end in spans:
            groups.setdefault((prompt_start, prompt_end), []).append((start, end))
        self.device = device
        self.parts: list[Part] = []  # what `_TwoPart` computes
        self.rows: list[
            tuple[Span, Span]
        ] = []  # queries, keys before them: a row is causal, aligned at its end
        for prompt, samples in groups.items():
            if len(samples) == 1:  # one sequence
                whole = (prompt[0], samples[0][1])
                self.parts += _causal(whole, True)
                self.rows.append((whole, (0, 0)))
                continue
            self.parts += [
                *_causal(prompt, True),
                *_dense((samples[0][0], samples[-1][1]), prompt, True),
            ]
            self.parts += [part for sample in samples for part in _causal(sample, False)]
            self.rows += [(prompt, (0, 0)), *((sample, prompt) for sample in samples)]
        self._varlen = None

    def attend(self, layer_idx, query, key, value, scaling):
        """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = (
            query.to(value.dtype),
            key.to(value.dtype),
        )  # under autocast a query norm may have widened them
        if query.device.type == "cpu":
            return _TwoPart.apply(query, key, value, self.parts, scaling).transpose(1, 2)
        if flash_attn_varlen_func is not None and value.dtype in (torch.bfloat16, torch.float16):
            return self.attend_varlen(query, key, value, scaling)
        return self.attend_rows(query, key, value, scaling)

    def attend_varlen(self, query, key, value, scaling):
        """One flash-attn call. The flat order is already that of its queries; a sample's keys are
        the prompt's and its own, and causal masking is aligned at the end of each row."""
        if self._varlen is None:
            num_q = [end - start for (start, end), _ in self.rows]
            num_k = [(end - start) + (b - a) for (start, end), (a, b) in self.rows]
            seen = torch.cat(
                [torch.arange(*span) for own, past in self.rows for span in (past, own)]
            )
            edges = [
                torch.tensor([0, *n]).cumsum(0).to(self.device, torch.int32) for n in (num_q, num_k)
            ]
            self._varlen = seen.to(self.device), *edges, max(num_q), max(num_k)
        seen, *bounds = self._varlen
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        return flash_attn_varlen_func(
            query, key[seen], value[seen], *bounds, softmax_scale=scaling, causal=True
        )[None]

    def attend_rows(self, query, key, value, scaling):
        """One masked SDPA a row: the plain statement of what the other two compute."""
        out = []
        for (start, end), (a, b) in self.rows:
            mask = torch.ones(
                end - start, b - a + end - start, dtype=torch.bool, device=query.device
            ).tril(b - a)
            keys, values = (
                torch.cat([x[:, :, a:b], x[:, :, start:end]], dim=2) for x in (key, value)
            )
            out.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, start:end],
                    keys,
                    values,
                    attn_mask=mask,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2)


def _causal(span: Span, is_first: bool) -> list[Part]:
    """A span that sees itself causally: equal pieces of at most CAUSAL_TOKENS that see themselves,
    what does not divide evenly, and then what lies before each."""
    first, last = span
    by_thread = min(torch.get_num_threads(), (last - first) // PIECE_TOKENS)
    num = max(1, -(-(last - first) // CAUSAL_TOKENS), by_thread)
    length = (last - first) // num
    edges = [first + i * length for i in range(num + 1)]
    whole = (first, edges[-1])
    parts = [Part(whole, whole, True, num, is_first)] if length else []
    if edges[-1] < last:
        edges.append(last)
        parts.append(Part((edges[-2], last), (edges[-2], last), True, 1, is_first))
    for start, end in zip(edges[1:], edges[2:], strict=False):
        parts += _dense((start, end), (first, start), False)
    return parts


def _dense(queries: Span, keys: Span, is_first: bool) -> list[Part]:
    """Queries that all see all of the keys, in a piece for each thread and what does not divide
    evenly."""
    start, end = queries
    num = max(1, min(torch.get_num_threads(), (end - start) // PIECE_TOKENS))
    middle = end - (end - start) % num
    parts = [Part((start, middle), keys, False, num, is_first)]
    return parts if middle == end else [*parts, Part((middle, end), keys, False, 1, is_first)]


def _cut(x: torch.Tensor, span: Span, num: int) -> torch.Tensor:
    """(1, heads, T, D) -> (num, heads, length of the span / num, D): a view of equal pieces, side
    by side."""
    return x[0, :, span[0] : span[1]].unflatten(1, (num, -1)).transpose(0, 1)


class _TwoPart(torch.autograd.Function):
    """Attention as a list of dense or causal parts, joined by their log-sum-exps.

    Softmax over two sets of keys is the mean of the softmaxes over each, weighted by
    exp(log-sum-exp). For the gradient nothing needs to be taken apart again: a part's own backward,
    given the joined output and the joined log-sum-exp, gives exactly that part's share. These two
    operators are the ones behind torch's SDPA on a CPU; SDPA itself does not hand out the
    log-sum-exp. Nothing is padded, and the prompt's keys are read in place by all its samples.
    """

    @staticmethod
    def forward(ctx, query, key, value, parts, scaling):
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(
            1, 2
        )  # (1, H, T, D)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(*query.shape[:3], 1, dtype=wide)  # (1, H, T, 1)
        for part in parts:
            new, new_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _cut(query, part.queries, part.num),
                *_seen(key, value, part),
                0.0,
                part.is_causal,
                scale=scaling,
            )
            new_lse = new_lse[..., None]
            so_far, lse_so_far = (
                _cut(out, part.queries, part.num),
                _cut(lse, part.queries, part.num),
            )
            if part.is_first:
                so_far.copy_(new)
                lse_so_far.copy_(new_lse)
            else:
                so_far.lerp_(new, torch.sigmoid(new_lse - lse_so_far).to(new.dtype))
                lse_so_far.copy_(torch.logaddexp(lse_so_far, new_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        for part in ctx.parts:
            grad_new, q, new, new_lse = (
                _cut(x, part.queries, part.num) for x in (grad_out, query, out, lse)
            )
            shares = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_new,
                q,
                *_seen(key, value, part),
                new,
                new_lse[..., 0].contiguous(),
                0.0,
                part.is_causal,
                scale=ctx.scaling,
            )
            own = _cut(grad_query, part.queries, part.num)
            own.copy_(shares[0]) if part.is_first else own.add_(shares[0])
            for grad, share in zip((grad_key, grad_value), shares[1:], strict=True):
                if part.is_causal:  # always the first to see these keys
                    _cut(grad, part.keys, part.num).copy_(share)
                else:
                    _cut(grad, part.keys, 1).add_(share.sum(0))
        return grad_query, grad_key, grad_value, None, None


def _seen(key: torch.Tensor, value: torch.Tensor, part: Part) -> list[torch.Tensor]:
    """The part's keys and values, each (num, Hkv, keys, D)."""
    if part.is_causal:
        return [_cut(x, part.keys, part.num) for x in (key, value)]
    return [_cut(x, part.keys, 1).expand(part.num, -1, -1, -1) for x in (key, value)]
