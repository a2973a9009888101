"""Attention over a flat batch: its paths against each other."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.learner import packed_attention, rows
from mtsql.learner.packed_attention import PackedContext
from mtsql.model.attention_path import AttentionPath

CPU = torch.device("cpu")


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
    deterministic=False,
):
    """flash-attn's varlen function as published (>= 2.1: causal aligned at the bottom right), in
    plain torch."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
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


def varlen_attn_double(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """torch's own function of the same kernel; a window of (-1, 0) is causal."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[2] % 8 == key.shape[2] % 8 == value.shape[2] % 8 == 0
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_double(
        query, key, value, *lengths, 0.0, scale, causal=True, deterministic=deterministic
    )


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
    st.sampled_from([1, 64, 1 << 26]),
)
def test_the_paths_agree_in_values_and_gradients(
    groups, heads, causal_tokens, piece_tokens, num_threads, padded_scores
):
    spans, num_tokens = spans_of(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "CAUSAL_TOKENS", causal_tokens)
        patch.setattr(packed_attention, "PIECE_TOKENS", piece_tokens)
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        patch.setattr(packed_attention, "flash_attn_varlen_func", flash_attn_varlen_double)
        patch.setattr(packed_attention, "varlen_attn", varlen_attn_double)
        patch.setattr(rows, "PADDED_SCORES", padded_scores)
        context = PackedContext(spans, CPU)
        paths = (
            context.attend_rows,
            context.attend_varlen,
            partial(context.attend_varlen, use_flash=False),
            context.attend_padded,
            partial(context.attend, 0),
        )
        plain, *others = (values_and_gradients(path, num_tokens, heads) for path in paths)
    for other in others:
        for got, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_heads_that_torch_can_take_are_not_padded(monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_attn_double)
    monkeypatch.setattr(packed_attention.F, "pad", None)
    x = torch.randn(1, 2, 3, 8)
    context = PackedContext(((0, 2, 2, 3),), CPU)
    out = context.attend_varlen(x, x, x, 0.3, use_flash=False)
    torch.testing.assert_close(out, context.attend_rows(x, x, x, 0.3))


def values_and_gradients(
    path: Callable[..., torch.Tensor], num_tokens: int, heads: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """Attention of the same random tensors at each call, and the gradients of the three."""
    torch.manual_seed(num_tokens)
    query, key, value = (
        torch.randn(1, num_heads, num_tokens, 12, dtype=torch.float64, requires_grad=True)
        for num_heads in (heads[0], heads[1], heads[1])
    )
    out = path(query, key, value, 0.3)
    out.backward(torch.randn(out.shape, dtype=torch.float64))
    return out, query.grad, key.grad, value.grad


def test_the_joined_parts_have_the_numerical_gradient():
    spans, num_tokens = spans_of([(3, [2, 4]), (2, [3])])
    context = PackedContext(spans, CPU)
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, h, num_tokens, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(lambda *x: context.attend(0, *x, 0.5), inputs)


def test_parts_with_distant_scores_are_joined_without_overflow():
    """A prompt whose scores lie hundreds above or below a sample's own: no overflow, no NaN."""
    spans, num_tokens = spans_of([(2, [2, 2])])
    context = PackedContext(spans, CPU)
    query = torch.ones(1, 1, num_tokens, 4)
    for sign in (1.0, -1.0):
        key = torch.ones(1, 1, num_tokens, 4)
        key[:, :, :2] *= sign * 300
        value = torch.randn(1, 1, num_tokens, 4)
        got = context.attend(0, query, key, value, 1.0)
        torch.testing.assert_close(got, context.attend_rows(query, key, value, 1.0))


@pytest.mark.parametrize("learning", ["flash", "varlen", "padded", "parts"])
def test_the_chosen_path_is_taken(learning, monkeypatch):
    """And the result has the dtype of the values, whatever the others have under autocast."""
    taken = []

    def double(name, function):
        def call(*args, **kwargs):
            taken.append(name)
            return function(*args, **kwargs)

        return call

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        packed_attention, "flash_attn_varlen_func", double("flash", flash_attn_varlen_double)
    )
    monkeypatch.setattr(packed_attention, "varlen_attn", double("varlen", varlen_attn_double))
    monkeypatch.setattr(packed_attention.F, "scaled_dot_product_attention", double("padded", sdpa))
    chosen = AttentionPath("visits", learning, "")
    monkeypatch.setattr(packed_attention, "path_for", lambda device, dtype: chosen)
    spans, num_tokens = spans_of([(3, [2, 2]), (2, [2])])
    query = torch.randn(1, 4, num_tokens, 8)
    key, value = torch.randn(2, 1, 2, num_tokens, 8)
    context = PackedContext(spans, CPU)
    got = context.attend(0, query, key, value.bfloat16(), 0.3)
    expected = context.attend_rows(query, key, value, 0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)
    assert set(taken) - {"padded"} == {learning} - {"parts", "padded"}
    # Rows of the same size share a call: here the two samples of the first prompt.
    assert learning != "padded" or taken.count("padded") == 2 + len(context.rows)


def test_flash_attention_is_deterministic_where_torch_shall_be(monkeypatch):
    """The double asserts it."""
    monkeypatch.setattr(packed_attention, "flash_attn_varlen_func", flash_attn_varlen_double)
    spans, num_tokens = spans_of([(3, [2, 2])])
    query, key, value = torch.randn(3, 1, 2, num_tokens, 8)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    PackedContext(spans, CPU).attend_varlen(query, key, value, 0.3)


def test_torch_s_varlen_attention_takes_our_call():
    """The real function, on tensors without data: it runs only on a GPU."""
    spans, num_tokens = spans_of([(3, [2, 4]), (2, [3])])
    context = PackedContext(spans, torch.device("meta"))
    inputs = [
        torch.empty(1, h, num_tokens, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for h in (4, 2, 2)
    ]
    out = context.attend_varlen(*inputs, 0.3, use_flash=False)
    assert out.shape == (1, num_tokens, 4, 8)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)
