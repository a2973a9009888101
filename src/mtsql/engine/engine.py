"""Generation for many multi-turn trajectories at once: every distinct token is computed once, and
no row waits for a slower one.

A *row* is one trajectory: a prompt that it shares with its group, then replies (sampled here) and
observations (given to `extend`). Its keys and values stay in the paged cache from its first token
to `close`. One `step` computes the next token of every row that decodes, together with *chunks* of
new prompts and observations. A row whose reply is complete leaves at once and keeps its cache until
`extend` or `close`. When the cache is full the youngest row is *preempted*: it loses its blocks and
is computed again later. Its tokens come out the same, since noise belongs to (key, position).

A step has three parts, as in nano-vLLM: schedule (`scheduler.py`), run (`_run`), and postprocess
(`_draw`, which samples and ends replies).

The engine sees ids only. It uses the model's weights as they are at each step: close all rows
before changing them. On a GPU with flash-attn, steps that only decode run as CUDA graphs.

R rows that draw a token in a step, T tokens computed in it, W hidden width.
"""

import mmap
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.blocks import BlockPool
from mtsql.engine.config import EngineConfig, ModelShape, block_bytes, cache_memory, cache_shape
from mtsql.engine.counts import EngineCounts
from mtsql.engine.cuda_graphs import DecodeGraphs
from mtsql.engine.paged_attention import FLASH_BLOCK, Chunk, step_context, uses_flash
from mtsql.engine.sampling import NoiseKey, SamplingConfig, hash_key, sample, uniform
from mtsql.engine.scheduler import Plan, Prompt, Row, Scheduler
from mtsql.model.decoder import CausalLM
from mtsql.model.sizes import BUDGETS

MAX_LOGITS = 1 << 22  # elements of one logits tensor; more rows are sampled in parts


class StopReason(Enum):
    """Why a reply ended."""

    STOP_ID = "stop_id"
    REPLY_TOKENS = "reply_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"


@dataclass(frozen=True)
class Completion:
    """One complete reply."""

    handle: int
    ids: list[int]  # a stop id included
    logprobs: list[float]  # of `ids` under the distribution that they were sampled from
    reason: StopReason


