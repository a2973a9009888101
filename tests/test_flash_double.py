"""The double of flash-attn computes attention, and refuses what flash-attn refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import flash_double
from helpers.flash_double import (
    STRICT,
    FlashError,
    attend_causally,
    flash_attn_varlen_func,
    record,
    replace_flash_attn,
)
from helpers.pretended_gpu import DEVICE, pretended_gpu

BF16 = torch.bfloat16


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed_call(**changes: Any) -> dict[str, Any]:
    """A correct call for two sequences: 2 queries of 3 keys, 1 query of 2 keys."""
    q, k, v = (torch.randn(n, heads, 8, dtype=BF16) for n, heads in ((3, 4), (5, 2), (5, 2)))
    call = dict(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=int32(0, 2, 3),
        cu_seqlens_k=int32(0, 3, 5),
        max_seqlen_q=2,
        max_seqlen_k=3,
        causal=True,
    )
    return call | changes


def paged_call(**changes: Any) -> dict[str, Any]:
    """The same sequences in a cache of four blocks."""
    k, v = (torch.randn(4, 256, 2, 8, dtype=BF16) for _ in range(2))
    table = torch.tensor([[2, 9], [0, -1]], dtype=torch.int32)  # the second entries are not read
    return packed_call(k=k, v=v, block_table=table) | changes


def strict(call: dict[str, Any]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        replace_flash_attn(patch, STRICT)
        return flash_attn_varlen_func(**call)


def test_the_correct_calls_are_accepted():
    assert strict(packed_call()).shape == strict(paged_call()).shape == (3, 4, 8)
    assert flash_double.rules is STRICT


wide = torch.randn(3, 4, 264, dtype=BF16)
odd = torch.randn(3, 4, 12, dtype=BF16)
REFUSED = {
    "only fp16 and bf16": packed_call(q=torch.randn(3, 4, 8)),
    "the same dtype": packed_call(v=torch.randn(5, 2, 8, dtype=torch.float16)),
    "contiguous last": packed_call(q=torch.randn(3, 8, 4, dtype=BF16).transpose(1, 2)),
    "one shape": packed_call(v=torch.randn(4, 2, 8, dtype=BF16)),
    "is above 256": packed_call(q=wide, k=wide[:, :2], v=wide[:, :2]),
    "no multiple of 8": packed_call(q=odd, k=odd[:, :2], v=odd[:, :2]),
    "divide the query heads": packed_call(q=torch.randn(3, 3, 8, dtype=BF16)),
    "cu_seqlens_q must be int32": packed_call(cu_seqlens_q=torch.tensor([0, 2, 3])),
    "cu_seqlens_k must be int32": packed_call(cu_seqlens_k=torch.tensor([0, 3, 5])),
    "cu_seqlens_k must have a contiguous": packed_call(cu_seqlens_k=int32(0, 1, 3, 4, 5, 5)[::2]),
    "there must be a sequence": packed_call(cu_seqlens_q=int32(0), cu_seqlens_k=int32(0)),
    "differ in size": packed_call(cu_seqlens_k=int32(0, 5)),
    "must be Python integers": packed_call(max_seqlen_k=torch.tensor(3)),
    "each sequence needs a query": packed_call(max_seqlen_q=1),
    "keys without a block table": paged_call(block_table=None),
    "begin with 0": packed_call(cu_seqlens_q=int32(1, 2, 3)),
    "must not fall": packed_call(cu_seqlens_q=int32(0, 4, 3), max_seqlen_q=4),
    "cu_seqlens_q ends at 2": packed_call(cu_seqlens_q=int32(0, 1, 2)),
    "cu_seqlens_k ends at 4": packed_call(cu_seqlens_k=int32(0, 3, 4)),
    "cu_seqlens_q is longer": packed_call(cu_seqlens_q=int32(0, 0, 3)),
    "cu_seqlens_k is longer": packed_call(max_seqlen_k=2),
    "block_table must be int32": paged_call(block_table=torch.zeros(2, 1, dtype=torch.int64)),
    "a row for each of 2": paged_call(block_table=torch.zeros(3, 1, dtype=torch.int32)),
    "block_table must have a contig": paged_call(block_table=int32(0, 1, 2, 3).view(2, 2).t()),
    "multiple of 256": paged_call(**dict.fromkeys("kv", torch.zeros(4, 32, 2, 8, dtype=BF16))),
    "not among 4": paged_call(block_table=int32(4, 0).view(2, 1)),
    "cannot hold 300 keys": paged_call(
        block_table=int32(0, 1).view(2, 1), cu_seqlens_k=int32(0, 300, 302), max_seqlen_k=300
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_calls_are_refused(words):
    with pytest.raises(FlashError, match=words):
        strict(REFUSED[words])


@pytest.mark.parametrize("name", ["q", "v", "cu_seqlens_q", "cu_seqlens_k", "block_table"])
def test_a_tensor_on_another_device_is_refused(name):
    with pretended_gpu():
        call = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in paged_call().items()}
        assert strict(call).device == DEVICE
        with pytest.raises(FlashError, match="must be on"):
            strict(call | {name: paged_call()[name]})


def test_a_paged_call_computes_what_attention_over_each_sequence_gives(monkeypatch):
    replace_flash_attn(monkeypatch)  # float64
    call = paged_call()
    call |= {name: call[name].double() for name in "qkv"}
    out = flash_attn_varlen_func(**call)
    for queries, block, length in ((slice(0, 2), 2, 3), (slice(2, 3), 0, 2)):
        keys, values = call["k"][block, :length], call["v"][block, :length]
        expected = attend_causally(call["q"][queries], keys, values, 8**-0.5)
        torch.testing.assert_close(out[queries], expected)


def test_a_packed_call_has_the_numerical_gradient(monkeypatch):
    replace_flash_attn(monkeypatch)
    call = packed_call()
    inputs = [call.pop(name).double().requires_grad_() for name in "qkv"]
    assert torch.autograd.gradcheck(lambda *x: flash_attn_varlen_func(*x, **call), inputs)


def test_a_paged_call_has_no_backward_pass():
    call = paged_call()
    call["q"].requires_grad_()
    with pytest.raises(FlashError, match="no backward"):
        strict(call).sum().backward()


def test_the_recorder_refuses_values_that_python_reads():
    """In a CUDA graph such a value would stay as it was."""
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="reads values on the host"):
        record(lambda: x * float(x[0]))
    with pytest.raises(RuntimeError, match="index of booleans"):
        record(lambda: x[x > 1])
