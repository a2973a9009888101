"""Decode steps as CUDA graphs: one launch a step instead of some hundreds, lest a GPU wait for Python.

A graph repeats the same kernels on the same addresses. So what changes from step to step lies in one tensor of
whole numbers, a line for each row, that is filled anew and read by the captured kernels. There is a graph for
each size of a ladder of batch sizes and table widths; a step takes the next larger one, with its first row
repeated on the lines that are left (which writes the same key and value to the same place again). Graphs are
captured when first needed and last as long as the engine, that is for one rollout: weights may lie elsewhere in
the next.

R rows of a step, N >= R lines, B blocks in a line's table.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.paged_attention import BlockPool, PagedContext

LADDER_STEP = 64  # batch sizes: powers of two up to this, then its multiples
WARM_UPS = (
    2  # runs before a capture: lazily made handles and autocast's copies must not fall into it
)


class TableContext(PagedContext):
    """A decode step whose places all come from one device tensor."""

    def __init__(self, pool: BlockPool, lines: Tensor):
        """lines (N, 4 + B) int64: id, position, block and offset of the new token, then the row's
        block table."""
        _, positions, blocks, offsets = lines[:, :4].unbind(1)
        self.pool, self.chunks, self.num_rows, self.use_flash = pool, [], len(lines), True
        self.places = [
            blocks,
            torch.arange(pool.num_kv_heads, device=lines.device)[:, None],
            offsets,
        ]
        self.tables = lines[:, 4:].to(torch.int32)
        self.lengths = (positions + 1).to(torch.int32)


class DecodeGraphs:
    """Runs decode-only steps of one engine; see the module's docstring."""

    def __init__(self, decoder: torch.nn.Module, pool: BlockPool):
        self.decoder = decoder
        self.pool = pool
        self.captured: dict[tuple[int, int], tuple[Tensor, Callable[[], object], Tensor]] = {}

    def run(self, ids: list[int], tables: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Last hidden states (R, width) of rows whose newest ids (R,) are `ids`; `tables` (R,
        blocks) and `lengths` (R,) as for `PagedContext`. Valid until the next run."""
        num_rows, width = tables.shape
        many = num_rows > LADDER_STEP
        key = -(-num_rows // LADDER_STEP) * LADDER_STEP if many else _power(num_rows), _power(width)
        last, block_size = lengths - 1, self.pool.block_size
        lines = np.zeros((key[0], 4 + key[1]), dtype=np.int64)
        own = lines[:num_rows]
        own[:, 0], own[:, 1], own[:, 3] = ids, last, last % block_size
        own[:, 2] = tables[np.arange(num_rows), last // block_size]
        own[:, 4 : 4 + width] = tables
        lines[num_rows:] = lines[0]
        new = torch.from_numpy(lines)
        if key not in self.captured:
            lines_there = new.to(self.pool.data.device)
            self.captured[key] = lines_there, *capture(lambda: self._forward(lines_there))
        lines_there, replay, hidden = self.captured[key]
        lines_there.copy_(new, non_blocking=True)
        replay()
        return hidden[:num_rows]

    def _forward(self, lines: Tensor) -> Tensor:
        """lines (N, 4 + B) -> (N, width)."""
        return self.decoder(lines[:, 0], lines[:, 1], TableContext(self.pool, lines))


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record what `run` does on the GPU: a function that does it again, and the tensor its result
    will be in."""
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


def _power(num: int) -> int:
    """The smallest power of two that is not below `num`."""
    return 1 << (num - 1).bit_length()
