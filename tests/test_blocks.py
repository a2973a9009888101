"""Blocks are counted by reference, taken from both ends of the pool, and moved together."""

import pytest
import torch

from mtsql.engine.blocks import BlockPool

KV_HEADS, HEAD_DIM, SIZE = 2, 8, 4


def make_pool(num_blocks: int) -> BlockPool:
    return BlockPool(2, num_blocks, SIZE, KV_HEADS, HEAD_DIM, torch.float64, torch.device("cpu"))


def test_blocks_are_taken_from_both_ends_and_free_when_no_row_holds_them():
    pool = make_pool(6)
    own = pool.take(2)
    shared = pool.take(3, from_top=True)
    assert (own, shared, pool.empty) == ([0, 1], [3, 4, 5], [2])
    pool.share(shared)
    pool.release(shared)
    assert pool.empty == [2]
    pool.release(shared + own)
    assert pool.empty == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="asked for 7 blocks of the KV cache, 6 are free"):
        pool.take(7)


def test_compact_closes_gaps_at_both_ends():
    pool = make_pool(40)
    own = pool.take(9)
    shared = pool.take(6, from_top=True)
    pool.data[:] = torch.arange(40, dtype=torch.float64)[:, None]  # a block holds its number
    assert pool.compact() is None
    pool.release(own[1:7] + shared[2:5])
    place = pool.compact()
    assert place[[0, 7, 8]].tolist() == [0, 1, 2]
    assert place[[34, 35, 39]].tolist() == [37, 38, 39]
    left = place[[0, 7, 8, 34, 35, 39]]
    assert pool.data[1, 1, left, 0].tolist() == [0, 7, 8, 34, 35, 39]
    assert sorted({*range(40)} - {*left.tolist()}) == pool.empty
    assert (pool.refs[left] == 1).all()
    assert pool.refs.sum() == 6
    assert pool.compact() is None
    pool.release(left.tolist())
    assert pool.empty == list(range(40))


def test_copy_takes_every_layer():
    pool = make_pool(3)
    pool.data[:, :, 0] = torch.randn(2, 2, KV_HEADS * SIZE * HEAD_DIM, dtype=torch.float64)
    pool.copy(0, 2)
    assert torch.equal(pool.keys[1][2], pool.keys[1][0])
    assert torch.equal(pool.values[0][2], pool.values[0][0])
    assert pool.data.data_ptr() % 64 == 0
