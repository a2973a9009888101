"""Attention of the learner: a flat batch in which samples share their group's prompt.

Legend: T tokens of the flat batch, H query heads, K key and value heads, D head size.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from mtsql.learner.rows import PaddedRows, Row, Span, VarlenRows, padded_rows, varlen_rows
from mtsql.model.attention_path import flash_attn_varlen_func, path_for

CAUSAL_TOKENS = 256
"""The CPU kernel computes whole blocks of 512 keys, masked or not, so longer causal spans are
split."""
PIECE_TOKENS = 96
"""Fewest queries for which a thread of its own is faster."""


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


class PackedContext:
    """Attention over a flat training batch: a sample sees its group's prompt and, causally, its own
    tokens.

        flat batch   P P P a0 a1 b0      a and b are samples of the prompt P
        a1 sees      P P P a0 a1
        b0 sees      P P P       b0

    The prompt is computed once and its gradient is the sum over its samples. No token is padded.
    There are four ways to the same numbers, and `model/attention_path.py` chooses: on a CPU parts
    that are joined by their log-sum-exps (`_JoinedParts`); on a GPU flash-attn or torch's varlen
    attention, with the prompt's keys repeated for each sample; on GPUs and in dtypes that these two
    do not support, rows that are padded to similar lengths.
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
        self._padded: PaddedRows | None = None

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
        path = path_for(query.device, value.dtype).learning
        if path == "parts":
            return _JoinedParts.apply(query, key, value, self.parts, scale).transpose(1, 2)
        if path == "padded":
            return self.attend_padded(query, key, value, scale)
        return self.attend_varlen(query, key, value, scale, use_flash=path == "flash")

    def attend_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        *,
        use_flash: bool = True,
    ) -> torch.Tensor:
        """One call of flash-attn, or of the function that torch made of it. The flat order is
        already that of its queries; a sample's keys are the prompt's and its own, and causal
        masking is aligned at the end of each row."""
        if self._varlen is None:  # the same for all layers
            self._varlen = varlen_rows(self.rows, self.device)
        rows = self._varlen
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        key = key[rows.keys]
        value = value[rows.keys]
        if use_flash:
            out = flash_attn_varlen_func(
                query,
                key,
                value,
                rows.query_edges,
                rows.key_edges,
                rows.longest_queries,
                rows.longest_keys,
                softmax_scale=scale,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        else:
            size = query.shape[-1]
            missing = -size % 8  # torch's function takes head sizes that are multiples of 8
            if missing:
                query, key, value = (F.pad(x, (0, missing)) for x in (query, key, value))
            padded = varlen_attn(
                query,
                key,
                value,
                rows.query_edges,
                rows.key_edges,
                rows.longest_queries,
                rows.longest_keys,
                scale=scale,
                window_size=(-1, 0),  # causal
                enable_gqa=query.shape[1] != key.shape[1],
            )
            assert isinstance(padded, torch.Tensor)  # a tuple only if more is asked for
            out = padded[..., :size]
        return out[None]

    def attend_padded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """A call of torch's attention for each set of rows of similar length."""
        if self._padded is None:  # the same for all layers
            self._padded = padded_rows(self.rows, self.device)
        per_head = query.shape[1] // key.shape[1]
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        outs = []
        for part in self._padded.parts:
            q = query[part.queries]  # (N, queries, H, D)
            k, v = (
                x[part.keys].repeat_interleave(per_head, dim=2).transpose(1, 2)
                for x in (key, value)
            )  # (N, H, keys, D)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=part.is_seen, scale=scale
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))  # (N * queries, H, D)
        return torch.cat(outs)[self._padded.found][None]

    def attend_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One masked call a row: the plain statement of what the others compute, for tests."""
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
