"""flash-attn's two functions on the CPU, slowly, with their published signatures; and a recorder of
operators that stands in for a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtsql.engine import engine, paged_attention


def attend_causally(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
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


@torch.library.custom_op("mtsql_tests::with_kvcache", mutates_args=())
def _with_kvcache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (cache[table[row].long()].flatten(0, 1)[:length] for cache in (k, v))
        out[row] = attend_causally(q[row], keys, values, scale)
    return out


def flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False
):
    """q (R, 1, H, D), k_cache (blocks, S, K, D), block_table (R, *). It is one operator, like the
    real one."""
    assert causal and block_table.dtype == cache_seqlens.dtype == torch.int32
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    return _with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    block_table=None,
):
    """q (T, H, D), k (blocks, S, K, D). The last queries of a row belong to its last keys."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    out = torch.empty_like(q)
    ends, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    assert max_seqlen_k == max(lengths) and max_seqlen_q == max(cu_seqlens_q.diff().tolist())
    for i, length in enumerate(lengths):
        keys, values = (cache[block_table[i].long()].flatten(0, 1)[:length] for cache in (k, v))
        out[ends[i] : ends[i + 1]] = attend_causally(
            q[ends[i] : ends[i + 1]], keys, values, softmax_scale
        )
    return out


def replace_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine run with these functions instead of flash-attn, on the CPU and in any dtype,
    with blocks of four tokens."""
    monkeypatch.setattr(paged_attention, "flash_attn_with_kvcache", flash_attn_with_kvcache)
    monkeypatch.setattr(paged_attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(engine, "uses_flash", lambda device, dtype: True)
    monkeypatch.setattr(engine, "FLASH_BLOCK", 4)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(
    run: Callable[[], torch.Tensor],
) -> tuple[Callable[[], None], torch.Tensor]:
    """Do what `cuda_graphs.capture` does, with operators instead of kernels. The replay calls the
    same operators on the same tensors; values that Python has read stay as they were."""
    recorder = _Recorder()
    with recorder:
        result = run()

    def replay() -> None:
        for func, args, kwargs, out in recorder.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay, result
