"""Attention of one engine step over the blocks of the cache, on a CPU and by flash-attn.

A step computes one new token for each decoding row and several for each chunk (a stretch of a
prompt or of an observation). The new keys and values are written to their blocks first; then every
token sees its own trajectory up to itself.

On a GPU flash-attn reads the cache through the rows' block tables. On a CPU the decoding rows are
computed block by block (`block_visits.py`) and each chunk by torch's own attention.

T tokens of a step, R decoding rows among them (they come first), H query heads, K key/value heads,
D head size, S tokens in a block, B blocks in a row's table.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtsql.engine.block_visits import BlockVisits
from mtsql.engine.blocks import BlockPool, to_device

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:  # CPUs have no flash-attn; requirements-gpu.txt brings it
    flash_attn_varlen_func = flash_attn_with_kvcache = None

FLASH_BLOCK = 256  # flash-attn's paged cache wants a block size that is a multiple of this


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn computes the attention: it is installed and supports device and dtype."""
    return flash_attn_with_kvcache is not None and device.type == "cuda" and dtype.itemsize == 2


@dataclass(frozen=True)
class Chunk:
    """Tokens `start:stop` of a step: consecutive tokens of one trajectory, up to its `length`-th.

    Tokens 4 to 9 of a trajectory, computed in a step after three decoding rows, are
    `Chunk(start=3, stop=9, length=10, ...)`.
    """

    start: int
    stop: int
    length: int
    blocks: np.ndarray  # the trajectory's blocks in order, at least enough for `length` tokens


def step_context(
    pool: BlockPool,
    num_heads: int,
    tables: np.ndarray,
    lengths: np.ndarray,
    chunks: list[Chunk],
) -> "PagedContext":
    """The attention of one step: R rows with one new token each, then chunks of several tokens.

    `tables` (R, B) and `lengths` (R,): block table and context length, new token included, of each
    decoding row; entries past a row's last block are ignored. `num_heads`: query heads.
    """
    places = _new_places(pool, tables, lengths, chunks)
    if not pool.use_flash:
        return CpuContext(pool, places, num_heads, tables, lengths, chunks)
    device = pool.data.device
    return FlashContext(
        pool,
        places,
        to_device(tables.astype(np.int32), device),
        to_device(lengths.astype(np.int32), device),
        _RaggedChunks(chunks, device) if chunks else None,
    )


class PagedContext:
    """Writes the new keys and values of a step to their blocks; subclasses attend to them."""

    def __init__(self, pool: BlockPool, places: list[Tensor]) -> None:
        """`places`: block (T,), key head (K, 1) and offset (T,) of each new token."""
        self.pool = pool
        self.places = places

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
        dtype = self.pool.data.dtype  # autocast leaves some of the three in float32
        query = query.to(dtype)
        key = key.to(dtype)
        value = value.to(dtype)
        self.pool.keys[layer].index_put_(self.places, key[0])
        self.pool.values[layer].index_put_(self.places, value[0])
        return self._attend(layer, query, key, value, scale)[None]

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (T, H, D)."""
        raise NotImplementedError


class FlashContext(PagedContext):
    """Attention by flash-attn, which reads the blocks that a row's table names."""

    def __init__(
        self,
        pool: BlockPool,
        places: list[Tensor],
        tables: Tensor,
        lengths: Tensor,
        chunks: "_RaggedChunks | None",
    ) -> None:
        """tables (R, B) and lengths (R,) int32 on the device, as for `step_context`."""
        super().__init__(pool, places)
        self.tables = tables
        self.lengths = lengths
        self.chunks = chunks

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """query (1, H, T, D) -> (T, H, D); keys and values are read from the cache."""
        query = query[0].transpose(0, 1)  # (T, H, D)
        keys = self.pool.keys[layer].transpose(1, 2)  # (num_blocks, S, K, D)
        values = self.pool.values[layer].transpose(1, 2)
        num_rows = len(self.lengths)
        parts = []
        if num_rows:
            rows = flash_attn_with_kvcache(
                query[:num_rows, None],  # (R, 1, H, D)
                keys,
                values,
                cache_seqlens=self.lengths,
                block_table=self.tables,
                softmax_scale=scale,
                causal=True,
            )
            parts.append(rows[:, 0])
        if self.chunks is not None:
            chunks = flash_attn_varlen_func(
                query[num_rows:],
                keys,
                values,
                self.chunks.cu_new,
                self.chunks.cu_length,
                self.chunks.max_new,
                self.chunks.max_length,
                softmax_scale=scale,
                causal=True,
                block_table=self.chunks.tables,
            )
            parts.append(chunks)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class _RaggedChunks:
    """The chunks of a step as flash-attn wants them: cumulated lengths and padded tables, int32."""

    def __init__(self, chunks: list[Chunk], device: torch.device) -> None:
        new = [chunk.stop - chunk.start for chunk in chunks]
        length = [chunk.length for chunk in chunks]
        width = max(len(chunk.blocks) for chunk in chunks)
        tables = np.zeros((len(chunks), width), dtype=np.int32)
        for line, chunk in zip(tables, chunks, strict=True):
            line[: len(chunk.blocks)] = chunk.blocks
        self.tables = to_device(tables, device)
        self.cu_new = to_device(np.cumsum([0, *new], dtype=np.int32), device)
        self.cu_length = to_device(np.cumsum([0, *length], dtype=np.int32), device)
        self.max_new = max(new)
        self.max_length = max(length)


