"""Attention of the decoding rows on a CPU: blocks are visited where they lie in the cache.

Gathering a row's blocks into one padded tensor, as is usual, costs several times the attention
itself. Here the loop runs over blocks instead of rows: each block is visited once, with the queries
of all rows that hold it, and the partial results of a row are merged at the end. Nothing is copied,
nothing is padded to the longest row, and a prompt that a group shares is read once per step.

T tokens of a step, R decoding rows among them (they come first), H query heads, K key/value heads,
D head size, S tokens in a block, B blocks in a row's table, N blocks of a visit, C rows that share
a block, M parts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtsql.engine.blocks import BlockPool, to_device

VISIT_PARTS = 400  # a visit costs about as much as this many parts of another (measured)
SPARSE = 4
"""Copying a used block costs about as much as visiting this many unused ones, divided by one more
than the number of tokens that meet each block (measured)."""


@dataclass(frozen=True)
class _Visit:
    """N blocks that meet the queries of at most C rows each, in one batched matmul."""

    blocks: slice | Tensor  # a range of the pool, which is read in place, or a list (N,)
    parts: slice  # where the N*K*C*H/K parts lie among all M
    scores: Tensor  # (N*K, C*H/K, S), a view of all parts' scores
    outs: Tensor  # (N*K, C*H/K, D), a view of all parts' outputs


class BlockVisits:
    """Attention of one new token in each of R rows, block by block, on a CPU.

    A *part* is a query head of a row at one block. Each part has a softmax of its own. The output
    of a row is the mean of its parts' outputs, weighted by the exponentials of their log-sum-exps.

    Two rows of a group with blocks of 4 tokens; the prompt has 8 tokens:

        block tables            pool       0  1  2  3 ... 8  9
        row a, 11 tokens: 8 9 0            a  b           P  P
        row b, 10 tokens: 8 9 1

        visit of own blocks, C = 1         visit of shared blocks, C = 2
        block 0: a                         block 8: a b
        block 1: b                         block 9: a b

        part      0    1    2    3    4    5         (one query head, one key head)
        block     0    1    8    8    9    9
        row       a    b    a    b    a    b

        row a finds the parts of its table's blocks at 2 4 0, row b at 3 5 1

    Prompts lie at the top of the pool and a row's own blocks at the bottom, so each of the two
    visits is dense. Unused blocks in between are visited too, but no row looks for their parts.
    """

    def __init__(
        self,
        pool: BlockPool,
        num_heads: int,
        num_tokens: int,
        tables: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """`tables` and `lengths` as for `step_context`; `num_tokens`: T."""
        self.pool = pool
        self.num_rows = len(lengths)
        num_blocks = -(-lengths // pool.block_size)  # (R,)
        is_used = np.arange(tables.shape[1]) < num_blocks[:, None]  # (R, B)
        begin, stride, drawn = _plan_visits(pool, num_heads, tables, is_used)
        self._find_parts(num_heads, num_tokens, begin, stride, drawn)
        every_row = torch.arange(self.num_rows, device=pool.data.device)
        last_block = to_device(num_blocks - 1, pool.data.device)
        self.last = self.found[every_row, :, last_block].flatten()  # (R*H,) parts at last blocks
        self._make_buffers(num_heads, drawn)
        self._mask_unused(num_heads, lengths, is_used)

    def _find_parts(
        self,
        num_heads: int,
        num_tokens: int,
        begin: np.ndarray,
        stride: np.ndarray,
        drawn: list[tuple[slice | np.ndarray, np.ndarray]],
    ) -> None:
        """Extend the plan of `_plan_visits` to query heads: which query each part takes, and at
        which parts a row finds its results."""
        device = self.pool.data.device
        num_kv_heads = self.pool.num_kv_heads
        per_head = num_heads // num_kv_heads  # query heads of a key head
        kv_head = torch.arange(num_kv_heads, device=device)
        head = torch.arange(per_head, device=device)
        # Where the T tokens of a query head begin in the flat queries (H*T): (K, 1, H/K)
        first = (kv_head[:, None, None] * per_head + head) * num_tokens
        queries = []
        for _, rows in drawn:
            of_rows = to_device(rows, device)[:, None, :, None]  # (N, 1, C, 1)
            queries.append((first + of_rows).flatten())  # (N*K*C*H/K,)
        self.queries = torch.cat(queries)  # (M,)
        begin_of = to_device(begin, device)[:, None, None]  # (R, 1, 1, B)
        stride_of = to_device(stride, device)[:, None, None]  # (R, 1, 1, B)
        found = begin_of + kv_head[:, None, None] * stride_of  # (R, K, 1, B)
        self.found = (found * per_head + head[:, None]).flatten(1, 2)  # (R, H, B)

    def _make_buffers(
        self, num_heads: int, drawn: list[tuple[slice | np.ndarray, np.ndarray]]
    ) -> None:
        """Memory for the scores and outputs of all parts, which every layer overwrites."""
        pool = self.pool
        per_head = num_heads // pool.num_kv_heads
        num_parts = len(self.queries)  # M
        self.scores = pool.data.new_empty(num_parts, pool.block_size)
        self.outs = pool.data.new_empty(num_parts, pool.head_dim)
        self.visits: list[_Visit] = []
        start = 0
        for blocks, rows in drawn:
            num_blocks, num_rows = rows.shape  # N, C
            shape = (num_blocks * pool.num_kv_heads, num_rows * per_head)  # N*K, C*H/K
            parts = slice(start, start + shape[0] * shape[1])
            device = pool.data.device
            places = blocks if isinstance(blocks, slice) else to_device(blocks, device)
            scores = self.scores[parts].view(*shape, -1)
            outs = self.outs[parts].view(*shape, -1)
            self.visits.append(_Visit(places, parts, scores, outs))
            start = parts.stop

    def _mask_unused(self, num_heads: int, lengths: np.ndarray, is_used: np.ndarray) -> None:
        """Masks, to be added: of table entries that a row does not use, and of the offsets in its
        last block that it has not filled. All blocks before the last one are full."""
        size = self.pool.block_size
        dtype = self.pool.data.dtype
        device = self.pool.data.device
        precise = np.float64 if dtype == torch.float64 else np.float32
        no_entry = np.where(is_used, 0, -np.inf).astype(precise)  # (R, B)
        self.no_entry = to_device(no_entry, device)[:, None]  # (R, 1, B)
        is_empty = np.arange(size) > ((lengths - 1) % size)[:, None]  # (R, S)
        no_token = to_device(np.where(is_empty, -np.inf, 0), device).to(dtype)
        self.no_token = no_token[:, None].expand(-1, num_heads, -1).flatten(0, 1)  # (R*H, S)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query (1, H, T, D) -> (R, H, D)."""
        keys = self.pool.keys[layer]
        values = self.pool.values[layer]
        num_heads, _, head_dim = query.shape[1:]
        query = query.reshape(-1, head_dim).index_select(0, self.queries)  # (M, D)
        for visit in self.visits:
            q = query[visit.parts].view(*visit.scores.shape[:2], head_dim)  # (N*K, C*H/K, D)
            k = keys[visit.blocks].flatten(0, 1).transpose(1, 2)  # (N*K, D, S)
            torch.baddbmm(visit.scores, q, k, beta=0, alpha=scale, out=visit.scores)
        self.scores.index_add_(0, self.last, self.no_token)
        scores = self.scores.to(torch.promote_types(keys.dtype, torch.float32))
        probs = scores.softmax(-1)  # (M, S)
        lse = scores.amax(-1) - probs.amax(-1).log_()  # (M,) log-sum-exp of each part
        probs = probs.to(values.dtype)
        for visit in self.visits:
            p = probs[visit.parts].view(visit.scores.shape)  # (N*K, C*H/K, S)
            v = values[visit.blocks].flatten(0, 1)  # (N*K, S, D)
            torch.bmm(p, v, out=visit.outs)
        weights = lse.take(self.found).add_(self.no_entry).softmax(-1)  # (R, H, B)
        weights = weights.to(values.dtype).flatten(0, 1)
        found = self.found.flatten(0, 1)  # (R*H, B)
        out = F.embedding_bag(found, self.outs, per_sample_weights=weights, mode="sum")
        return out.view(self.num_rows, num_heads, head_dim)


