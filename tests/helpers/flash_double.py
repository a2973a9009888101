"""flash-attn's varlen function on a CPU: its published signature, and what must not be given to it.

Read from flash-attn 2.8.3 (flash_attn_interface.py, flash_api.cpp). The real function refuses wrong
types, shapes and devices. It copies tensors whose last dimension is not contiguous or whose head
size is no multiple of 8, a whole cache too, and it does not look at the values of edges and block
tables, so wrong ones read foreign memory. The double refuses all of these. `record` stands in for
the capture of a CUDA graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.host_reads import require_no_read
from mtsql.engine import config, engine, paged_attention
from mtsql.learner import packed_attention
from mtsql.model.attention_path import AttentionPath, path_for

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8  # the cache would be copied to pad other head sizes


@dataclass(frozen=True)
class Rules:
    """What differs between flash-attn and a test that wants exact arithmetic or small blocks."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    """Types of queries, keys and values."""
    block: int = 256
    """The block size of a paged cache is a multiple of this."""
    head_dim_step: int = HEAD_DIM_STEP
    """The head size is a multiple of this."""


STRICT = Rules()
"""What flash-attn accepts."""
REFERENCE = Rules((torch.float64, torch.float32, torch.bfloat16, torch.float16), 4, 1)
"""For exact comparisons: any type, blocks of four tokens, any head size."""
rules = STRICT
"""The rules in force; `replace_flash_attn` sets them."""


class FlashError(RuntimeError):
    """A call that flash-attn refuses, or that would read memory which is not its own."""


def _need(holds: bool, text: str) -> None:
    if not holds:
        raise FlashError(f"flash-attn: {text}")


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention, token by token and head by head: query (n, H, D), which belongs to the last
    n of keys and values (L, K, D) -> (n, H, D)."""
    n, length = len(query), len(keys)
    per_kv_head = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    for i in range(n):
        for head in range(query.shape[1]):
            seen, kv_head = length - n + i + 1, head // per_kv_head
            weight = (keys[:seen, kv_head] @ query[i, head] * scaling).softmax(0)
            out[i, head] = weight @ values[:seen, kv_head]
    return out