class Engine:
    """See the module's docstring. Not thread-safe: one thread opens, extends, steps and closes."""

    def __init__(
        self,
        model: CausalLM,
        stop_ids: tuple[int, ...],
        sampling: SamplingConfig,
        limits: EngineConfig | None = None,
    ) -> None:
        """`model` must be in eval mode.

        Keys and values are kept in the dtype of the weights or, inside `torch.autocast`, in that of
        the autocast. ValueError if the cache is smaller than one block.
        """
        limits = limits or EngineConfig()
        config = model.config
        self.model = model
        self.decoder = model.model
        self.head = model.lm_head
        self.stop_ids = frozenset(stop_ids)
        self.sampling = sampling
        self.device = self.head.weight.device
        dtype = self._cache_dtype()
        use_flash = uses_flash(self.device, dtype)
        _check_flash_block(limits, self.device, dtype)
        num_bytes = block_bytes(config, limits.block_size, dtype)
        num_blocks = limits.cache_bytes // num_bytes
        if num_blocks < 1:
            raise ValueError(
                f"engine.cache_bytes is {limits.cache_bytes}, less than a block of "
                f"engine.block_size {limits.block_size} tokens ({num_bytes} bytes)"
            )
        num_layers, num_kv_heads, head_dim = cache_shape(config)
        shape = (num_layers, num_blocks, limits.block_size, num_kv_heads, head_dim)
        self.num_heads = config.num_attention_heads
        self.num_embeddings = self.decoder.embed_tokens.weight.shape[0]
        with cache_memory(limits):
            self.pool = BlockPool(*shape, dtype, self.device, use_flash)
            self.scheduler = Scheduler(self.pool, limits.max_rows, limits.max_scheduled_tokens)
        by_graphs = limits.cuda_graphs and use_flash
        self.graphs = DecodeGraphs(self.decoder, self.pool) if by_graphs else None
        self.counts = EngineCounts()
        self._rows: dict[int, Row] = {}
        self._next_handle = 0

    def open_group(self, prompt_ids: list[int], noise_keys: list[NoiseKey]) -> list[int]:
        """Start one row per noise key, all from the same prompt; returns their handles.

        Raises ValueError for an empty prompt, and for one that could not reach
        max_trajectory_tokens even with the whole cache to itself.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        self._require_known(prompt_ids)
        needed = self.pool.blocks_for(len(prompt_ids) + self.sampling.max_trajectory_tokens)
        if len(prompt_ids) % self.pool.block_size > 0:
            needed += 1  # the prompt keeps its last, partly filled block
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens with max_trajectory_tokens "
                f"{self.sampling.max_trajectory_tokens} needs {needed} cache blocks and there are "
                f"{self.pool.num_blocks}: raise engine.cache_bytes"
            )
        prompt = Prompt(list(prompt_ids))
        handles = []
        for key in noise_keys:
            row = Row(self._next_handle, prompt, hash_key(key))
            self._next_handle += 1
            self._rows[row.handle] = row
            self.scheduler.wait(row)
            handles.append(row.handle)
        return handles

    def extend(self, handle: int, ids: list[int]) -> None:
        """Append an observation and ask for a reply. Without ids the model continues its text.

        Raises ValueError if the row still decodes, or if max_trajectory_tokens leaves no room for a
        reply.
        """
        row = self._row(handle)
        if not row.is_idle:
            raise ValueError(f"handle {handle} is still decoding: extend it after its completion")
        if len(row.ids) + len(ids) >= self.sampling.max_trajectory_tokens:
            raise ValueError(
                f"{len(ids)} more ids after {len(row.ids)} leave no room for a reply in "
                f"max_trajectory_tokens {self.sampling.max_trajectory_tokens}: close the handle"
            )
        self._require_known(ids)
        row.ids += ids
        row.reply_start = len(row.ids)
        row.logprobs = []
        self.scheduler.wait(row)

    def _require_known(self, ids: list[int]) -> None:
        """ValueError for an id without an embedding."""
        if ids and not 0 <= min(ids) <= max(ids) < self.num_embeddings:
            raise ValueError(
                f"token id {max(ids)} is not among the model's {self.num_embeddings} embeddings: "
                "the tokenizer belongs to another model"
            )

    def close(self, handle: int) -> None:
        """Forget a row, whatever it is doing, and free its blocks."""
        self.scheduler.remove(self._row(handle))
        del self._rows[handle]

    @property
    def has_work(self) -> bool:
        """Whether `step` can compute something. It cannot if all rows are idle, or wait for blocks
        that idle rows hold."""
        return self.scheduler.has_work

    @torch.no_grad()  # inference_mode would turn off autocast's cache of weights
    def step(self) -> list[Completion]:
        """Compute one batch of tokens; returns the replies that it completed."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() before generating")
        plan = self.scheduler.plan()
        rows, hidden = self._run(plan)
        return [] if hidden is None else self._draw(rows, hidden)

    def _cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values: that of the weights or of the autocast around the call."""
        device_type = self.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.head.weight.dtype

    def _row(self, handle: int) -> Row:
        if handle not in self._rows:
            raise ValueError(f"handle {handle} is not open")
        return self._rows[handle]

    def _run(self, plan: Plan) -> tuple[list[Row], Tensor | None]:
        """Compute the plan. Returns the rows that draw a token now, and the hidden states (R, W)
        that they draw it from.

        These are the decoding rows, the rows whose observation is complete, and the rows that have
        no token yet and whose prompt is complete.
        """
        rows = list(plan.decoding)
        states: list[Tensor] = []
        if plan.decoding or plan.chunks:
            hidden = self._compute(plan)
            chosen = list(range(len(rows)))
            for i, (owner, _) in enumerate(plan.chunks, len(rows)):
                if isinstance(owner, Prompt):
                    if owner.is_ready:
                        owner.hidden = hidden[i].clone()
                elif owner.cached == owner.length:
                    rows.append(owner)
                    chosen.append(i)
            states.append(hidden[chosen])
        for row in self.scheduler.running():
            first = row.prompt.hidden
            if not row.ids and row.prompt.is_ready and first is not None:
                rows.append(row)
                states.append(first[None])
        return rows, torch.cat(states) if rows else None

    def _compute(self, plan: Plan) -> Tensor:
        """Run the decoder over the tokens of a plan: last hidden states (rows + chunks, W), of the
        decoding rows and at the last token of each chunk.

        The tokens stand in the plan's order. Two decoding rows, a chunk x and a chunk y:

            ids   a7 b3 x0 x1 x2 y5 y6     the last id of each row, then the chunks
            out    *  *        *     *
        """
        tables = self.scheduler.tables
        ids = [row.ids[-1] for row in plan.decoding]
        lengths = np.array([row.length for row in plan.decoding], dtype=np.int64)
        num_new = np.ones_like(lengths)
        positions = [lengths - 1]
        chunks = []
        for owner, num in plan.chunks:
            end = owner.cached + num
            if isinstance(owner, Row):
                slot = owner.slot
                before = len(owner.prompt.ids)  # tokens that are not in `owner.ids`
            else:
                slot = owner.rows[0].slot  # the tables of all rows of a group begin with its prompt
                before = 0
            blocks = tables[slot, : self.pool.blocks_for(end)]
            chunks.append(Chunk(len(ids), len(ids) + num, end, blocks))
            ids += owner.ids[owner.cached - before : end - before]
            positions.append(np.arange(owner.cached, end))
        slots = [row.slot for row in plan.decoding if row.slot is not None]  # all have one
        width = self.pool.blocks_for(int(lengths.max())) if plan.decoding else 0
        if self.graphs is not None and not chunks:
            hidden = self.graphs.run(ids, tables[slots, :width], lengths)
        else:
            wanted = [*range(len(slots)), *(chunk.stop - 1 for chunk in chunks)]
            hidden = self.decoder(
                torch.tensor(ids, device=self.device),
                torch.from_numpy(np.concatenate(positions)).to(self.device),
                step_context(
                    self.pool, self.num_heads, tables[slots, :width], lengths, num_new, chunks
                ),
                torch.tensor(wanted, device=self.device),
            )
        for row in plan.decoding:
            self._count(row, 1)
        for owner, num in plan.chunks:
            self._count(owner, num)
        return hidden

    def _count(self, owner: Prompt | Row, num: int) -> None:
        """Note that the next `num` tokens of a prompt or row have been computed."""
        owner.cached += num
        self.counts.computed += num
        self.counts.distinct += min(num, max(0, owner.cached - owner.seen))
        owner.seen = max(owner.seen, owner.cached)

    def _draw(self, rows: list[Row], hidden: Tensor) -> list[Completion]:
        """Sample the next token of each row from its hidden state (R, W); returns the replies that
        this ends."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        positions = np.array([len(row.ids) for row in rows])
        noise = torch.from_numpy(uniform(keys, positions)).to(self.device)  # (R,)
        rows_at_once = max(1, MAX_LOGITS // self.head.weight.shape[0])
        drawn = []
        for first in range(0, len(rows), rows_at_once):
            part = slice(first, first + rows_at_once)
            ids, logprobs = sample(self.head(hidden[part]), self.sampling, noise[part])
            drawn.append(torch.stack((ids.double(), logprobs.double())))
        ids, logprobs = torch.cat(drawn, dim=1).tolist()  # the step's only transfer to the host
        completions = []
        for row, new_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(int(new_id))
            row.logprobs.append(logprob)
            reason = self._stop_reason(row)
            if reason is not None:
                row.is_idle = True
                reply = row.ids[row.reply_start :]
                completions.append(Completion(row.handle, reply, row.logprobs, reason))
        return completions

    def _stop_reason(self, row: Row) -> StopReason | None:
        """Why the row's reply ends with its newest token, or None if the reply continues."""
        if row.ids[-1] in self.stop_ids:
            return StopReason.STOP_ID
        if len(row.ids) >= self.sampling.max_trajectory_tokens:
            return StopReason.TRAJECTORY_TOKENS
        if len(row.logprobs) >= self.sampling.max_reply_tokens:
            return StopReason.REPLY_TOKENS
        return None


def _check_flash_block(limits: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    if uses_flash(device, dtype) and limits.block_size % FLASH_BLOCK:
        raise ValueError(
            f"engine.block_size is {limits.block_size}: flash-attn requires a multiple of "
            f"{FLASH_BLOCK}"
        )


def check_engine(
    limits: EngineConfig, shape: ModelShape, max_tokens: int, dtype: torch.dtype
) -> None:
    """Check, before any weights are loaded, that a model can be run with these limits.

    ValueError that names the key of `engine` if a prompt with its trajectory, `max_tokens`
    together, does not fit in the cache, or if this machine has no memory for the cache (checked
    only without a GPU). `dtype` is that of keys and values, `ModelConfig.compute_dtype`.
    """
    _check_flash_block(limits, torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    # A prompt that ends inside a block keeps it for itself, so there may be one block more.
    num_blocks = -(-max_tokens // limits.block_size) + 1
    needed = num_blocks * block_bytes(shape, limits.block_size, dtype)
    if limits.cache_bytes < needed:
        raise ValueError(
            f"engine.cache_bytes is {limits.cache_bytes}, but one prompt with its trajectory "
            f"({BUDGETS}: {max_tokens} tokens, in blocks of engine.block_size {limits.block_size}) "
            f"needs {needed} bytes: raise it"
        )
    if not torch.cuda.is_available():
        with cache_memory(limits):
            mmap.mmap(-1, limits.cache_bytes).close()  # only reserved, so it takes no time