def _plan_visits(
    pool: BlockPool, num_heads: int, tables: np.ndarray, is_used: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[slice | np.ndarray, np.ndarray]]]:
    """Which blocks are visited with which rows, and where a row finds its results.

    Parts stand in the order (visit, block, key head, row, query head of that key head). Here they
    are counted without their query heads. Returns, for each entry of the tables, the part of its
    first key head and the distance to that of the next key head, both (R, B); and for each visit
    its N blocks and their rows (N, C), as `_visit` gives them.
    """
    row, column = np.nonzero(is_used)  # (pairs of a row and a block,) each, row by row
    block = tables[row, column]
    kind = _kinds(pool.is_top, block, num_heads)[block]
    begin = np.zeros(is_used.shape, dtype=np.int64)
    stride = np.zeros(is_used.shape, dtype=np.int64)
    drawn = []
    num_parts = 0
    for one in np.unique(kind):
        pick = kind == one
        blocks, rows, index, rank = _visit(block[pick], row[pick])
        num_together = rows.shape[1]  # C
        entry = (row[pick], column[pick])
        begin[entry] = num_parts + index * pool.num_kv_heads * num_together + rank
        stride[entry] = num_together
        num_parts += rows.size * pool.num_kv_heads
        drawn.append((blocks, rows))
    return begin, stride, drawn


