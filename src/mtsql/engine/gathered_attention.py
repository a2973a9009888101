"""Attention over the cache in plain torch, on any device and in any dtype: for GPUs without
flash-attn.

The blocks of sequences of similar length are gathered into one padded tensor, and torch's attention
computes them together. Nothing is read on the host.

T tokens of a step, Q sequences (decoding rows and chunks), B blocks in a table, N sequences of a
part, C most new tokens of one of them, L most tokens of one of them in whole blocks, H query heads,
K key/value heads, G = H/K, D head size, S tokens in a block.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtsql.engine.blocks import BlockPool
from mtsql.engine.uploads import upload

PART_ELEMENTS = 1 << 26
"""Most gathered keys of a part, and most entries of its mask: 128 MB in 16 bits."""


class _Part(NamedTuple):
    """Sequences that are computed together."""

    queries: Tensor  # (N, C) index of each new token among the T
    tables: Tensor  # (N, L/S)
    is_seen: Tensor  # (N, 1, G*C, L)


class Gathered:
    """The attention of one step. Sequences with about as many blocks and about as many new tokens,
    both within a factor of two, make a part."""

    def __init__(
        self,
        pool: BlockPool,
        num_heads: int,
        tables: np.ndarray,
        lengths: np.ndarray,
        num_new: np.ndarray,
    ) -> None:
        """Block tables (Q, B), tokens (Q,) and new tokens (Q,) of the sequences, whose new tokens
        are the T tokens of the step in this order."""
        self.pool = pool
        self.per_head = num_heads // pool.num_kv_heads  # G
        first = np.cumsum(num_new) - num_new  # (Q,)
        found = np.empty(int(num_new.sum()), dtype=np.int64)  # (T,) places among all parts' outputs
        num_outputs = 0
        arrays = []
        for part in _split(pool, self.per_head, lengths, num_new):
            num_queries = int(num_new[part].max())  # C
            num_blocks = pool.blocks_for(int(lengths[part].max()))
            query = np.arange(num_queries)
            is_new = query < num_new[part][:, None]  # (N, C)
            queries = np.where(is_new, first[part][:, None] + query, 0)
            found[queries[is_new]] = num_outputs + np.flatnonzero(is_new)
            num_outputs += is_new.size
            before = lengths[part] - num_new[part]
            arrays += [queries, tables[part, :num_blocks].astype(np.int64), before]
        self.found, *tensors = upload([found, *arrays], pool.data.device)
        self.parts = [
            self._part(*tensors[i : i + 3])  # the three arrays of one part
            for i in range(0, len(tensors), 3)
        ]

    def _part(self, queries: Tensor, tables: Tensor, before: Tensor) -> _Part:
        """Query c of a sequence sees the tokens `before` and the new ones up to itself."""
        num_queries = queries.shape[1]
        num_keys = tables.shape[1] * self.pool.block_size
        key = torch.arange(num_keys, device=queries.device)
        last = before[:, None] + torch.arange(num_queries, device=queries.device)  # (N, C)
        is_seen = key <= last[:, :, None]  # (N, C, L)
        return _Part(queries, tables, is_seen.repeat(1, self.per_head, 1)[:, None])

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query (1, H, T, D) -> (T, H, D)."""
        keys = self.pool.keys[layer].transpose(1, 2)  # (num_blocks, S, K, D)
        values = self.pool.values[layer].transpose(1, 2)
        by_token = query[0].transpose(0, 1)  # (T, H, D)
        outs = []
        for part in self.parts:
            # The G query heads of a key head stand side by side as further queries.
            q = by_token[part.queries].unflatten(2, (-1, self.per_head))  # (N, C, K, G, D)
            q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (N, K, G*C, D)
            k = keys[part.tables].flatten(1, 2).transpose(1, 2)  # (N, K, L, D)
            v = values[part.tables].flatten(1, 2).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.is_seen, scale=scale)
            out = out.unflatten(2, (self.per_head, -1)).permute(0, 3, 1, 2, 4)  # (N, C, K, G, D)
            outs.append(out.reshape(-1, *by_token.shape[1:]))  # (N*C, H, D)
        return torch.cat(outs)[self.found]


def _split(
    pool: BlockPool, per_head: int, lengths: np.ndarray, num_new: np.ndarray
) -> list[np.ndarray]:
    """The sequences (N,) of each part."""
    num_blocks = -(-lengths // pool.block_size)
    kind = np.stack([_power_above(num_blocks), _power_above(num_new)])  # (2, Q)
    parts = []
    for blocks, queries in np.unique(kind, axis=1).T.tolist():
        alike = np.flatnonzero((kind[0] == blocks) & (kind[1] == queries))
        num_keys = blocks * pool.block_size  # at most
        elements = num_keys * max(pool.num_kv_heads * pool.head_dim, per_head * queries)
        at_once = max(1, PART_ELEMENTS // elements)
        parts += [alike[i : i + at_once] for i in range(0, len(alike), at_once)]
    return parts


def _power_above(numbers: np.ndarray) -> np.ndarray:
    """The smallest powers of two that are not below the numbers."""
    powers: np.ndarray = 2 ** np.ceil(np.log2(numbers)).astype(np.int64)
    return powers
