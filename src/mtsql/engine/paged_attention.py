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
    from flash_attn import flash_attn_varlen_func
except ImportError:  # CPUs have no flash-attn; the extra `gpu` brings it
    flash_attn_varlen_func = None

FLASH_BLOCK = 256  # flash-attn's paged cache wants a block size that is a multiple of this


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn computes the attention: it is installed and supports device and dtype."""
    return flash_attn_varlen_func is not None and device.type == "cuda" and dtype.itemsize == 2


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
    num_new: np.ndarray,
    chunks: list[Chunk],
) -> "PagedContext":
    """The attention of one step: R decoding rows, then chunks of several tokens.

    `tables` (R, B), `lengths` (R,) and `num_new` (R,): block table, context length with all new
    tokens, and number of new tokens (1 and the row's draft) of each decoding row; entries past a
    row's last block are ignored. `num_heads`: query heads.
    """
    places = _new_places(pool, tables, lengths, num_new, chunks)
    if not pool.use_flash:
        return CpuContext(pool, places, num_heads, tables, lengths, num_new, chunks)
    return FlashContext(pool, places, *_ragged(tables, lengths, num_new, chunks, pool.data.device))


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
    """Attention by flash-attn, which reads the blocks that a sequence's table names. A sequence is
    a decoding row or a chunk."""

    def __init__(
        self,
        pool: BlockPool,
        places: list[Tensor],
        tables: Tensor,
        query_edges: Tensor,
        key_edges: Tensor,
        max_queries: int,
        max_keys: int,
    ) -> None:
        """tables (Q, B), query_edges and key_edges (Q + 1,) int32 on the device: block table and
        cumulated numbers of new tokens and of all tokens of Q sequences; max_queries and max_keys:
        upper bounds of both for one sequence."""
        super().__init__(pool, places)
        self.tables = tables
        self.query_edges = query_edges
        self.key_edges = key_edges
        self.max_queries = max_queries
        self.max_keys = max_keys

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """query (1, H, T, D) -> (T, H, D); keys and values are read from the cache."""
        out: Tensor = flash_attn_varlen_func(
            query[0].transpose(0, 1),  # (T, H, D)
            self.pool.keys[layer].transpose(1, 2),  # (num_blocks, S, K, D)
            self.pool.values[layer].transpose(1, 2),
            self.query_edges,
            self.key_edges,
            self.max_queries,
            self.max_keys,
            softmax_scale=scale,
            causal=True,
            block_table=self.tables,
        )
        return out


def _ragged(
    tables: np.ndarray,
    lengths: np.ndarray,
    num_new: np.ndarray,
    chunks: list[Chunk],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Rows and chunks as one batch of sequences: the last five arguments of `FlashContext`."""
    num_rows = len(lengths)
    all_new = [*num_new.tolist(), *(chunk.stop - chunk.start for chunk in chunks)]
    all_lengths = [*lengths.tolist(), *(chunk.length for chunk in chunks)]
    width = max([tables.shape[1], *(len(chunk.blocks) for chunk in chunks)])
    all_tables = np.zeros((len(all_new), width), dtype=np.int32)
    all_tables[:num_rows, : tables.shape[1]] = tables
    for line, chunk in zip(all_tables[num_rows:], chunks, strict=True):
        line[: len(chunk.blocks)] = chunk.blocks
    return (
        to_device(all_tables, device),
        to_device(np.cumsum([0, *all_new], dtype=np.int32), device),
        to_device(np.cumsum([0, *all_lengths], dtype=np.int32), device),
        max(all_new),
        max(all_lengths),
    )


class CpuContext(PagedContext):
    """Attention on a CPU: `BlockVisits` for the decoding rows, torch's SDPA for each chunk."""

    def __init__(
        self,
        pool: BlockPool,
        places: list[Tensor],
        num_heads: int,
        tables: np.ndarray,
        lengths: np.ndarray,
        num_new: np.ndarray,
        chunks: list[Chunk],
    ) -> None:
        """The arguments of `step_context`."""
        super().__init__(pool, places)
        self.chunks = chunks
        num_tokens = len(places[0])
        self.visits = None
        if len(lengths):  # each new token is a row of its own for `BlockVisits`
            row, position = _new_tokens(lengths, num_new)
            self.visits = BlockVisits(pool, num_heads, num_tokens, tables[row], position + 1)

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


def _new_tokens(lengths: np.ndarray, num_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the position in its context of each new token of decoding rows."""
    row = np.repeat(np.arange(len(lengths)), num_new)
    first = np.cumsum(num_new) - num_new  # of each row, among the new tokens
    position = np.arange(len(row)) + (lengths - num_new - first)[row]
    return row, position


def _new_places(
    pool: BlockPool,
    tables: np.ndarray,
    lengths: np.ndarray,
    num_new: np.ndarray,
    chunks: list[Chunk],
) -> list[Tensor]:
    """Where new keys and values go: block (T,), key head (K, 1) and offset in the block (T,)."""
    size = pool.block_size
    row, position = _new_tokens(lengths, num_new)
    blocks = [tables[row, position // size]]
    offsets = [position % size]
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
