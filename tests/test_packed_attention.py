"""Attention over a flat batch: its three paths against each other."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.learner import packed_attention
from mtsql.learner.packed_attention import PackedContext


def flash_attn_varlen_double(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """flash-attn's varlen function as published (>= 2.1: causal aligned at the bottom right), in
    plain torch."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    out = []
    queries_per_key = q.shape[1] // k.shape[1]
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(*cu_seqlens_q[i : i + 2].tolist())
        columns = slice(*cu_seqlens_k[i : i + 2].tolist())
        queries = q[rows]  # (L, heads, D)
        keys = k[columns].repeat_interleave(queries_per_key, dim=1)
        values = v[columns].repeat_interleave(queries_per_key, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        if causal:
            n, m = scores.shape[1:]
            is_seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            scores = scores.masked_fill(~is_seen, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(out)


def spans_of(
    groups: list[tuple[int, list[int]]],
) -> tuple[tuple[tuple[int, int, int, int], ...], int]:
    """Spans of groups (prompt length, sample lengths), laid out as `pack` does; and their number of
    tokens."""
    spans = []
    at = 0
    for prompt_length, sample_lengths in groups:
        prompt = (at, at + prompt_length)
        at += prompt_length
        for length in sample_lengths:
            spans.append((*prompt, at, at + length))
            at += length
    return tuple(spans), at


def test_two_groups_have_the_spans_written_by_hand():
    # P P P a b b Q c
    assert spans_of([(3, [1, 2]), (1, [1])]) == (((0, 3, 3, 4), (0, 3, 4, 6), (6, 7, 7, 8)), 8)


lengths = st.integers(1, 9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([1, 2, 4, 256]),
    st.sampled_from([1, 3, 96]),
    st.sampled_from([1, 2, 5]),
)
def test_the_three_paths_agree_in_values_and_gradients(
    groups, heads, causal_tokens, piece_tokens, num_threads
):
    spans, num_tokens = spans_of(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "CAUSAL_TOKENS", causal_tokens)
        patch.setattr(packed_attention, "PIECE_TOKENS", piece_tokens)
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        patch.setattr(packed_attention, "flash_attn_varlen_func", flash_attn_varlen_double)
        context = PackedContext(spans, torch.device("cpu"))
        by_parts = partial(context.attend, 0)
        plain, *others = (
            values_and_gradients(path, num_tokens, heads)
            for path in (context.attend_rows, context.attend_varlen, by_parts)
        )
    for other in others:
        for got, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def values_and_gradients(
    path: Callable[..., torch.Tensor], num_tokens: int, heads: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """Attention of the same random tensors at each call, and the gradients of the three."""
    torch.manual_seed(num_tokens)
    query, key, value = (
        torch.randn(1, num_heads, num_tokens, 8, dtype=torch.float64, requires_grad=True)
        for num_heads in (heads[0], heads[1], heads[1])
    )
    out = path(query, key, value, 0.3)
    out.backward(torch.randn(out.shape, dtype=torch.float64))
    return out, query.grad, key.grad, value.grad


def test_the_joined_parts_have_the_numerical_gradient():
    spans, num_tokens = spans_of([(3, [2, 4]), (2, [3])])
    context = PackedContext(spans, torch.device("cpu"))
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, h, num_tokens, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(lambda *x: context.attend(0, *x, 0.5), inputs)


def test_parts_with_distant_scores_are_joined_without_overflow():
    """A prompt whose scores lie hundreds above or below a sample's own: no overflow, no NaN."""
    spans, num_tokens = spans_of([(2, [2, 2])])
    context = PackedContext(spans, torch.device("cpu"))
    query = torch.ones(1, 1, num_tokens, 4)
    for sign in (1.0, -1.0):
        key = torch.ones(1, 1, num_tokens, 4)
        key[:, :, :2] *= sign * 300
        value = torch.randn(1, 1, num_tokens, 4)
        got = context.attend(0, query, key, value, 1.0)
        torch.testing.assert_close(got, context.attend_rows(query, key, value, 1.0))