def _kinds(is_top: np.ndarray, block: np.ndarray, num_heads: int) -> np.ndarray:
    """The number of the visit that each block of the pool belongs to (blocks of the pool,).

    `block`: the block of each pair of a token and a block. Blocks at the bottom and at the top are
    visited apart. At each end, the blocks that the most tokens see come first, and blocks that
    fewer see join them as long as their padding costs less than a visit of their own.
    """
    count = np.bincount(block, minlength=len(is_top))
    kinds = np.zeros(len(is_top), dtype=np.int64)
    number = 0
    for end in (False, True):
        here = is_top == end
        sizes = np.bincount(count[here])  # blocks by the number of tokens that see them
        most = 0
        for num in np.flatnonzero(sizes)[::-1].tolist():
            if num == 0:
                break
            if most == 0 or sizes[num] * (most - num) * num_heads > VISIT_PARTS:
                number += 1
                most = num
            kinds[here & (count == num)] = number
    return kinds


def _visit(
    block: np.ndarray, row: np.ndarray
) -> tuple[slice | np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How to compute the pairs (block, row) in one batched matmul.

    Returns the N blocks to visit: a range of the pool, which needs no copy, or a list where used
    blocks are rare; the rows (N, C) whose queries meet each block, padded with row 0; and for each
    pair its block's index among the N and its row's among the C.
    """
    order = np.argsort(block, kind="stable")
    unique, start, count = np.unique(block[order], return_index=True, return_counts=True)
    rank = np.empty(len(block), dtype=np.int64)
    rank[order] = np.arange(len(block)) - np.repeat(start, count)
    first = int(unique[0])
    end = int(unique[-1]) + 1
    max_rows = int(count.max())
    blocks: slice | np.ndarray
    num_unused = end - first - len(unique)
    if num_unused * (max_rows + 1) <= SPARSE * len(unique):
        blocks = slice(first, end)
        index = block - first
        rows = np.zeros((end - first, max_rows), dtype=np.int64)
    else:
        blocks = unique
        index = np.searchsorted(unique, block)
        rows = np.zeros((len(unique), max_rows), dtype=np.int64)
    rows[index, rank] = row
    return blocks, rows, index, rank