def attend_densely(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, is_causal: bool
) -> Tensor:
    """The same with one matrix of scores, in float32 or wider, and differentiable. A query that
    sees no key gets zeros, as in flash-attn."""
    wide = torch.promote_types(query.dtype, torch.float32)
    per_kv_head = query.shape[1] // keys.shape[1]
    keys = keys.to(wide).repeat_interleave(per_kv_head, dim=1)
    values = values.to(wide).repeat_interleave(per_kv_head, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", query.to(wide), keys) * scale
    if is_causal:
        n, length = scores.shape[1:]
        is_seen = torch.ones(n, length, dtype=torch.bool, device=query.device).tril(length - n)
        scores = scores.masked_fill(~is_seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hnl,lhd->nhd", weights, values).to(query.dtype)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, num_kv_heads: int) -> None:
    num_heads, head_dim = q.shape[1:]
    _need(q.dtype in rules.dtypes, f"only fp16 and bf16 data types, not {q.dtype}")
    _need(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    _need(q.device == k.device == v.device, "query, key and value must be on one device")
    contiguous = all(x.stride(-1) == 1 for x in (q, k, v))
    _need(contiguous, "query, key and value must have a contiguous last dimension")
    _need(k.shape == v.shape and k.shape[-1] == head_dim, "key and value must have one shape")
    _need(head_dim <= MAX_HEAD_DIM, f"head size {head_dim} is above {MAX_HEAD_DIM}")
    step = rules.head_dim_step
    _need(head_dim % step == 0, f"head size {head_dim} is no multiple of {step}")
    _need(num_heads % num_kv_heads == 0, "key/value heads must divide the query heads")


def _check_integers(name: str, x: Tensor, device: torch.device) -> None:
    _need(x.dtype == torch.int32, f"{name} must be int32, not {x.dtype}")
    _need(x.device == device, f"{name} must be on {device}, not on {x.device}")
    _need(x.stride(-1) == 1, f"{name} must have a contiguous last dimension")


def _check_cache(k: Tensor, table: Tensor, num_sequences: int) -> None:
    _check_integers("block_table", table, k.device)
    _need(k.dim() == 4, "a paged key is (blocks, tokens of a block, heads, head size)")
    has_rows = table.dim() == 2 and len(table) == num_sequences
    _need(has_rows, f"block_table must have a row for each of {num_sequences} sequences")
    _need(k.shape[1] % rules.block == 0, f"the block size must be a multiple of {rules.block}")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q (T, H, D); k and v (keys, K, D), or (blocks, S, K, D) with a block table -> (T, H, D).

    The last queries of a sequence belong to its last keys. It is one operator, like the real one,
    so a recorder of operators sees none of the values that it reads.
    """
    is_plain = not dropout_p and window_size == (-1, -1) and not softcap and alibi_slopes is None
    assert is_plain and not return_attn_probs, "the double does not compute this"
    num_sequences = cu_seqlens_q.numel() - 1
    _check_tensors(q, k, v, num_kv_heads=k.shape[-2])
    _check_integers("cu_seqlens_q", cu_seqlens_q, q.device)
    _check_integers("cu_seqlens_k", cu_seqlens_k, q.device)
    _need(num_sequences > 0, "there must be a sequence")
    _need(cu_seqlens_k.shape == cu_seqlens_q.shape, "cu_seqlens_q and cu_seqlens_k differ in size")
    if max_seqlen_q == 1 and q.shape[1] > k.shape[-2]:  # query i is taken for sequence i
        _need(len(q) == num_sequences, "with max_seqlen_q 1 each sequence needs a query")
    is_int = isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    _need(is_int, "max_seqlen_q and max_seqlen_k must be Python integers")
    if block_table is None:
        _need(k.dim() == 3, "keys without a block table are (keys, heads, head size)")
    else:
        _check_cache(k, block_table, num_sequences)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    edges = cu_seqlens_q, cu_seqlens_k
    return _varlen(q, k, v, *edges, max_seqlen_q, max_seqlen_k, block_table, scale, causal)


@torch.library.custom_op("mtsql_tests::varlen", mutates_args=())
def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_edges: Tensor,
    key_edges: Tensor,
    max_queries: int,
    max_keys: int,
    table: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    num_keys = None if table is not None else len(k)
    _check_edges("cu_seqlens_q", query_edges, max_queries, len(q))
    _check_edges("cu_seqlens_k", key_edges, max_keys, num_keys)
    out = torch.zeros_like(q)
    for i, (queries, keys) in enumerate(zip(_spans(query_edges), _spans(key_edges), strict=True)):
        if table is None:
            seen = k[keys], v[keys]
        else:
            seen = _unroll(k, v, table[i], keys.stop - keys.start)
        out[queries] = attend_densely(q[queries], *seen, scale, causal)
    return out


def _check_edges(name: str, edges: Tensor, longest: int, total: int | None) -> None:
    values = edges.tolist()
    lengths = edges.diff().tolist()
    _need(values[0] == 0, f"{name} must begin with 0")
    _need(min(lengths) >= 0, f"{name} must not fall")
    _need(total is None or values[-1] == total, f"{name} ends at {values[-1]}, not at {total}")
    _need(longest >= max(lengths), f"a sequence of {name} is longer than the given maximum")


def _spans(edges: Tensor) -> list[slice]:
    ends = edges.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _unroll(k: Tensor, v: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The keys and values (length, K, D) of a sequence in the blocks that its table names."""
    num = -(-length // k.shape[1])
    _need(num <= len(blocks), f"a block_table of {len(blocks)} blocks cannot hold {length} keys")
    used = blocks[:num].long()
    inside = not num or 0 <= int(used.min()) <= int(used.max()) < len(k)
    _need(inside, f"block_table names a block that is not among {len(k)}")
    return k[used].flatten(0, 1)[:length], v[used].flatten(0, 1)[:length]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, v, query_edges, key_edges, _, _, table, scale, causal = inputs
    ctx.save_for_backward(q, k, v, query_edges, key_edges)
    ctx.settings = scale, causal
    ctx.is_paged = table is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _need(not ctx.is_paged, "there is no backward pass through a paged cache")
    q, k, v, query_edges, key_edges = ctx.saved_tensors
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for queries, keys in zip(_spans(query_edges), _spans(key_edges), strict=True):
        places = queries, keys, keys
        pairs = zip((q, k, v), places, strict=True)
        inputs = [x[place].detach().requires_grad_() for x, place in pairs]
        with torch.enable_grad():
            out = attend_densely(*inputs, *ctx.settings)
        shares = torch.autograd.grad(out, inputs, grad[queries])
        for gradient, place, share in zip(gradients, places, shares, strict=True):
            gradient[place] += share
    return *gradients, *[None] * 7


_varlen.register_autograd(_backward, setup_context=_keep)


def _uses_double(which: Rules, device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in which.dtypes


def _path_of_learner(which: Rules, device: torch.device, dtype: torch.dtype) -> AttentionPath:
    """flash-attn in the learner, too; on a CPU it keeps its own operators."""
    path = path_for(device, dtype)
    is_flash = dtype in which.dtypes and device.type != "cpu"
    return path._replace(learning="flash") if is_flash else path


def replace_flash_attn(monkeypatch: pytest.MonkeyPatch, which: Rules = REFERENCE) -> None:
    """Let engine and learner run with the double instead of flash-attn, on any device.

    By default in any dtype and with blocks of four tokens; with STRICT as flash-attn does.
    """
    for module in (paged_attention, packed_attention):
        monkeypatch.setattr(module, "flash_attn_varlen_func", flash_attn_varlen_func)
    for module in (engine, config):  # those of them that ask
        uses_flash = partial(_uses_double, which)
        monkeypatch.setattr(module, "uses_flash", uses_flash, raising=False)
        monkeypatch.setattr(module, "FLASH_BLOCK", which.block, raising=False)
    monkeypatch.setattr(packed_attention, "path_for", partial(_path_of_learner, which))
    monkeypatch.setitem(globals(), "rules", which)


@contextmanager
def strict_flash_attn() -> Iterator[None]:
    """The strict double in place of flash-attn inside the `with`, outside of tests too."""
    with pytest.MonkeyPatch.context() as patch:
        replace_flash_attn(patch, STRICT)
        yield


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        require_no_read(func, args)
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Do what `cuda_graphs.capture` does, with operators instead of kernels. The replay calls the
    same operators on the same tensors. RuntimeError for an operator whose values the host reads.
    """
    recorder = _Recorder()
    with recorder:
        result = run()

    def replay() -> None:
        for func, args, kwargs, out in recorder.calls:
            again = func(*args, **kwargs)
            pairs = [(out, again)]
            if not isinstance(out, Tensor):
                pairs = list(zip(tree_leaves(out), tree_leaves(again), strict=True))
            for old, new in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay, result
