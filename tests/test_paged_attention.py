"""Blocks counted by reference; attention over them, on the CPU and by flash-attn, against one written out."""

import numpy as np
import pytest
import torch
from flash_double import attend_causally, stand_in

from mtsql.engine import paged_attention as kvcache
from mtsql.engine.paged_attention import BlockPool, Chunk, PagedContext

HEADS, KV_HEADS, HEAD_DIM, SIZE = 4, 2, 8, 4


def pool(num_blocks: int, dtype=torch.float64) -> BlockPool:
    return BlockPool(2, num_blocks, SIZE, KV_HEADS, HEAD_DIM, dtype, torch.device("cpu"))


def test_blocks_come_from_both_ends_and_go_when_nobody_holds_them():
    ours = pool(6)
    own, shared = ours.take(2), ours.take(3, from_top=True)
    assert (own, shared, ours.free) == ([0, 1], [3, 4, 5], [2])
    ours.share(shared)
    ours.release(shared)
    assert ours.free == [2]
    ours.release(shared + own)
    assert ours.free == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="asked for 7 blocks of the KV cache, 6 are free"):
        ours.take(7)


def test_gaps_are_closed_from_both_ends():
    ours = pool(40)
    own, shared = ours.take(9), ours.take(6, from_top=True)
    ours.data[:] = torch.arange(40, dtype=torch.float64)[:, None]  # a block holds its number
    assert ours.compact() is None
    ours.release(own[1:7] + shared[2:5])
    place = ours.compact()
    assert place[[0, 7, 8]].tolist() == [0, 1, 2] and place[[34, 35, 39]].tolist() == [37, 38, 39]
    left = place[[0, 7, 8, 34, 35, 39]]
    assert ours.data[1, 1, left, 0].tolist() == [0, 7, 8, 34, 35, 39]
    assert sorted({*range(40)} - {*left.tolist()}) == ours.free
    assert (ours.refs[left] == 1).all() and ours.refs.sum() == 6 and ours.compact() is None
    ours.release(left.tolist())
    assert ours.free == list(range(40))


def test_copy_takes_every_layer():
    ours = pool(3)
    ours.data[:, :, 0] = torch.randn(2, 2, KV_HEADS * SIZE * HEAD_DIM, dtype=torch.float64)
    ours.copy(0, 2)
    assert torch.equal(ours.keys[1][2], ours.keys[1][0]) and torch.equal(
        ours.values[0][2], ours.values[0][0]
    )
    assert ours.data.data_ptr() % 64 == 0


@pytest.fixture
def flash_double(monkeypatch):
    stand_in(monkeypatch, kvcache)


def check_step(num_blocks, tables, lengths, chunks, seed=0):
    """One step over a cache full of noise: each token's attention is the dense one of its
    trajectory."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    ours = pool(num_blocks)
    ours.data.copy_(randn(*ours.data.shape))
    num = len(lengths) + sum(chunk.stop - chunk.start for chunk in chunks)
    query, key, value = (randn(1, heads, num, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    context = PagedContext(ours, tables, np.array(lengths, dtype=np.int64), chunks)
    got = context.attend(1, query, key, value, 0.3)
    assert got.shape == (1, num, HEADS, HEAD_DIM)
    parts = [(i, i + 1, length, tables[i]) for i, length in enumerate(lengths)]
    parts += [(chunk.start, chunk.stop, chunk.length, chunk.blocks) for chunk in chunks]
    for start, stop, length, blocks in parts:
        keys, values = (
            cache[1][blocks].transpose(1, 2).flatten(0, 1)[:length]
            for cache in (ours.keys, ours.values)
        )
        new = slice(length - (stop - start), length)
        torch.testing.assert_close(
            keys[new], key[0, :, start:stop].transpose(0, 1)
        )  # it was written there
        torch.testing.assert_close(values[new], value[0, :, start:stop].transpose(0, 1))
        expected = attend_causally(query[0, :, start:stop].transpose(0, 1), keys, values, 0.3)
        torch.testing.assert_close(got[0, start:stop], expected, atol=1e-12, rtol=0)


def steps():
    """(name, blocks in the pool, tables, lengths, chunks) of steps that mix what can be mixed."""
    own = np.array([[5, 3, 9], [2, 0, 0], [7, 1, 0]])
    yield "decoding only", 10, own, [12, 1, 5], []
    yield "a block just full", 10, own, [8, 4, 8], []
    shared = np.array([[11, 10, 0, 1], [11, 10, 2, 0], [11, 10, 3, 0], [9, 8, 4, 0], [9, 8, 5, 0]])
    yield "two groups of unequal size", 12, shared, [14, 12, 9, 10, 11], []
    yield "far apart", 200, np.array([[0, 199, 1], [0, 100, 0]]), [9, 6], []
    chunks = [Chunk(0, 5, 5, np.array([4, 8])), Chunk(5, 8, 11, np.array([1, 2, 3]))]
    yield "chunks only", 10, own[:0], [], chunks
    yield "all at once", 12, shared, [14, 12, 9, 10, 11], [Chunk(5, 11, 10, np.array([7, 6, 0]))]


STEPS = pytest.mark.parametrize("step", list(steps()), ids=lambda step: step[0])


@STEPS
def test_cpu_attention_equals_dense(step):
    check_step(*step[1:])


@STEPS
def test_flash_calls_equal_dense(step, flash_double):
    check_step(*step[1:])
