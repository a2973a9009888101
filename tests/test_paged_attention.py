"""Attention over blocks, by its three paths, against attention written out."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from helpers.flash_double import attend_causally, replace_flash_attn
from mtsql.engine import gathered_attention
from mtsql.engine.block_visits import BlockVisits
from mtsql.engine.blocks import BlockPool
from mtsql.engine.paged_attention import Chunk, step_context
from mtsql.engine.uploads import upload

HEADS, KV_HEADS, HEAD_DIM, SIZE = 4, 2, 8, 4
CPU = torch.device("cpu")


class Step(NamedTuple):
    """What a step computes: decoding rows by their tables, lengths and numbers of new tokens, and
    chunks."""

    name: str
    num_blocks: int
    tables: np.ndarray
    lengths: list[int]
    num_new: list[int]
    chunks: list[Chunk]


def steps() -> Iterator[Step]:
    own = np.array([[5, 3, 9], [2, 0, 0], [7, 1, 0]])
    yield Step("decoding only", 10, own, [12, 1, 5], [1, 1, 1], [])
    yield Step("a block just full", 10, own, [8, 4, 8], [1, 1, 1], [])
    shared = np.array([[11, 10, 0, 1], [11, 10, 2, 0], [11, 10, 3, 0], [9, 8, 4, 0], [9, 8, 5, 0]])
    yield Step("two groups of unequal size", 12, shared, [14, 12, 9, 10, 11], [1] * 5, [])
    yield Step("far apart", 200, np.array([[0, 199, 1], [0, 100, 0]]), [9, 6], [1, 1], [])
    chunks = [Chunk(0, 5, 5, np.array([4, 8])), Chunk(5, 8, 11, np.array([1, 2, 3]))]
    yield Step("chunks only", 10, own[:0], [], [], chunks)
    chunk = Chunk(5, 11, 10, np.array([7, 6, 0]))
    yield Step("rows and a chunk", 12, shared, [14, 12, 9, 10, 11], [1] * 5, [chunk])
    yield Step("drafts", 10, own, [12, 2, 5], [4, 1, 2], [])
    chunk = Chunk(9, 15, 10, np.array([7, 6, 0]))
    yield Step("drafts and a chunk", 12, shared, [14, 12, 9, 10, 11], [3, 1, 1, 2, 2], [chunk])


STEPS = pytest.mark.parametrize("step", list(steps()), ids=lambda step: step.name)


def check_step(
    step: Step, use_flash: bool, by_tables: bool = False, dtype: torch.dtype = torch.float64
) -> None:
    """One step over a cache full of noise: each token's attention is the dense one of its
    trajectory, in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    shape = (2, step.num_blocks, SIZE, KV_HEADS, HEAD_DIM)
    pool = BlockPool(*shape, dtype, CPU, use_flash=use_flash)
    pool.by_tables |= by_tables  # as on a GPU
    pool.data.copy_(randn(*pool.data.shape))
    num = sum(step.num_new) + sum(chunk.stop - chunk.start for chunk in step.chunks)
    query = randn(1, HEADS, num, HEAD_DIM)
    key = randn(1, KV_HEADS, num, HEAD_DIM)
    value = randn(1, KV_HEADS, num, HEAD_DIM)
    lengths = np.array(step.lengths, dtype=np.int64)
    num_new = np.array(step.num_new, dtype=np.int64)
    context = step_context(pool, HEADS, step.tables, lengths, num_new, step.chunks)
    got = context.attend(1, query, key, value, 0.3)
    assert got.shape == (1, num, HEADS, HEAD_DIM)

    ends = np.cumsum(num_new)
    rows = [
        Chunk(end - num, end, length, table)
        for end, num, length, table in zip(ends, num_new, lengths, step.tables, strict=True)
    ]
    for chunk in rows + step.chunks:
        inside = slice(chunk.start, chunk.stop)
        keys = pool.keys[1][chunk.blocks].transpose(1, 2).flatten(0, 1)[: chunk.length]
        values = pool.values[1][chunk.blocks].transpose(1, 2).flatten(0, 1)[: chunk.length]
        new = slice(chunk.length - (chunk.stop - chunk.start), chunk.length)
        # The new keys and values were written to their places.
        torch.testing.assert_close(keys[new], key[0, :, inside].transpose(0, 1))
        torch.testing.assert_close(values[new], value[0, :, inside].transpose(0, 1))
        queries = query[0, :, inside].transpose(0, 1)
        exact = attend_causally(queries.double(), keys.double(), values.double(), 0.3)
        atol = 1e-12 if dtype == torch.float64 else 0.02
        torch.testing.assert_close(got[0, inside].double(), exact, atol=atol, rtol=0)


@STEPS
def test_cpu_attention_equals_dense(step):
    check_step(step, use_flash=False)


@STEPS
def test_flash_attention_equals_dense(step, monkeypatch):
    replace_flash_attn(monkeypatch)
    check_step(step, use_flash=True)


@STEPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gathered_attention_equals_dense(step, dtype):
    check_step(step, use_flash=False, by_tables=True, dtype=dtype)


def test_little_memory_makes_small_parts(monkeypatch):
    monkeypatch.setattr(gathered_attention, "PART_ELEMENTS", 1)
    for step in steps():
        check_step(step, use_flash=False, by_tables=True)


def test_sequences_of_similar_length_are_gathered_together():
    pool = BlockPool(1, 90, SIZE, KV_HEADS, HEAD_DIM, torch.float32, CPU)
    lengths = np.array([33, 64, 40, 5, 8, 200])
    num_new = np.array([1, 1, 1, 1, 1, 150])
    tables = np.zeros((6, 50), dtype=np.int32)
    parts = gathered_attention.Gathered(pool, HEADS, tables, lengths, num_new).parts
    shapes = [(len(part.tables), part.tables.shape[1] * SIZE) for part in parts]
    assert sorted(shapes) == [(1, 200), (2, 8), (3, 64)]


def test_an_upload_keeps_shapes_and_dtypes():
    arrays = [
        np.arange(6).reshape(2, 3),
        np.zeros(0, dtype=np.int64),
        np.array([7], dtype=np.int32),
    ]
    for device in (CPU, torch.device("meta")):
        tensors = upload(arrays, device)
        assert [tuple(t.shape) for t in tensors] == [(2, 3), (0,), (1,)]
        assert [t.dtype for t in tensors] == [torch.int64, torch.int64, torch.int32]


def test_a_shared_block_is_visited_once_with_all_its_rows():
    """The drawing in the docstring of `BlockVisits`."""
    pool = BlockPool(1, 10, SIZE, 1, HEAD_DIM, torch.float32, CPU)
    pool.take(2)
    pool.take(2, from_top=True)
    tables = np.array([[8, 9, 0], [8, 9, 1]])
    visits = BlockVisits(pool, 1, 2, tables, np.array([11, 10]))
    assert [visit.blocks for visit in visits.visits] == [slice(0, 2), slice(8, 10)]
    assert visits.queries.tolist() == [0, 1, 0, 1, 0, 1]
    assert visits.found.tolist() == [[[2, 4, 0]], [[3, 5, 1]]]
