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
import math
import mmap
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
SPARSE = (
    3  # copying a block costs about as much as visiting this many that lie in between (measured)
)
GAPS = 1.1  # blocks are moved together when more than this many are visited for each that is in use


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn does the attention: it is installed, and made for this device and
    dtype."""
    return flash_attn_with_kvcache is not None and device.type == "cuda" and dtype.itemsize == 2


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens for all layers, counted by reference; never grows.

    Blocks are handed out from the bottom (a trajectory's own) or from the top (shared prompts),
    lowest or highest free one first, and moved together when rows have left gaps: what is read
    together lies together.
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
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.data = _zeros(
            (2, num_layers, num_blocks, num_kv_heads * block_size * head_dim), dtype, device
        )
        as_flash = (num_blocks, block_size, num_kv_heads, head_dim)
        as_keys = (
            num_blocks,
            num_kv_heads,
            head_dim,
            block_size,
        )  # q @ k: twice as fast as over rows of k
        as_values = (num_blocks, num_kv_heads, block_size, head_dim)
        self.use_flash = uses_flash(device, dtype)
        # per layer (num_blocks, K, S, D), however it lies in memory
        if self.use_flash:
            self.keys, self.values = (
                [x.view(as_flash).transpose(1, 2) for x in part] for part in self.data
            )
        else:
            self.keys = [x.view(as_keys).transpose(2, 3) for x in self.data[0]]
            self.values = [x.view(as_values) for x in self.data[1]]
        self.free = list(range(num_blocks))  # always sorted
        self.refs = np.zeros(num_blocks, dtype=np.int64)
        self.is_top = np.zeros(num_blocks, dtype=bool)  # handed out from the top

    def take(self, num: int, *, from_top: bool = False) -> list[int]:
        """`num` free blocks, each with one reference. The caller has made sure that so many are
        free."""
        if num > len(self.free):
            raise RuntimeError(f"asked for {num} blocks of the KV cache, {len(self.free)} are free")
        split = len(self.free) - num if from_top else num
        low, high = self.free[:split], self.free[split:]
        taken, self.free = (high, low) if from_top else (low, high)
        self.refs[taken] = 1
        self.is_top[taken] = from_top
        return taken

    def share(self, blocks: list[int]) -> None:
        self.refs[blocks] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            if self.refs[block] == 0:
                bisect.insort(self.free, block)

    def copy(self, source: int, target: int) -> None:
        self.data[:, :, target] = self.data[:, :, source]

    def compact(self) -> np.ndarray | None:
        """Close the gaps that freed blocks have left at the bottom and at the top, if they are
        worth it: flash-attn reads only what a row's table names, so with it they cost nothing.

        Returns the new place of each block (num_blocks,), or None where nothing was moved.
        """
        if self.use_flash:
            return None
        place = None
        for is_top in (False, True):
            blocks = np.flatnonzero((self.refs > 0) & (self.is_top == is_top))
            dense = np.arange(len(blocks))
            if is_top:
                blocks, dense = blocks[::-1], self.num_blocks - 1 - dense
            if not len(blocks) or abs(blocks[-1] - dense[0]) + 1 <= GAPS * len(blocks):
                continue
            targets = dense[self.refs[dense] == 0]
            if not len(targets):
                continue
            sources = blocks[len(blocks) - len(targets) :]
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                self.copy(source, target)
            self.refs[targets], self.refs[sources] = self.refs[sources], 0
            self.is_top[targets] = is_top
            place = np.arange(self.num_blocks) if place is None else place
            place[sources] = targets
        if place is not None:
            self.free = np.flatnonzero(self.refs == 0).tolist()
        return place


@dataclass(frozen=True)
class Chunk:
    """Tokens `start:stop` of a step: consecutive in one trajectory, the last of them its
    `length`-th."""

    start: int
    stop: int
    length: int
    blocks: np.ndarray  # the trajectory's blocks in order, at least enough for `length` tokens


class PagedContext:
    """Attention of one scheduling step: R rows with one new token each, then chunks of several
    tokens.

    The new keys and values are written to their blocks first; then every token sees its own
    trajectory up to itself.
    """

    def __init__(
        self, pool: BlockPool, tables: np.ndarray, lengths: np.ndarray, chunks: list[Chunk]
    ):
        """`tables` (R, blocks) and `lengths` (R,): block table and context length, new token
        included, of each decoding row; entries past a row's last block are ignored."""
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
        heads = np.arange(pool.num_kv_heads)[:, None]
        places = (
            np.concatenate(blocks),
            heads,
            np.concatenate(offsets),
        )  # (T,), (K, 1), (T,): of the new keys
        self.places = [self._tensor(place) for place in places]
        self.gather: Tensor | None = None
        self.use_flash = pool.use_flash
        if self.use_flash:
            self._plan_flash(tables, lengths)
        elif self.num_rows:
            self._plan_blocks(tables, lengths)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
        dtype = self.pool.data.dtype
        query, key, value = (
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
        )  # autocast leaves some in float32
        self.pool.keys[layer].index_put_(self.places, key[0])
        self.pool.values[layer].index_put_(self.places, value[0])
        if self.use_flash:
            return self._attend_flash(layer, query[0].transpose(0, 1), scaling)[None]
        parts = [self._decode(layer, query, scaling)] if self.num_rows else []
        parts += [self._prefill(layer, query, key, value, chunk, scaling) for chunk in self.chunks]
        return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None]

    # CPU: several tokens of one trajectory

    def _prefill(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scaling: float
    ) -> Tensor:
        """(1, H, T, D) of the step -> (stop - start, H, D) of the chunk."""
        inside = slice(chunk.start, chunk.stop)
        new = chunk.stop - chunk.start
        q = query[:, :, inside]
        if new == chunk.length:  # nothing before it: the step's own keys are all there is
            k, v, mask = key[:, :, inside], value[:, :, inside], None
        else:
            blocks = self._tensor(chunk.blocks[: -(-chunk.length // self.pool.block_size)])
            caches = self.pool.keys[layer], self.pool.values[layer]
            k, v = (_unroll(cache, blocks, chunk.length) for cache in caches)
            old = chunk.length - new
            mask = torch.ones(new, chunk.length, dtype=torch.bool, device=self.device).tril_(old)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    # CPU: one token of many trajectories

    def _plan_blocks(self, tables: np.ndarray, lengths: np.ndarray) -> None:
        """Which blocks are visited with which rows, and where a row finds its partial results
        afterwards."""
        size = self.pool.block_size
        num_blocks = -(-lengths // size)  # (R,)
        is_used = np.arange(tables.shape[1]) < num_blocks[:, None]  # (R, B)
        row, column = np.nonzero(is_used)  # row by row
        block = tables[row, column]
        # Prompts lie at the top, what is a row's own at the bottom: apart, each is dense.
        is_shared = (np.bincount(block)[block] > 1) | self.pool.is_top[block]
        begin, stride = np.zeros((2, *is_used.shape), dtype=np.int64)  # of the pair's parts
        self.visits = []
        num_heads = self.pool.num_kv_heads
        num_parts = 0
        for pick in (~is_shared, is_shared):
            if pick.any():
                where, rows, index, rank = _visit(block[pick], row[pick])
                begin[row[pick], column[pick]] = (
                    num_parts + index * num_heads * rows.shape[1] + rank
                )
                stride[row[pick], column[pick]] = rows.shape[1]
                num_parts += rows.size * num_heads
                where = where if isinstance(where, slice) else self._tensor(where)
                self.visits.append((where, self._tensor(rows)))
        self.begin, self.stride = self._tensor(begin), self._tensor(stride)  # (R, B)
        self.num_blocks = self._tensor(num_blocks)
        precise = np.float64 if self.pool.data.dtype == torch.float64 else np.float32
        self.pad = self._tensor(np.where(is_used, 0, -np.inf).astype(precise))[:, None]  # (R, 1, B)
        is_empty = (
            np.arange(size) > ((lengths - 1) % size)[:, None]
        )  # (R, S) in the last block; others are full
        self.bias = self._tensor(np.where(is_empty, -np.inf, 0)).to(self.pool.data.dtype)

    def _plan_heads(self, num_heads: int, num_tokens: int) -> None:
        """The same for the number of query heads, known when the first layer asks. A part is a
        query head of a row at a block; parts stand in the order (block, key head, row, query head
        of that key head)."""
        num_kv_heads = self.pool.num_kv_heads
        per_head = num_heads // num_kv_heads  # H/K
        kv_head, head = (torch.arange(n, device=self.device) for n in (num_kv_heads, per_head))
        token = (
            kv_head[:, None, None] * per_head + head
        ) * num_tokens  # (K, 1, H/K) of a head's first token
        gather = [(token + rows[:, None, :, None]).flatten() for _, rows in self.visits]
        self.gather = torch.cat(gather)  # (M,) a part's query among H*T
        found = (
            self.begin[:, None, None] + kv_head[:, None, None] * self.stride[:, None, None]
        )  # (R, K, 1, B)
        found = (found * per_head + head[:, None]).flatten(1, 2)  # (R, H, B)
        rows = torch.arange(self.num_rows, device=self.device)
        self.found, self.last = found, found[rows, :, self.num_blocks - 1].flatten()  # (R*H,)
        self.bias = self.bias[:, None].expand(-1, num_heads, -1).flatten(0, 1)  # (R*H, S)
        num_parts, make = len(self.gather), self.pool.data.new_empty
        self.scores, self.outs = (
            make(num_parts, self.pool.block_size),
            make(num_parts, self.pool.head_dim),
        )
        shapes = [
            (rows.shape[0] * num_kv_heads, rows.shape[1] * per_head) for _, rows in self.visits
        ]  # N*K, C*H/K
        ends = np.cumsum([n * c for n, c in shapes]).tolist()
        self.parts = []
        for (where, _), (n, c), end in zip(self.visits, shapes, ends, strict=True):
            own = slice(end - n * c, end)
            self.parts.append(
                (where, own, self.scores[own].view(n, c, -1), self.outs[own].view(n, c, -1))
            )

    def _decode(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query (1, H, T, D) -> (R, H, D). A part has a softmax of its own; a row's is the mean of
        its parts', weighted by the exponentials of their log-sum-exps. Unused blocks in between are
        visited too and never found."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        num_heads, num_tokens, head_dim = query.shape[1:]
        if self.gather is None:
            self._plan_heads(num_heads, num_tokens)
        query = query.reshape(-1, head_dim).index_select(0, self.gather)  # (M, D)
        for where, own, scores, _ in self.parts:
            q, k = (
                query[own].view(*scores.shape[:2], head_dim),
                keys[where].flatten(0, 1).transpose(1, 2),
            )
            torch.baddbmm(scores, q, k, beta=0, alpha=scaling, out=scores)  # (N*K, C*H/K, S)
        self.scores.index_add_(0, self.last, self.bias)
        scores = self.scores.to(_precise(keys.dtype))
        probs = scores.softmax(-1)  # (M, S)
        lse = scores.amax(-1) - probs.amax(-1).log_()  # (M,)
        probs = probs.to(values.dtype)
        for where, own, scores, outs in self.parts:
            torch.bmm(probs[own].view(scores.shape), values[where].flatten(0, 1), out=outs)
        share = lse.take(self.found).add_(self.pad).softmax(-1).to(values.dtype)  # (R, H, B)
        out = F.embedding_bag(
            self.found.flatten(0, 1), self.outs, per_sample_weights=share.flatten(0, 1), mode="sum"
        )
        return out.view(self.num_rows, num_heads, head_dim)

    # GPU

    def _plan_flash(self, tables: np.ndarray, lengths: np.ndarray) -> None:
        """Tables and lengths as flash-attn wants them: int32 on the device, chunks as a ragged
        batch."""
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


def _visit(
    block: np.ndarray, row: np.ndarray
) -> tuple[slice | np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How to meet the pairs (block, row) in one batched product.

    Returns the N blocks to visit, a range of the pool (no copy) or, where used blocks are rare, a
    list; the C rows whose queries meet each block, (N, C), padded with row 0; each pair's place
    among the N*C partial results.
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
    return slice(first, end) if is_range else unique, rows, index, rank


def _unroll(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A layer's (num_blocks, K, S, D) -> (1, K, length, D) of the trajectory lying in `blocks`."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: a slot not yet written is masked, but a NaN in it would survive the mask.

    On a CPU, pages that become memory when they are first written: a large budget costs nothing
    until it is used. Large pages where the system has them, as a step walks over most of the cache.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype softmax is computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
