"""flash-attn's varlen function on the CPU, slowly, with its published signature; and a recorder of
operators that stands in for a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtsql.engine import config, engine, paged_attention


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


@torch.library.custom_op("mtsql_tests::varlen", mutates_args=())
def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_edges: torch.Tensor,
    key_edges: torch.Tensor,
    max_queries: int,
    max_keys: int,
    table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.empty_like(q)
    ends, lengths = query_edges.tolist(), key_edges.diff().tolist()
    assert max_keys >= max(lengths) and max_queries >= max(query_edges.diff().tolist())
    for i, length in enumerate(lengths):
        keys, values = (cache[table[i].long()].flatten(0, 1)[:length] for cache in (k, v))
        own = slice(ends[i], ends[i + 1])
        out[own] = attend_causally(q[own], keys, values, scale)
    return out


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
    """q (T, H, D), k (blocks, S, K, D). The last queries of a row belong to its last keys. One
    operator, like the real one."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert k.stride(-1) == v.stride(-1) == 1
    return _varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, softmax_scale
    )


def replace_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine run with these functions instead of flash-attn, on the CPU and in any dtype,
    with blocks of four tokens."""
    monkeypatch.setattr(paged_attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    for module in (engine, config):
        monkeypatch.setattr(module, "uses_flash", lambda device, dtype: True)
    monkeypatch.setattr(config, "FLASH_BLOCK", 4)


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
