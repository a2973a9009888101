"""Bytes of tensors: what a forward pass keeps, the most that is in memory at a time, and an
attention that keeps what flash-attn keeps."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(sizes.values())


def kept_bytes(module: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward` keeps for backward, each storage once, without those of `module`."""
    own = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())}
    kept: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in own:
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return num_bytes(kept)


class Peak(TorchDispatchMode):
    """Counts the storages that operators make: `peak` is the most bytes at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.device.type != "meta":
                continue
            storage = x.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out


class _KeptByFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        sums = query.new_zeros(query.shape[1:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        of_query = torch.zeros_like(query, dtype=torch.float32)  # flash-attn adds up in float32
        return of_query.to(query.dtype), torch.zeros_like(key), torch.zeros_like(value)


def attend(self, layer, query, key, value, scale):
    """In place of `PackedContext.attend`: the memory of flash-attn, but not its numbers."""
    return _KeptByFlash.apply(query.to(value.dtype), key.to(value.dtype), value)
