"""Decode steps as CUDA graphs: one launch a step instead of several hundred, so that a GPU does not
wait for Python.

A graph repeats the same kernels on the same addresses. So everything that changes from step to step
is in one buffer of integers, which is filled before each replay and read by the captured kernels.
There is one graph for each number of tokens of a ladder, each power of two of the table width, and
for steps with drafts and without. A step takes the next larger graph:

    a row of 3 tokens and a row of 1, in a graph of 8 tokens with drafts

    token       a0 a1 a2 b0 a2 a2 a2 a2     the tokens left over repeat the last token of row a
    sequence    a a a    b  a  a  a  a  -- -- two sequences of the eight stay empty

A repeated token writes the same key and value to the same place again. Without drafts each token is
a sequence, and none is empty: flash-attn then takes one query from each sequence without looking at
where it begins.

Graphs are captured when they are first needed and last as long as the engine, that is for one
rollout: the next one may have its weights elsewhere. Under autocast they read the 16-bit copies of
the weights that it keeps until its `with` is left, so the engine must be made and used inside it.

T tokens of a step, R rows, N >= T tokens of a graph, B blocks in a table.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.blocks import BlockPool
from mtsql.engine.paged_attention import MANY_QUERIES, FlashContext, new_tokens
from mtsql.model.decoder import Decoder

LADDER_STEP = 64  # powers of two up to this, then its multiples, later at most eight a doubling
WARM_UPS = 2  # runs before a capture, which must not record lazily made handles and autocast copies


class Size(NamedTuple):
    """What a graph was captured for."""

    num_tokens: int  # N
    width: int  # B
    max_queries: int  # most tokens of a row


class Lines(NamedTuple):
    """Views of the buffer of integers that a graph reads. All int32."""

    ids: np.ndarray  # (N,)
    positions: np.ndarray  # (N,)
    blocks: np.ndarray  # (N,) where the key and value of each token go
    offsets: np.ndarray  # (N,)
    query_edges: np.ndarray  # (N + 1,) where the tokens of each sequence begin and end
    key_edges: np.ndarray  # (N + 1,) cumulated lengths
    tables: np.ndarray  # (N, B)


class Graph(NamedTuple):
    """A captured decode step: what it reads, how to run it, where its result is."""

    host: Tensor  # the buffer, filled here
    lines: Lines  # views of it
    buffer: Tensor  # its copy on the device
    replay: Callable[[], object]
    hidden: Tensor  # (N, width)


class DecodeGraphs:
    """Runs the steps of one engine in which rows only decode; see the module's docstring."""

    def __init__(self, decoder: Decoder, pool: BlockPool) -> None:
        self.decoder = decoder
        self.pool = pool
        self.captured: dict[Size, Graph] = {}
        self.capture = capture
        if pool.data.device.type == "cuda":
            # One graph runs at a time, so all of them may compute in the same memory.
            self.capture = partial(capture, memory=torch.cuda.graph_pool_handle())

    def run(
        self,
        ids: list[int] | np.ndarray,
        tables: np.ndarray,
        lengths: np.ndarray,
        num_new: np.ndarray,
    ) -> Tensor:
        """Last hidden states (T, width) of the new tokens `ids` (T,), which stand row by row.

        `tables` (R, blocks), `lengths` (R,) and `num_new` (R,) as for `step_context`. The result is
        valid until the next run, and the caller must have waited for it by then: the buffer on the
        host is filled again.
        """
        most = int(num_new.max())
        size = Size(
            _next_size(len(ids)),
            _next_power(tables.shape[1]),
            1 if most == 1 else -(-most // MANY_QUERIES) * MANY_QUERIES,
        )
        graph = self.captured.get(size)
        if graph is None:
            graph = self.captured[size] = self._capture(size, ids, tables, lengths, num_new)
        else:
            self._fill(graph.lines, ids, tables, lengths, num_new)
            graph.buffer.copy_(graph.host, non_blocking=True)
        graph.replay()
        return graph.hidden[: len(ids)]

    def _capture(
        self,
        size: Size,
        ids: list[int] | np.ndarray,
        tables: np.ndarray,
        lengths: np.ndarray,
        num_new: np.ndarray,
    ) -> Graph:
        device = self.pool.data.device
        num_integers = sum(_counts(size))
        host = torch.zeros(num_integers, dtype=torch.int32, pin_memory=device.type == "cuda")
        edges = np.cumsum(_counts(size))[:-1]
        parts = np.split(host.numpy(), edges)  # views
        parts[-1] = parts[-1].reshape(size.num_tokens, size.width)
        lines = Lines(*parts)
        self._fill(lines, ids, tables, lengths, num_new)
        buffer = host.to(device, copy=True)
        replay, hidden = self.capture(lambda: self._forward(buffer, size))
        return Graph(host, lines, buffer, replay, hidden)

    def _fill(
        self,
        lines: Lines,
        ids: list[int] | np.ndarray,
        tables: np.ndarray,
        lengths: np.ndarray,
        num_new: np.ndarray,
    ) -> None:
        """Write a step into the buffer of a graph that is large enough."""
        num_tokens = len(ids)
        num_rows, width = tables.shape
        row, position = new_tokens(lengths, num_new)
        lines.ids[:num_tokens] = ids
        lines.positions[:num_tokens] = position
        lines.blocks[:num_tokens] = tables[row, position // self.pool.block_size]
        lines.offsets[:num_tokens] = position % self.pool.block_size
        last = num_new[0] - 1  # the last token of the first row, which is repeated
        for values in lines[:4]:
            values[num_tokens:] = values[last]
        num_left = len(lines.ids) - num_tokens
        end = num_rows + num_left  # sequences that are not empty
        lines.tables[:num_rows, :width] = tables
        lines.tables[num_rows:end] = lines.tables[0]
        for edges, numbers, repeated in (
            (lines.query_edges, num_new, 1),
            (lines.key_edges, lengths, int(lengths[0])),
        ):
            np.cumsum(numbers, out=edges[1 : num_rows + 1])
            edges[num_rows + 1 : end + 1] = edges[num_rows] + repeated * np.arange(1, num_left + 1)
            edges[end + 1 :] = edges[end]

    def _forward(self, buffer: Tensor, size: Size) -> Tensor:
        """The step that the buffer describes -> (N, width). Nothing here reads a value."""
        *_, query_edges, key_edges, tables = buffer.split(_counts(size))
        ids, positions, blocks, offsets = buffer[: 4 * size.num_tokens].long().chunk(4)
        context = FlashContext(
            self.pool,
            [blocks, offsets],
            tables.view(size.num_tokens, size.width),
            query_edges,
            key_edges,
            max_queries=size.max_queries,
            max_keys=size.width * self.pool.block_size,
        )
        return self.decoder(ids, positions, context)


def capture(run: Callable[[], Tensor], memory: Any = None) -> tuple[Callable[[], object], Tensor]:
    """Record what `run` does on the GPU. Returns a function that does it again, and the tensor that
    holds its result. Graphs of the same `memory` (torch.cuda.graph_pool_handle) share it. A
    thread of NCCL may ask the GPU for events meanwhile: only this thread is watched (thread_local).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def _counts(size: Size) -> list[int]:
    """Integers of each part of the buffer, in the order of `Lines`."""
    num = size.num_tokens
    return [num, num, num, num, num + 1, num + 1, num * size.width]


def _next_size(num: int) -> int:
    """The smallest number of tokens of the ladder that is not below `num`."""
    power = _next_power(num)
    step = max(LADDER_STEP, power // 8)
    return power if power <= LADDER_STEP else -(-num // step) * step


def _next_power(num: int) -> int:
    """The smallest power of two that is not below `num`."""
    return 1 << (num - 1).bit_length()
