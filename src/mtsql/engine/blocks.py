"""The memory of the cache: blocks of keys and values that rows take, share and release.

A block of a prompt keeps its content when nobody uses it any more. It counts as free and is taken
last, so that a later prompt with the same beginning can find it (`prefixes.py`).

S tokens in a block, K key/value heads, D head size.
"""

import bisect
import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MAX_SPAN = 1.1
"""Blocks are moved together when they spread over more than this many times their number."""


@dataclass(eq=False)
class PrefixBlock:
    """A block of a prompt. What comes before it is the same for all of its `siblings`."""

    block: int  # its place in the pool
    ids: tuple[int, ...]  # a whole block of tokens, or the last ones of a prompt
    siblings: dict[tuple[int, ...], "PrefixBlock"]  # blocks at this place by their ids, it too
    chain: int  # hash of all tokens up to its end
    following: dict[tuple[int, ...], "PrefixBlock"] = field(default_factory=dict)  # by their ids
    cached: int = 0  # tokens with keys and values: the first ones of `ids`


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens for all layers, counted by reference; never grows.

    A trajectory's own blocks are taken from the bottom of the pool, those of prompts from the top:

        block    0  1  2  3  4  5  6  7  8  9
                 a  a  b  .  .  .  .  .  P  P      rows a and b share the prompt P

    The lowest (from the top: the highest) free blocks are taken first, and `compact` moves blocks
    together when rows have left gaps: attention on a CPU reads ranges of the pool.

    A block is in one of three states: in use (it has references), unused with the content of a
    prompt (it stands in `unused`), or empty (it stands in `empty`). The latter two are free.
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
        self.empty = list(range(num_blocks))  # always sorted
        self.content: dict[int, PrefixBlock] = {}  # what the blocks of prompts hold
        self.is_known = np.zeros(num_blocks, dtype=bool)  # whether it stands in `content`
        self.unused: dict[PrefixBlock, None] = {}  # the least recently used one first
        self.refs = np.zeros(num_blocks, dtype=np.int64)
        self.is_top = np.zeros(num_blocks, dtype=bool)  # taken from the top

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free(self) -> int:
        """Blocks without references."""
        return len(self.empty) + len(self.unused)

    def take(self, num: int, *, from_top: bool = False) -> list[int]:
        """`num` free blocks, each with one reference; empty ones first, then those whose content
        was not used for the longest time. The caller has checked that they are free."""
        if num > self.num_free:
            raise RuntimeError(f"asked for {num} blocks of the KV cache, {self.num_free} are free")
        while num > len(self.empty):
            self.forget(next(iter(self.unused)))
        if from_top:
            split = len(self.empty) - num
            taken = self.empty[split:]
            del self.empty[split:]
        else:
            taken = self.empty[:num]
            del self.empty[:num]
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
                content = self.content.get(block)
                if content is None:
                    bisect.insort(self.empty, block)
                else:
                    self.unused[content] = None

    def keep(self, content: PrefixBlock) -> None:
        """Note what a block holds, which stays known when the block is released."""
        self.content[content.block] = content
        self.is_known[content.block] = True

    def reuse(self, content: PrefixBlock) -> None:
        """Add a reference to a block whose content is known."""
        self.unused.pop(content, None)
        self.refs[content.block] += 1

    def forget(self, content: PrefixBlock) -> None:
        """Empty a block that is not in use. No block after it holds anything: a block is released
        before its parent, so it comes earlier in `unused`."""
        del self.unused[content]
        del content.siblings[content.ids]
        del self.content[content.block]
        self.is_known[content.block] = False
        bisect.insort(self.empty, content.block)

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
        origin = np.arange(self.num_blocks)  # where the content of each place was
        num_moved = self._close_gaps(origin, is_top=False)
        num_moved += self._close_gaps(origin, is_top=True)
        if not num_moved:
            return None
        place = np.empty_like(origin)
        place[origin] = np.arange(self.num_blocks)
        moved = np.flatnonzero((place != np.arange(self.num_blocks)) & self.is_known).tolist()
        for content in [self.content.pop(block) for block in moved]:
            content.block = int(place[content.block])
            self.content[content.block] = content
        self.is_known = self.is_known[origin]
        self.empty = np.flatnonzero((self.refs == 0) & ~self.is_known).tolist()
        return place

    def _close_gaps(self, origin: np.ndarray, *, is_top: bool) -> int:
        """Move the outermost used blocks of one end into the gaps before them, and what lies there
        to their places; keep `origin` up to date. Returns the number of moved blocks."""
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
            self._move(source, target, is_swap=bool(self.is_known[origin[target]]))
        for values in (self.refs, self.is_top, origin):
            values[targets], values[sources] = values[sources], values[targets]
        return len(targets)

    def _move(self, source: int, target: int, *, is_swap: bool) -> None:
        """Move the keys and values of a block to another place. If `is_swap`, what lies there moves
        to its place."""
        before = self.data[:, :, target].clone() if is_swap else None
        self.copy(source, target)
        if before is not None:
            self.data[:, :, source] = before


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
