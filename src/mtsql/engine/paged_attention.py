"""Attention of one engine step over the blocks of the cache.

A step computes one new token for each decoding row and several for each chunk (a stretch of a
prompt or of an observation). The new keys and values are written to their blocks first; then every
token sees its own trajectory up to itself.

`model/attention_path.py` chooses among three ways. On a GPU flash-attn reads the cache through the
rows' block tables; without flash-attn the blocks are gathered for torch's attention
(`gathered_attention.py`). On a CPU the decoding rows are computed block by block
(`block_visits.py`) and each chunk by torch's attention.

T tokens of a step, R decoding rows among them (they come first), Q sequences (rows and chunks),
H query heads, K key/value heads, D head size, S tokens in a block, B blocks in a row's table.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtsql.engine.block_visits import BlockVisits
from mtsql.engine.blocks import BlockPool, to_device
from mtsql.engine.gathered_attention import Gathered
from mtsql.engine.uploads import upload
from mtsql.model.attention_path import flash_attn_varlen_func, path_for

MANY_QUERIES = 64
"""flash-attn gives each of its thread blocks this many queries of a sequence over a paged cache."""


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-attn computes the attention of the engine."""
    return path_for(device, dtype).generation == "flash"


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
    device = pool.data.device
    if not pool.by_tables:
        tensors = upload(places, device)
        return CpuContext(pool, tensors, num_heads, tables, lengths, num_new, chunks)
    sequences = _sequences(tables, lengths, num_new, chunks)
    if pool.use_flash:
        edges = sequences.edges()
        *tensors, all_tables, query_edges, key_edges = upload(
            [*places, sequences.tables, *edges], device
        )
        max_queries = int(sequences.num_new.max())
        max_keys = int(sequences.lengths.max())
        return FlashContext(
            pool, tensors, all_tables, query_edges, key_edges, max_queries, max_keys
        )
    gathered = Gathered(pool, num_heads, *sequences)
    return GatheredContext(pool, upload(places, device), gathered)


class PagedContext:
    """Writes the new keys and values of a step to their blocks; subclasses attend to them."""

    def __init__(self, pool: BlockPool, places: list[Tensor]) -> None:
        """`places`: block (T,) and offset in the block (T,) of each new token."""
        self.pool = pool
        blocks, offsets = places
        heads = torch.arange(pool.num_kv_heads, device=blocks.device)[:, None]  # (K, 1)
        self.places = [blocks, heads, offsets]

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


class GatheredContext(PagedContext):
    """Attention by torch over gathered blocks, on any device and in any dtype."""

    def __init__(self, pool: BlockPool, places: list[Tensor], gathered: Gathered) -> None:
        super().__init__(pool, places)
        self.gathered = gathered

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """query (1, H, T, D) -> (T, H, D); keys and values are read from the cache."""
        return self.gathered.attend(layer, query, scale)


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
            row, position = new_tokens(lengths, num_new)
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


def new_tokens(lengths: np.ndarray, num_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
) -> list[np.ndarray]:
    """Where new keys and values go: block (T,) and offset in the block (T,)."""
    size = pool.block_size
    row, position = new_tokens(lengths, num_new)
    blocks = [tables[row, position // size]]
    offsets = [position % size]
    for chunk in chunks:
        position = np.arange(chunk.length - (chunk.stop - chunk.start), chunk.length)
        blocks.append(chunk.blocks[position // size])
        offsets.append(position % size)
    return [np.concatenate(blocks), np.concatenate(offsets)]


class Sequences(NamedTuple):
    """Decoding rows and chunks of a step as one batch. The T tokens stand in their order."""

    tables: np.ndarray
    """Block tables (Q, B) int32."""
    lengths: np.ndarray
    """Tokens of each with the new ones, (Q,) int64."""
    num_new: np.ndarray
    """New tokens of each, (Q,) int64."""

    def edges(self) -> list[np.ndarray]:
        """Where the new tokens, and all tokens, of each sequence begin and end if the sequences
        stand side by side: two arrays (Q + 1,) int32."""
        edges = np.zeros((2, len(self.lengths) + 1), dtype=np.int32)
        np.cumsum(self.num_new, out=edges[0, 1:])
        np.cumsum(self.lengths, out=edges[1, 1:])
        return list(edges)


def _sequences(
    tables: np.ndarray, lengths: np.ndarray, num_new: np.ndarray, chunks: list[Chunk]
) -> Sequences:
    num_rows = len(lengths)
    width = max([tables.shape[1], *(len(chunk.blocks) for chunk in chunks)])
    all_tables = np.zeros((num_rows + len(chunks), width), dtype=np.int32)
    all_tables[:num_rows, : tables.shape[1]] = tables
    for line, chunk in zip(all_tables[num_rows:], chunks, strict=True):
        line[: len(chunk.blocks)] = chunk.blocks
    chunk_lengths = np.array([chunk.length for chunk in chunks], dtype=np.int64)
    of_chunks = np.array([chunk.stop - chunk.start for chunk in chunks], dtype=np.int64)
    return Sequences(
        all_tables,
        np.concatenate([lengths, chunk_lengths]),
        np.concatenate([num_new, of_chunks]),
    )


def _unroll(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """A layer's (num_blocks, K, S, D) -> (1, K, length, D) of the trajectory lying in `blocks`."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length]
