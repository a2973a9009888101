"""Attention of the learner: a flat batch in which samples share their group's prompt.

Legend: T tokens of the flat batch, H query heads, K key and value heads, D head size.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

try:  # needs CUDA to build, so it is optional (requirements-gpu.txt)
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

CAUSAL_TOKENS = 256
"""The CPU kernel computes whole blocks of 512 keys, masked or not, so longer causal spans are
split."""
PIECE_TOKENS = 96
"""Fewest queries for which a thread of its own is faster."""
Span = tuple[int, int]
"""First token and the token after the last, in the flat batch."""


class Part(NamedTuple):
    """Queries that see keys, as one call of the CPU kernel.

    The queries are cut into `num` pieces of equal length, and the pieces are the kernel's batch:
    it spreads batch and heads over its threads. If `is_causal`, `keys` equals `queries` and each
    piece sees itself causally; otherwise each piece sees all of `keys`.
    """

    queries: Span
    keys: Span
    is_causal: bool
    num: int
    is_first: bool
    """No other part has been computed for these queries before."""


class Row(NamedTuple):
    """Queries that see each other causally, and all of the keys `before` them."""

    queries: Span
    before: Span


class VarlenRows(NamedTuple):
    """What flash-attn's varlen function wants to know about the rows."""

    keys: torch.Tensor
    """Flat indices of each row's keys, one row after the other."""
    query_edges: torch.Tensor
    key_edges: torch.Tensor
    longest_queries: int
    longest_keys: int