class CpuContext(PagedContext):
    """Attention on a CPU: `BlockVisits` for the decoding rows, torch's SDPA for each chunk."""

    def __init__(
        self,
        pool: BlockPool,
        places: list[Tensor],
        num_heads: int,
        tables: np.ndarray,
        lengths: np.ndarray,
        chunks: list[Chunk],
    ) -> None:
        """The arguments of `step_context`."""
        super().__init__(pool, places)
        self.chunks = chunks
        num_tokens = len(places[0])
        self.visits = (
            BlockVisits(pool, num_heads, num_tokens, tables, lengths) if len(lengths) else None
        )

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (T, H, D)."""
        parts = []
        if self.visits is not None:
            parts.append(self.visits.attend(layer, query, scale))
        for chunk in self.chunks:
            parts.append(self._attend_chunk(layer, query, key, value, chunk, scale))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_chunk(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float
    ) -> Tensor:
        """query (1, H, T, D) of the step -> (stop - start, H, D) of the chunk."""
        inside = slice(chunk.start, chunk.stop)
        num_new = chunk.stop - chunk.start
        num_old = chunk.length - num_new
        query = query[:, :, inside]
        if num_old == 0:  # the step's own keys are all there is
            key = key[:, :, inside]
            value = value[:, :, inside]
            mask = None
        else:
            num_blocks = self.pool.blocks_for(chunk.length)
            blocks = to_device(chunk.blocks[:num_blocks], query.device)
            key = _unroll(self.pool.keys[layer], blocks, chunk.length)
            value = _unroll(self.pool.values[layer], blocks, chunk.length)
            mask = torch.ones(num_new, chunk.length, dtype=torch.bool, device=query.device)
            mask = mask.tril_(num_old)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1)


def _new_places(
    pool: BlockPool, tables: np.ndarray, lengths: np.ndarray, chunks: list[Chunk]
) -> list[Tensor]:
    """Where new keys and values go: block (T,), key head (K, 1) and offset in the block (T,)."""
    size = pool.block_size
    blocks, offsets = [], []
    if len(lengths):
        last = lengths - 1
        blocks.append(tables[np.arange(len(lengths)), last // size])
        offsets.append(last % size)
    for chunk in chunks:
        position = np.arange(chunk.length - (chunk.stop - chunk.start), chunk.length)
        blocks.append(chunk.blocks[position // size])
        offsets.append(position % size)
    heads = np.arange(pool.num_kv_heads)[:, None]
    places = (np.concatenate(blocks), heads, np.concatenate(offsets))
    return [to_device(place, pool.data.device) for place in places]


def _unroll(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A layer's (num_blocks, K, S, D) -> (1, K, length, D) of the trajectory lying in `blocks`."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]
