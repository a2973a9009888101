"""Generation for many multi-turn trajectories at once: every distinct token is computed once, nobody waits.

A *row* is one trajectory: a prompt it shares with its group, then replies (sampled here) and observations
(given to `extend`). Its keys and values stay in the paged cache from its first token to `close`. One `step`
computes the next token of every row that decodes together with chunks of new prompts and observations; a row
whose reply is complete leaves at once and keeps its cache until `extend` or `close`. When the cache is full
the youngest row loses its blocks and is computed again later; since noise belongs to (key, position), its
tokens come out the same.

The engine sees ids only. It uses the model's weights as they are at each step: close all rows before changing
them. On a GPU with flash-attn, steps that only decode run as CUDA graphs.

R rows that draw a token in a step, T tokens computed in it.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.cuda_graphs import DecodeGraphs
from mtsql.engine.paged_attention import FLASH_BLOCK, BlockPool, Chunk, PagedContext, uses_flash
from mtsql.engine.sampling import NoiseKey, SamplingConfig, hash_key, sample, uniform
from mtsql.engine.scheduler import Plan, Prompt, Row, Scheduler
from mtsql.model.decoder import CausalLM
from mtsql.model.sizes import BUDGETS

SUPPORTED = ("llama", "qwen2", "qwen3")  # config.model_type; each is tested against model.generate
MAX_ROWS = 1 << 16  # each row has a table with room for all blocks of the cache
MAX_LOGITS = 1 << 22  # elements of one logits tensor; more rows are sampled in several goes


class StopReason(Enum):
    """Why a reply ended."""

    STOP_ID = "stop_id"
    STOP_STRING = "stop_string"
    REPLY_TOKENS = "reply_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"


@dataclass(frozen=True)
class Completion:
    """One reply: its ids (a stop id included), their log-probs under the sampled distribution, its
    end."""

    handle: int
    ids: list[int]
    logprobs: list[float]
    reason: StopReason


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use."""

    max_rows: int = 64
    """Rows that decode together."""
    block_size: int = 32
    """Tokens in a block of the cache; flash-attn wants a multiple of 256."""
    cache_bytes: int = 1 << 30
    """Memory for keys and values, never exceeded."""
    max_scheduled_tokens: int = 1024
    """Tokens computed in a step: one for each decoding row, the rest for prompts and
    observations."""
    cuda_graphs: bool = True
    """Decode by CUDA graphs where flash-attn runs (a GPU, bfloat16); elsewhere there are none."""

    def __post_init__(self):
        for name in ("max_rows", "block_size", "cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_rows > MAX_ROWS:
            raise ValueError(f"engine.max_rows is {self.max_rows}: it must be at most {MAX_ROWS}")
        if self.max_scheduled_tokens < self.max_rows:
            raise ValueError(
                f"engine.max_scheduled_tokens is {self.max_scheduled_tokens}, less than "
                f"engine.max_rows {self.max_rows}: a step could not give every row its token"
            )


class Engine:
    """See the module's docstring. Not thread-safe: one thread opens, extends, steps and closes."""

    def __init__(
        self,
        model: CausalLM,
        stop_ids: tuple[int, ...],
        sampling: SamplingConfig,
        limits: EngineConfig = EngineConfig(),
        is_stopped: Callable[[list[int]], bool] | None = None,
    ):
        """`model` must be in eval mode.

        `is_stopped` is asked after each sampled token, with the ids of the reply so far, whether
        its text is complete: a stop string can be cut into tokens in many ways, so only who can
        decode them can tell. Keys and values are kept in the dtype of the weights or, inside
        `torch.autocast`, in that of the autocast. Raises ValueError for a model whose attention we
        do not compute, and for a cache smaller than one block.
        """
        config = model.config
        check_attention(config)
        self.model = model
        self.decoder = model.model
        self.head = model.lm_head
        self.stop_ids = frozenset(stop_ids)
        self.sampling = sampling
        self.is_stopped = is_stopped
        self.device = self.head.weight.device
        kind = self.device.type
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else self.head.weight.dtype
        )
        _check_flash_block(limits, self.device, dtype)
        num_bytes = block_bytes(config, limits.block_size, dtype)
        num_blocks = limits.cache_bytes // num_bytes
        if num_blocks < 1:
            raise ValueError(
                f"engine.cache_bytes is {limits.cache_bytes}, less than a block of "
                f"engine.block_size {limits.block_size} tokens ({num_bytes} bytes)"
            )
        num_layers, num_heads, head_dim = cache_shape(config)
        shape = (num_layers, num_blocks, limits.block_size, num_heads, head_dim)
        self.num_embeddings = self.decoder.embed_tokens.weight.shape[0]
        with _memory(limits):
            self.pool = BlockPool(*shape, dtype, self.device)
            self.scheduler = Scheduler(self.pool, limits.max_rows, limits.max_scheduled_tokens)
        by_graphs = limits.cuda_graphs and uses_flash(self.device, dtype)
        self.graphs = DecodeGraphs(self.decoder, self.pool) if by_graphs else None
        self.tokens_computed = 0
        """Tokens run through the model."""
        self.tokens_distinct = 0
        """Those of them that were not computed before: all but what a put-off row had to repeat."""
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
        needed = self.scheduler.num_blocks(len(prompt_ids) + self.sampling.max_trajectory_tokens)
        needed += (
            len(prompt_ids) % self.pool.block_size > 0
        )  # the prompt keeps its last, partly filled block
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
        """Append an observation and ask for the next reply. Without ids the model just goes on.

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
        row.reply_start, row.logprobs = len(row.ids), []
        self.scheduler.wait(row)

    def _require_known(self, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.num_embeddings:
            raise ValueError(
                f"token id {max(ids)} is not among the model's {self.num_embeddings} embeddings: "
                "the tokenizer belongs to another model"
            )

    def close(self, handle: int) -> None:
        """Forget a row, whatever it is doing, and free its blocks."""
        self.scheduler.remove(self._row(handle))
        del self._rows[handle]

    def preempt(self, handle: int) -> None:
        """Take a row's blocks away for now; it is computed again in its turn and its tokens stay
        the same."""
        self.scheduler.preempt(self._row(handle))

    @property
    def has_work(self) -> bool:
        """Whether `step` can compute something: not if all rows are idle or wait for what idle rows
        hold."""
        return self.scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Compute one batch of tokens; returns the replies that it completed."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() before generating")
        plan = self.scheduler.plan()
        drawing = list(plan.decoding)
        states = []
        if plan.decoding or plan.chunks:
            hidden = self._compute(plan)
            chosen = list(range(len(drawing)))
            for i, (owner, _) in enumerate(plan.chunks, len(drawing)):
                if isinstance(owner, Prompt):
                    if owner.is_ready:
                        owner.hidden = hidden[i].clone()
                elif owner.cached == owner.length:
                    drawing.append(owner)
                    chosen.append(i)
            states.append(hidden[chosen])
        for row in self.scheduler.running():
            if not row.ids and row.prompt.is_ready:
                drawing.append(row)
                states.append(row.prompt.hidden[None])
        return self._draw(drawing, torch.cat(states)) if drawing else []

    def _row(self, handle: int) -> Row:
        if handle not in self._rows:
            raise ValueError(f"handle {handle} is not open")
        return self._rows[handle]

    def _compute(self, plan: Plan) -> Tensor:
        """Run the decoder over the tokens of a step: last hidden states (rows + chunks, width), of
        the decoding rows and at the last token of each chunk."""
        tables, num_blocks = self.scheduler.tables, self.scheduler.num_blocks
        ids = [row.ids[-1] for row in plan.decoding]
        lengths = np.array([row.length for row in plan.decoding], dtype=np.int64)
        positions = [lengths - 1]
        chunks = []
        for owner, num in plan.chunks:
            is_row = isinstance(owner, Row)
            slot = (
                owner.slot if is_row else owner.rows[0].slot
            )  # all of a group begin with its prompt
            before = len(owner.prompt.ids) if is_row else 0
            end = owner.cached + num
            chunks.append(Chunk(len(ids), len(ids) + num, end, tables[slot, : num_blocks(end)]))
            ids += owner.ids[owner.cached - before : end - before]
            positions.append(np.arange(owner.cached, end))
        slots = [row.slot for row in plan.decoding]
        width = num_blocks(int(lengths.max())) if plan.decoding else 0
        if self.graphs is not None and not chunks:
            hidden = self.graphs.run(ids, tables[slots, :width], lengths)
        else:
            wanted = [*range(len(slots)), *(chunk.stop - 1 for chunk in chunks)]
            hidden = self.decoder(
                torch.tensor(ids, device=self.device),
                torch.from_numpy(np.concatenate(positions)).to(self.device),
                PagedContext(self.pool, tables[slots, :width], lengths, chunks),
                torch.tensor(wanted, device=self.device),
            )
        for owner, num in [*((row, 1) for row in plan.decoding), *plan.chunks]:
            owner.cached += num
            self.tokens_computed += num
            self.tokens_distinct += min(num, max(0, owner.cached - owner.seen))
            owner.seen = max(owner.seen, owner.cached)
        return hidden

    def _draw(self, rows: list[Row], hidden: Tensor) -> list[Completion]:
        """Sample the next token of each row from its hidden state (R, width); returns the ended
        replies."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        positions = np.array([len(row.ids) for row in rows])
        noise = torch.from_numpy(uniform(keys, positions)).to(self.device)  # (R,)
        per_go = max(1, MAX_LOGITS // self.head.weight.shape[0])
        drawn = []
        for first in range(0, len(rows), per_go):
            part = slice(first, first + per_go)
            ids, logprobs = sample(self.head(hidden[part]), self.sampling, noise[part])
            drawn.append(torch.stack((ids.double(), logprobs.double())))
        ids, logprobs = torch.cat(drawn, dim=1).tolist()  # the step's one transfer to the host
        completions = []
        for row, new_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(int(new_id))
            row.logprobs.append(logprob)
            reason = self._stop_reason(row)
            if reason is not None:
                row.is_idle = True
                completions.append(
                    Completion(row.handle, row.ids[row.reply_start :], row.logprobs, reason)
                )
        return completions

    def _stop_reason(self, row: Row) -> StopReason | None:
        if row.ids[-1] in self.stop_ids:
            return StopReason.STOP_ID
        if self.is_stopped is not None and self.is_stopped(row.ids[row.reply_start :]):
            return StopReason.STOP_STRING
        if len(row.ids) >= self.sampling.max_trajectory_tokens:
            return StopReason.TRAJECTORY_TOKENS
        if len(row.logprobs) >= self.sampling.max_reply_tokens:
            return StopReason.REPLY_TOKENS
        return None


def cache_shape(shape) -> tuple[int, int, int]:
    """Layers, key and value heads, and width of a head. `shape`: a configuration of transformers,
    or an `EmbeddedConfig`."""
    if (num_kv_heads := getattr(shape, "num_kv_heads", None)) is not None:
        return shape.num_layers, num_kv_heads, shape.head_dim
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return shape.num_hidden_layers, shape.num_key_value_heads, head_dim


def block_bytes(shape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block of the cache; `shape` as in `cache_shape`."""
    num_layers, num_heads, head_dim = cache_shape(shape)
    return 2 * num_layers * num_heads * block_size * head_dim * dtype.itemsize


def _check_flash_block(limits: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    if uses_flash(device, dtype) and limits.block_size % FLASH_BLOCK:
        raise ValueError(
            f"engine.block_size is {limits.block_size}: flash-attn wants a multiple of "
            f"{FLASH_BLOCK}"
        )


def check_engine(limits: EngineConfig, shape, max_tokens: int, dtype: torch.dtype) -> None:
    """ValueError that names the key of `engine` if a prompt with its trajectory, `max_tokens`
    together, does not fit in the cache, if this machine has no memory for the cache (seen here
    without a GPU only), and for a model that the engine cannot run.

    `shape` as in `cache_shape`, so no weights are needed; `dtype` is that of keys and values,
    `ModelConfig.compute_dtype`.
    """
    if hasattr(shape, "model_type"):
        check_attention(shape)
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
        with _memory(limits):
            mmap.mmap(-1, limits.cache_bytes).close()  # only reserved, so it takes no time


@contextmanager
def _memory(limits: EngineConfig) -> Iterator[None]:
    """Turns the system's refusal of memory into a ValueError that names the keys."""
    try:
        yield
    except (OSError, MemoryError, OverflowError, torch.OutOfMemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no memory for engine.cache_bytes {limits.cache_bytes} with engine.max_rows "
            f"{limits.max_rows}: lower them ({reason})"
        ) from error


def check_attention(config) -> None:
    """ValueError unless the engine's attention computes exactly what the model's own would."""
    where = f"model.path {folder}: " if (folder := config.name_or_path) else ""
    if config.model_type not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise ValueError(
            f"{where}model type {config.model_type!r} is not supported: take one of {known}"
        )
    unsupported = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if unsupported:
        raise ValueError(
            f"{where}layers with {', '.join(sorted(unsupported))} are not supported: take a model "
            "with full attention"
        )