class PackedContext:
    """Attention over a flat training batch: a sample sees its group's prompt and, causally, its own
    tokens.

        flat batch   P P P a0 a1 b0      a and b are samples of the prompt P
        a1 sees      P P P a0 a1
        b0 sees      P P P       b0

    The prompt is computed once and its gradient is the sum over its samples. No token is padded.
    There are three ways to the same numbers: on a CPU parts that are joined by their log-sum-exps
    (`_JoinedParts`); on a GPU flash-attn, with the prompt's keys repeated for each sample;
    elsewhere one row after the other.
    """

    def __init__(self, spans: tuple[tuple[int, int, int, int], ...], device: torch.device) -> None:
        """`spans`: (prompt start, prompt end, start, end) of each sample in the flat batch, as
        `pack` lays them out: each prompt is followed by its samples, with nothing between."""
        groups: dict[Span, list[Span]] = {}
        for prompt_start, prompt_end, start, end in spans:
            groups.setdefault((prompt_start, prompt_end), []).append((start, end))
        self.device = device
        self.parts: list[Part] = []
        self.rows: list[Row] = []
        for prompt, samples in groups.items():
            if len(samples) == 1:  # prompt and sample are one sequence
                whole = (prompt[0], samples[0][1])
                self.parts += _causal(whole, is_first=True)
                self.rows.append(Row(whole, before=(0, 0)))
                continue
            all_samples = (samples[0][0], samples[-1][1])
            self.parts += _causal(prompt, is_first=True)
            self.parts += _dense(all_samples, prompt, is_first=True)
            self.rows.append(Row(prompt, before=(0, 0)))
            for sample in samples:
                self.parts += _causal(sample, is_first=False)
                self.rows.append(Row(sample, before=prompt))
        self._varlen: VarlenRows | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionContext`; the layer makes no difference here."""
        query = query.to(value.dtype)
        key = key.to(value.dtype)
        if query.device.type == "cpu":
            return _JoinedParts.apply(query, key, value, self.parts, scale).transpose(1, 2)
        if flash_attn_varlen_func is not None and value.dtype in (torch.bfloat16, torch.float16):
            return self.attend_varlen(query, key, value, scale)
        return self.attend_rows(query, key, value, scale)

    def attend_varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One call of flash-attn. The flat order is already that of its queries; a sample's keys
        are the prompt's and its own, and causal masking is aligned at the end of each row."""
        if self._varlen is None:  # the same for all layers
            self._varlen = self._varlen_rows()
        rows = self._varlen
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        out = flash_attn_varlen_func(
            query,
            key[rows.keys],
            value[rows.keys],
            rows.query_edges,
            rows.key_edges,
            rows.longest_queries,
            rows.longest_keys,
            softmax_scale=scale,
            causal=True,
        )
        return out[None]

    def _varlen_rows(self) -> VarlenRows:
        keys, num_queries, num_keys = [], [], []
        for row in self.rows:
            own = torch.arange(*row.queries)
            before = torch.arange(*row.before)
            keys += [before, own]
            num_queries.append(len(own))
            num_keys.append(len(before) + len(own))
        return VarlenRows(
            torch.cat(keys).to(self.device),
            torch.tensor([0, *num_queries]).cumsum(0).to(self.device, torch.int32),
            torch.tensor([0, *num_keys]).cumsum(0).to(self.device, torch.int32),
            max(num_queries),
            max(num_keys),
        )

    def attend_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One masked SDPA a row: the plain statement of what the other two compute."""
        out = []
        for (start, end), (first, last) in self.rows:
            num_before = last - first
            mask = torch.ones(
                end - start, num_before + end - start, dtype=torch.bool, device=query.device
            )
            mask = mask.tril(num_before)
            keys = torch.cat([key[:, :, first:last], key[:, :, start:end]], dim=2)
            values = torch.cat([value[:, :, first:last], value[:, :, start:end]], dim=2)
            out.append(
                F.scaled_dot_product_attention(
                    query[:, :, start:end],
                    keys,
                    values,
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2)


def _causal(span: Span, is_first: bool) -> list[Part]:
    r"""A span that sees itself causally: pieces of equal length, at most CAUSAL_TOKENS, that see
    themselves; a shorter last piece; and what lies before each piece.

        keys ->   1 2 3 r
        piece 1   \ . . .     \ causal, one part for all pieces of equal length
        piece 2   # \ . .     # dense, one part a piece
        piece 3   # # \ .     r the remainder: fewer tokens than a piece
        rest r    # # # \
    """
    first, last = span
    pieces_by_thread = min(torch.get_num_threads(), (last - first) // PIECE_TOKENS)
    pieces_by_length = -(-(last - first) // CAUSAL_TOKENS)
    num = max(1, pieces_by_length, pieces_by_thread)
    length = (last - first) // num
    edges = [first + i * length for i in range(num + 1)]
    parts = []
    if length:
        whole = (first, edges[-1])
        parts.append(Part(whole, whole, True, num, is_first))
    if edges[-1] < last:
        rest = (edges[-1], last)
        edges.append(last)
        parts.append(Part(rest, rest, True, 1, is_first))
    for start, end in zip(edges[1:], edges[2:], strict=False):
        parts += _dense((start, end), (first, start), False)
    return parts


def _dense(queries: Span, keys: Span, is_first: bool) -> list[Part]:
    """Queries that all see all of the keys: a piece for each thread, and the remainder."""
    start, end = queries
    num = max(1, min(torch.get_num_threads(), (end - start) // PIECE_TOKENS))
    middle = end - (end - start) % num
    parts = [Part((start, middle), keys, False, num, is_first)]
    if middle < end:
        parts.append(Part((middle, end), keys, False, 1, is_first))
    return parts


def _pieces(x: torch.Tensor, span: Span, num: int) -> torch.Tensor:
    """(1, heads, T, D) -> (num, heads, length of the span / num, D): a view of equal pieces, side
    by side."""
    return x[0, :, span[0] : span[1]].unflatten(1, (num, -1)).transpose(0, 1)


def _seen(key: torch.Tensor, value: torch.Tensor, part: Part) -> list[torch.Tensor]:
    """The part's keys and values, each (num, K, keys, D)."""
    if part.is_causal:
        return [_pieces(x, part.keys, part.num) for x in (key, value)]
    return [_pieces(x, part.keys, 1).expand(part.num, -1, -1, -1) for x in (key, value)]


class _JoinedParts(torch.autograd.Function):
    """Attention as a list of dense or causal parts, joined by their log-sum-exps.

    Softmax over two sets of keys is the mean of the softmaxes over each, weighted by
    exp(log-sum-exp). The gradient needs no such decomposition: a part's own backward, given the
    joined output and the joined log-sum-exp, gives exactly that part's share. The two operators
    are the ones behind torch's SDPA on a CPU; SDPA itself does not return the log-sum-exp. Nothing
    is padded, and all samples read the prompt's keys in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: list[Part],
        scale: float,
    ) -> torch.Tensor:
        _, num_heads, num_tokens, size = query.shape
        out = query.new_empty(1, num_tokens, num_heads, size).transpose(1, 2)  # (1, H, T, D)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(1, num_heads, num_tokens, 1, dtype=wide)  # log-sum-exps
        for part in parts:
            new, new_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _pieces(query, part.queries, part.num),
                *_seen(key, value, part),
                0.0,
                part.is_causal,
                scale=scale,
            )
            new_lse = new_lse[..., None]
            so_far = _pieces(out, part.queries, part.num)
            lse_so_far = _pieces(lse, part.queries, part.num)
            if part.is_first:
                so_far.copy_(new)
                lse_so_far.copy_(new_lse)
            else:
                weight_of_new = torch.sigmoid(new_lse - lse_so_far)
                so_far.lerp_(new, weight_of_new.to(new.dtype))
                lse_so_far.copy_(torch.logaddexp(lse_so_far, new_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts = parts
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        dtype = query.dtype
        if dtype == torch.bfloat16:  # up to 5 times as slow as float32 for short spans
            tensors = (grad_out, query, key, value, out)
            grad_out, query, key, value, out = (tensor.float() for tensor in tensors)
        grad_query = torch.empty_like(query)
        grad_key = torch.empty_like(key)
        grad_value = torch.empty_like(value)
        for part in ctx.parts:
            queries = part.queries, part.num
            new_lse = _pieces(lse, *queries)[..., 0].contiguous()
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            of_query, of_key, of_value = backward(
                _pieces(grad_out, *queries),
                _pieces(query, *queries),
                *_seen(key, value, part),
                _pieces(out, *queries),
                new_lse,
                0.0,
                part.is_causal,
                scale=ctx.scale,
            )
            own = _pieces(grad_query, *queries)
            if part.is_first:
                own.copy_(of_query)
            else:
                own.add_(of_query)
            for grad, share in ((grad_key, of_key), (grad_value, of_value)):
                if part.is_causal:  # a causal part is always the first to see its keys
                    _pieces(grad, part.keys, part.num).copy_(share)
                else:
                    _pieces(grad, part.keys, 1).add_(share.sum(0))
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None
