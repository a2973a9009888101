"""Keys and values of live trajectories in fixed-size blocks, and the attention that reads them there.

T tokens of a step, R rows among them that decode one token, H query heads, K key/value heads, D head size,
S tokens per block, N blocks looked at, C rows that share a block.

On a CPU the usual gather of a row's blocks into one padded tensor costs several times the attention itself.
We turn the loop round: blocks are visited where they lie, each with the query of the row (or of all the rows
of a group) that owns it; that gives a partial softmax per (row, block), and the partial results of a row are
merged at the end. So nothing is copied, nothing is padded to the longest row, and a prompt shared by a group
is read once per step. On a GPU flash-attn does the same work from the block tables.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:  # CPUs have no flash-attn; requirements-gpu.txt brings it
    flash_attn_varlen_func = flash_attn_with_kvcache = None

FLASH_BLOCK = 256  # flash-attn's paged cache wants a block size that is a multiple of this
SPARSE = 6  # copying a block costs about as much as visiting this many that lie in between (measured)


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn does the attention: it is installed, and made for this device and dtype."""
    return flash_attn_with_kvcache is not None and device.type == "cuda" and dtype.itemsize == 2


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens for all layers, counted by reference; never grows.

    Blocks are handed out from the bottom (a trajectory's own) or from the top (shared prompts), lowest or
    highest free one first, so that what is read together lies together.
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
    ):
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (2, num_layers, num_blocks, num_kv_heads, block_size, head_dim)
        self.data = _zeros(shape, dtype, device)
        self.keys, self.values = list(self.data[0]), list(self.data[1])  # per layer (num_blocks, K, S, D)
        self.free = list(range(num_blocks))  # always sorted
        self.refs = [0] * num_blocks

    def take(self, num: int, *, from_top: bool = False) -> list[int]:
        """`num` free blocks, each with one reference. The caller has made sure that so many are free."""
        if num > len(self.free):
            raise RuntimeError(f"asked for {num} blocks of the KV cache, {len(self.free)} are free")
        split = len(self.free) - num if from_top else num
        low, high = self.free[:split], self.free[split:]
        taken, self.free = (high, low) if from_top else (low, high)
        for block in taken:
            self.refs[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            if self.refs[block] == 0:
                bisect.insort(self.free, block)

    def copy(self, source: int, target: int) -> None:
        self.data[:, :, target] = self.data[:, :, source]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start:stop` of a step: consecutive in one trajectory, the last of them its `length`-th."""

    start: int
    stop: int
    length: int
    blocks: np.ndarray  # the trajectory's blocks in order, at least enough for `length` tokens


class PagedContext:
    """Attention of one scheduling step: R rows with one new token each, then chunks of several tokens.

    The new keys and values are written to their blocks first; then every token sees its own trajectory up to
    itself.
    """

    def __init__(self, pool: BlockPool, tables: np.ndarray, lengths: np.ndarray, chunks: list[Chunk]):
        """`tables` (R, blocks) and `lengths` (R,): block table and context length, new token included, of
        each decoding row; entries past a row's last block are ignored."""
        self.pool = pool
        self.chunks = chunks
        self.num_rows = len(lengths)
        self.device = pool.data.device
        size = pool.block_size
        blocks, offsets = [], []
        if self.num_rows:
            last = lengths - 1
            blocks.append(tables[np.arange(self.num_rows), last // size])
            offsets.append(last % size)
        for chunk in chunks:
            position = np.arange(chunk.length - (chunk.stop - chunk.start), chunk.length)
            blocks.append(chunk.blocks[position // size])
            offsets.append(position % size)
        num_heads = pool.data.shape[3]
        first = np.concatenate(blocks).astype(np.int64) * num_heads  # (T,)
        cells = (first[:, None] + np.arange(num_heads)) * size + np.concatenate(offsets)[:, None]
        self.cells = self._tensor(cells.reshape(-1))  # (T*K,) place of each new key among blocks*K*S
        self.use_flash = uses_flash(self.device, pool.data.dtype)
        if self.use_flash:
            self._plan_flash(tables, lengths)
        elif self.num_rows:
            self._plan_blocks(tables, lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
        head_dim, dtype = query.shape[-1], self.pool.data.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)  # autocast leaves some in float32
        for cache, new in ((self.pool.keys[layer], key), (self.pool.values[layer], value)):
            flat = new[0].transpose(0, 1).reshape(-1, head_dim)  # (T*K, D)
            cache.view(-1, head_dim).index_copy_(0, self.cells, flat)
        query = query[0].transpose(0, 1)  # (T, H, D)
        if self.use_flash:
            return self._attend_flash(layer, query, scaling)[None]
        if not self.chunks:
            return self._decode(layer, query, scaling)[None]
        out = query.new_empty(query.shape)
        if self.num_rows:
            out[: self.num_rows] = self._decode(layer, query[: self.num_rows], scaling)
        for chunk in self.chunks:
            out[chunk.start : chunk.stop] = self._prefill(layer, query, key, value, chunk, scaling)
        return out[None]

    # CPU: several tokens of one trajectory

    def _prefill(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scaling: float
    ) -> Tensor:
        """(T, H, D) of the step -> (stop - start, H, D) of the chunk."""
        inside = slice(chunk.start, chunk.stop)
        new = chunk.stop - chunk.start
        q = query[inside].transpose(0, 1)[None]  # (1, H, new, D)
        if new == chunk.length:  # nothing before it: the step's own keys are all there is
            k, v, mask = key[:, :, inside], value[:, :, inside], None
        else:
            blocks = self._tensor(chunk.blocks[: -(-chunk.length // self.pool.block_size)])
            caches = self.pool.keys[layer], self.pool.values[layer]
            k, v = (_unroll(cache, blocks, chunk.length) for cache in caches)
            old = chunk.length - new
            mask = torch.ones(new, chunk.length, dtype=torch.bool, device=self.device).tril_(old)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1)

    # CPU: one token of many trajectories

    def _plan_blocks(self, tables: np.ndarray, lengths: np.ndarray) -> None:
        """Which blocks are visited with which rows, and where a row finds its partial results afterwards."""
        size = self.pool.block_size
        num_blocks = -(-lengths // size)  # (R,)
        row, column = np.nonzero(np.arange(tables.shape[1]) < num_blocks[:, None])  # row by row
        block = tables[row, column]
        is_shared = np.bincount(block, minlength=self.pool.num_blocks)[block] > 1
        found = np.empty(len(block), dtype=np.int64)
        self.visits = []
        num_parts = 0
        for pick in (~is_shared, is_shared):
            if pick.any():
                where, rows, place = _visit(block[pick], row[pick])
                found[pick] = num_parts + place
                num_parts += rows.size
                where = where if isinstance(where, slice) else self._tensor(where)
                self.visits.append((where, self._tensor(rows)))
        begins = np.cumsum(num_blocks) - num_blocks
        self.found = self._tensor(found)
        self.begins = self._tensor(begins)  # (R,) where each row's part of `found` begins
        # Only a row's last block can be partly filled. It is the row's own, so it is among the first visit's.
        is_empty = np.arange(size) > ((lengths - 1) % size)[:, None]  # (R, S)
        bias = np.zeros((len(self.visits[0][1]), size), dtype=np.float32)
        bias[found[begins + num_blocks - 1]] = np.where(is_empty, -np.inf, 0)
        self.bias = self._tensor(bias)[:, None, None]  # (N, 1, 1, S)

    def _decode(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query (R, H, D) -> (R, H, D). Unused blocks in between are visited too and never found."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        num_rows, num_heads, head_dim = query.shape
        split = (keys.shape[1], num_heads // keys.shape[1])  # K, H/K
        query = (query * scaling).view(num_rows, *split, head_dim)
        scores, tops = [], []
        for where, rows in self.visits:
            score = _by_block(query, rows) @ keys[where].transpose(2, 3)  # (N, K, C*H/K, S)
            score = score.to(_precise(keys.dtype))
            if not scores:
                score += self.bias
            scores.append(score)
            tops.append(_by_row(score.amax(-1, keepdim=True), rows, split))
        top = self._merge(tops, "max").view(num_rows, *split, 1)
        outs, totals = [], []
        for score, (where, rows) in zip(scores, self.visits, strict=True):
            weight = score.sub_(_by_block(top, rows)).exp_()
            outs.append(_by_row(weight.to(values.dtype) @ values[where], rows, split))
            totals.append(_by_row(weight.sum(-1, keepdim=True), rows, split))
        out, total = self._merge(outs, "sum"), self._merge(totals, "sum")
        return out.view(num_rows, num_heads, head_dim) / total[..., None].to(out.dtype)

    def _merge(self, parts: list[Tensor], mode: str) -> Tensor:
        """Partial results of each visit (N*C, X) -> (R, X), each row's over its blocks."""
        parts = torch.cat(parts) if len(parts) > 1 else parts[0]
        return F.embedding_bag(self.found, parts, self.begins, mode=mode)

    # GPU

    def _plan_flash(self, tables: np.ndarray, lengths: np.ndarray) -> None:
        """Tables and lengths as flash-attn wants them: int32 on the device, chunks as a ragged batch."""
        self.tables = self._tensor(tables.astype(np.int32))
        self.lengths = self._tensor(lengths.astype(np.int32))
        if self.chunks:
            width = max(len(chunk.blocks) for chunk in self.chunks)
            padded = np.zeros((len(self.chunks), width), dtype=np.int32)
            for line, chunk in zip(padded, self.chunks, strict=True):
                line[: len(chunk.blocks)] = chunk.blocks
            new = [chunk.stop - chunk.start for chunk in self.chunks]
            length = [chunk.length for chunk in self.chunks]
            self.chunk_tables = self._tensor(padded)
            self.cu_new = self._tensor(np.cumsum([0, *new], dtype=np.int32))
            self.cu_length = self._tensor(np.cumsum([0, *length], dtype=np.int32))
            self.max_new, self.max_length = max(new), max(length)

    def _attend_flash(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query (T, H, D) -> (T, H, D)."""
        keys = self.pool.keys[layer].transpose(1, 2)  # (num_blocks, S, K, D)
        values = self.pool.values[layer].transpose(1, 2)
        parts = []
        if self.num_rows:
            rows = flash_attn_with_kvcache(
                query[: self.num_rows, None],  # (R, 1, H, D)
                keys,
                values,
                cache_seqlens=self.lengths,
                block_table=self.tables,
                softmax_scale=scaling,
                causal=True,
            )
            parts.append(rows[:, 0])
        if self.chunks:
            chunks = flash_attn_varlen_func(
                query[self.num_rows :],
                keys,
                values,
                self.cu_new,
                self.cu_length,
                self.max_new,
                self.max_length,
                softmax_scale=scaling,
                causal=True,
                block_table=self.chunk_tables,
            )
            parts.append(chunks)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _visit(block: np.ndarray, row: np.ndarray) -> tuple[slice | np.ndarray, np.ndarray, np.ndarray]:
    """How to meet the pairs (block, row) in one batched product.

    Returns the N blocks to visit, a range of the pool (no copy) or, where used blocks are rare, a list; the C
    rows whose queries meet each block, (N, C), padded with row 0; each pair's place among the N*C partial
    results.
    """
    order = np.argsort(block, kind="stable")
    unique, start, count = np.unique(block[order], return_index=True, return_counts=True)
    rank = np.empty(len(block), dtype=np.int64)
    rank[order] = np.arange(len(block)) - np.repeat(start, count)
    first, end = int(unique[0]), int(unique[-1]) + 1
    is_range = end - first <= SPARSE * len(unique)
    index = block - first if is_range else np.searchsorted(unique, block)
    rows = np.zeros((end - first if is_range else len(unique), int(count.max())), dtype=np.int64)
    rows[index, rank] = row
    return slice(first, end) if is_range else unique, rows, index * rows.shape[1] + rank


def _by_block(part: Tensor, rows: Tensor) -> Tensor:
    """(R, K, H/K, X) -> (N, K, C*H/K, X)."""
    return part[rows].transpose(1, 2).reshape(len(rows), part.shape[1], -1, part.shape[-1])


def _by_row(part: Tensor, rows: Tensor, split: tuple[int, int]) -> Tensor:
    """(N, K, C*H/K, X) -> (N*C, H*X)."""
    part = part.view(len(rows), split[0], -1, split[1] * part.shape[-1])  # (N, K, C, H/K*X)
    return part.transpose(1, 2).reshape(rows.numel(), -1)


def _unroll(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A layer's (num_blocks, K, S, D) -> (1, K, length, D) of the trajectory lying in `blocks`."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: a slot not yet written is masked, but a NaN in it would survive the mask.

    On a CPU, pages that become memory when they are first written: a large budget costs nothing until it is
    used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    line = 64  # bytes of a cache line, to which vector loads like to be aligned
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + line, dtype=np.uint8)
    start = -memory.ctypes.data % line
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype softmax is computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
