"""The memory of the cache: blocks of keys and values that rows take, share and release.

S tokens in a block, K key/value heads, D head size.
"""

import bisect
import math
import mmap

import numpy as np
import torch
from torch import Tensor

MAX_SPAN = 1.1
"""Blocks are moved together when they spread over more than this many times their number."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens for all layers, counted by reference; never grows.

    A trajectory's own blocks are taken from the bottom of the pool, those of prompts from the top:

        block    0  1  2  3  4  5  6  7  8  9
                 a  a  b  .  .  .  .  .  P  P      rows a and b share the prompt P

    The lowest (from the top: the highest) free blocks are taken first, and `compact` moves blocks
    together when rows have left gaps: attention on a CPU reads ranges of the pool.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        use_flash: bool = False,
    ) -> None:
        """`use_flash`: whether flash-attn reads the blocks."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.use_flash = use_flash
        # On a GPU attention finds blocks by the rows' tables, wherever they lie.
        self.by_tables = use_flash or device.type != "cpu"
        block_elements = num_kv_heads * block_size * head_dim
        self.data = _zeros((2, num_layers, num_blocks, block_elements), dtype, device)
        # Keys and values of each layer are views (num_blocks, K, S, D) of either order in memory.
        if self.by_tables:
            shape = (num_blocks, block_size, num_kv_heads, head_dim)
            self.keys = [layer.view(shape).transpose(1, 2) for layer in self.data[0]]
            self.values = [layer.view(shape).transpose(1, 2) for layer in self.data[1]]
        else:
            # With tokens last, query @ key is twice as fast as over rows of keys.
            key_shape = (num_blocks, num_kv_heads, head_dim, block_size)
            value_shape = (num_blocks, num_kv_heads, block_size, head_dim)
            self.keys = [layer.view(key_shape).transpose(2, 3) for layer in self.data[0]]
            self.values = [layer.view(value_shape) for layer in self.data[1]]
        self.free = list(range(num_blocks))  # always sorted
        self.refs = np.zeros(num_blocks, dtype=np.int64)
        self.is_top = np.zeros(num_blocks, dtype=bool)  # taken from the top

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, num: int, *, from_top: bool = False) -> list[int]:
        """`num` free blocks, each with one reference. The caller has checked that they are free."""
        if num > len(self.free):
            raise RuntimeError(f"asked for {num} blocks of the KV cache, {len(self.free)} are free")
        if from_top:
            split = len(self.free) - num
            taken = self.free[split:]
            self.free = self.free[:split]
        else:
            taken = self.free[:num]
            self.free = self.free[num:]
        self.refs[taken] = 1
        self.is_top[taken] = from_top
        return taken

    def share(self, blocks: list[int]) -> None:
        """Add a reference to each block."""
        self.refs[blocks] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop a reference to each block; a block without references is free."""
        for block in blocks:
            self.refs[block] -= 1
            if self.refs[block] == 0:
                bisect.insort(self.free, block)

    def copy(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in all layers."""
        self.data[:, :, target] = self.data[:, :, source]

    def compact(self) -> np.ndarray | None:
        """Close the gaps that freed blocks have left at the bottom and at the top, if it pays.

        Returns the new place of each block (num_blocks,), or None if no block moved. On a
        GPU only the blocks that a row's table names are read, so gaps cost nothing.
        """
        if self.by_tables:
            return None
        place = np.arange(self.num_blocks)
        num_moved = self._close_gaps(place, is_top=False)
        num_moved += self._close_gaps(place, is_top=True)
        if not num_moved:
            return None
        self.free = np.flatnonzero(self.refs == 0).tolist()
        return place

    def _close_gaps(self, place: np.ndarray, *, is_top: bool) -> int:
        """Move the outermost used blocks of one end into the gaps before them; note their new
        `place`. Returns the number of moved blocks."""
        used = np.flatnonzero((self.refs > 0) & (self.is_top == is_top))
        dense = np.arange(len(used))  # where they would lie without gaps
        if is_top:
            used = used[::-1]
            dense = self.num_blocks - 1 - dense
        if not len(used):
            return 0
        span = abs(used[-1] - dense[0]) + 1
        if span <= MAX_SPAN * len(used):
            return 0
        targets = dense[self.refs[dense] == 0]
        sources = used[len(used) - len(targets) :]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.copy(source, target)
        self.refs[targets] = self.refs[sources]
        self.refs[sources] = 0
        self.is_top[targets] = is_top
        place[sources] = targets
        return len(targets)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: an offset that is not yet written is masked, but a NaN in it would survive the mask.

    On a CPU the pages become memory when they are first written, so a large cache costs nothing
    until it is used. They are large pages where the system has them, as a step reads most of the
    cache.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
