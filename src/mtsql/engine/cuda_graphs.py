"""Decode steps as CUDA graphs: one launch a step instead of several hundred, so that a GPU does not
wait for Python.

A graph repeats the same kernels on the same addresses. So everything that changes from step to step
is in one tensor of integers, a line for each row, which is filled before each replay and read
by the captured kernels. There is one graph for each size of a ladder of batch sizes and table
widths. A step takes the next larger one; the lines left over repeat its first row, which writes the
same key and value to the same place again. Graphs are captured when they are first needed and last
as long as the engine, that is for one rollout: the next one may have its weights elsewhere.

R rows of a step, N >= R lines, B blocks in a line's table.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtsql.engine.blocks import BlockPool
from mtsql.engine.paged_attention import FlashContext
from mtsql.model.decoder import Decoder

LADDER_STEP = 64  # batch sizes: powers of two up to this, then its multiples
WARM_UPS = 2  # runs before a capture, which must not record lazily made handles and autocast copies
HEADER = 4  # integers of a line before its block table: id, position, block, offset


class TableContext(FlashContext):
    """The attention of a decode step that reads all its places from one device tensor."""

    def __init__(self, pool: BlockPool, lines: Tensor) -> None:
        """lines (N, HEADER + B) int64: id of the new token, its position, the block and the offset
        where its key and value go, and the row's block table."""
        _, positions, blocks, offsets = lines[:, :HEADER].unbind(1)
        heads = torch.arange(pool.num_kv_heads, device=lines.device)[:, None]
        tables = lines[:, HEADER:].to(torch.int32)
        num_lines, width = tables.shape
        query_edges = torch.arange(num_lines + 1, device=lines.device, dtype=torch.int32)
        key_edges = F.pad((positions + 1).cumsum(0), (1, 0)).to(torch.int32)
        super().__init__(
            pool,
            [blocks, heads, offsets],
            tables,
            query_edges,
            key_edges,
            max_queries=1,
            max_keys=width * pool.block_size,
        )


class Graph(NamedTuple):
    """A captured decode step: what it reads, how to run it, where its result is."""

    lines: Tensor  # (N, HEADER + B)
    replay: Callable[[], object]
    hidden: Tensor  # (N, width)


class DecodeGraphs:
    """Runs the steps of one engine in which rows only decode; see the module's docstring."""

    def __init__(self, decoder: Decoder, pool: BlockPool) -> None:
        self.decoder = decoder
        self.pool = pool
        self.captured: dict[tuple[int, int], Graph] = {}  # by (N, B)

    def run(
        self, ids: list[int], tables: np.ndarray, lengths: np.ndarray, num_new: np.ndarray
    ) -> Tensor:
        """Last hidden states (R, width) of rows whose newest ids (R,) are `ids`; `tables` (R,
        blocks) and `lengths` (R,) as for `step_context`. Valid until the next run."""
        num_rows, width = tables.shape
        size = (_next_batch_size(num_rows), _next_power(width))
        new_lines = torch.from_numpy(self._make_lines(size, ids, tables, lengths))
        if size not in self.captured:
            lines = new_lines.to(self.pool.data.device)
            replay, hidden = capture(lambda: self._forward(lines))
            self.captured[size] = Graph(lines, replay, hidden)
        graph = self.captured[size]
        graph.lines.copy_(new_lines, non_blocking=True)
        graph.replay()
        return graph.hidden[:num_rows]

    def _make_lines(
        self, size: tuple[int, int], ids: list[int], tables: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """The lines (N, HEADER + B) of a step, for a graph of this size."""
        num_rows, width = tables.shape
        block_size = self.pool.block_size
        last = lengths - 1
        lines = np.zeros((size[0], HEADER + size[1]), dtype=np.int64)
        rows = lines[:num_rows]
        rows[:, 0] = ids
        rows[:, 1] = last
        rows[:, 2] = tables[np.arange(num_rows), last // block_size]
        rows[:, 3] = last % block_size
        rows[:, HEADER : HEADER + width] = tables
        lines[num_rows:] = lines[0]
        return lines

    def _forward(self, lines: Tensor) -> Tensor:
        """lines (N, 4 + B) -> (N, width)."""
        return self.decoder(lines[:, 0], lines[:, 1], TableContext(self.pool, lines))


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record what `run` does on the GPU. Returns a function that does it again, and the tensor that
    holds its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def _next_batch_size(num: int) -> int:
    """The smallest batch size of the ladder that is not below `num`."""
    if num <= LADDER_STEP:
        return _next_power(num)
    return -(-num // LADDER_STEP) * LADDER_STEP


def _next_power(num: int) -> int:
    """The smallest power of two that is not below `num`."""
    return 1 << (num - 1).bit_length()
