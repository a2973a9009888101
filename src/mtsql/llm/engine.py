"""Generation for many multi-turn trajectories at once: every distinct token is computed once, nobody waits.

A *row* is one trajectory: a prompt it shares with its group, then replies (sampled here) and observations (given to
`extend`). Its keys and values stay in the paged cache from its first token to `close`. One `step` computes the next
token of every row that decodes together with chunks of new prompts and observations; a row whose reply is complete
leaves at once and waits, keeping its cache, for `extend` or `close`. When the cache is full the youngest row loses its
blocks and is computed again later; since noise belongs to (key, position), its tokens come out the same.

The engine sees ids only. It uses the model's weights as they are at each step: close all rows before changing them.
CUDA graphs are not used yet.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from mtsql.llm.attention import ATTENTION_NAME
from mtsql.llm.kvcache import BlockPool, Chunk, PagedContext
from mtsql.llm.sampling import NoiseKey, Sampling, hash_key, sample, uniform

SUPPORTED = ("llama", "qwen2", "qwen3")  # config.model_type; each is tested against model.generate
MAX_LOGITS = 1 << 23  # elements of a logits tensor; more rows are sampled in several goes


class StopReason(Enum):
    """Why a reply ended."""

    STOP_ID = "stop_id"
    STOP_STRING = "stop_string"
    STEP_TOKENS = "step_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"


@dataclass(frozen=True)
class Completion:
    """One reply: its ids (a stop id included), their log-probs under the sampled distribution, why it ended."""

    handle: int
    ids: list[int]
    logprobs: list[float]
    reason: StopReason


@dataclass(frozen=True)
class EngineLimits:
    """What the engine may use.

    Attributes:
        max_rows: rows computed together in a step.
        block_size: tokens per cache block; flash-attn on GPUs wants a multiple of 256.
        cache_bytes: memory for keys and values, taken at the start and never exceeded.
        max_step_batch_tokens: tokens computed in a step; what decoding leaves over goes to prompts and observations.
    """

    max_rows: int = 64
    block_size: int = 32
    cache_bytes: int = 1 << 30
    max_step_batch_tokens: int = 1024

    def __post_init__(self):
        if self.max_rows < 1 or self.block_size < 1:
            raise ValueError("max_rows and block_size must be at least 1")
        if self.max_step_batch_tokens < self.max_rows:
            raise ValueError(
                f"max_step_batch_tokens {self.max_step_batch_tokens} is less than max_rows {self.max_rows}: "
                "a step could not give every row its token"
            )


@dataclass(eq=False)
class _Prompt:
    """A prompt and its blocks, which exist while some row of its group is in the cache."""

    ids: list[int]
    rows: list["_Row"] = field(default_factory=list)  # those in the cache
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    seen: int = 0  # most tokens ever cached
    hidden: Tensor | None = None  # (width,) last hidden state: every sample draws its first token from it

    @property
    def is_ready(self) -> bool:
        return self.cached == len(self.ids)


@dataclass(eq=False)
class _Row:
    handle: int
    prompt: _Prompt
    key: int  # hashed noise key
    ids: list[int] = field(default_factory=list)  # after the prompt
    reply_start: int = 0  # where in `ids` the current reply begins
    logprobs: list[float] = field(default_factory=list)  # of the current reply
    is_idle: bool = False  # its reply is handed out
    slot: int | None = None  # line of the block tables while in the cache
    num_blocks: int = 0
    cached: int = 0  # tokens with keys and values, prompt included
    seen: int = 0  # most tokens ever cached

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.ids)


class Engine:
    """See the module's docstring. Not thread-safe: one thread opens, extends, steps and closes."""

    def __init__(
        self,
        model: torch.nn.Module,
        stop_ids: tuple[int, ...],
        sampling: Sampling,
        limits: EngineLimits = EngineLimits(),
        is_stopped: Callable[[list[int]], bool] | None = None,
    ):
        """`model`: a Hugging Face causal LM loaded with attn_implementation="mtsql", in eval mode.

        `is_stopped` is asked after each sampled token, with the ids of the reply so far, whether text has ended it (a
        stop string may be cut into tokens in many ways, so only whoever can decode them can tell).
        Raises ValueError for a model whose attention we do not compute and for a cache too small for a block.
        """
        config = model.config
        _check_attention(config)
        self.model = model
        self.decoder = model.base_model
        self.head = model.get_output_embeddings()
        self.stop_ids = frozenset(stop_ids)
        self.sampling = sampling
        self.limits = limits
        self.is_stopped = is_stopped
        self.device = self.head.weight.device
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = self.head.weight.dtype
        block_bytes = 2 * config.num_hidden_layers * limits.block_size * heads * head_dim * dtype.itemsize
        num_blocks = limits.cache_bytes // block_bytes
        if num_blocks < 1:
            raise ValueError(f"cache_bytes {limits.cache_bytes} is less than one block of {block_bytes} bytes")
        self.pool = BlockPool(
            config.num_hidden_layers, num_blocks, limits.block_size, heads, head_dim, dtype, self.device
        )
        self.tokens_computed = 0
        self.tokens_distinct = 0
        self._rows: dict[int, _Row] = {}
        self._next_handle = 0
        self._waiting: list[_Row] = []  # want to run, not in the cache; oldest first
        self._cached: list[_Row] = []  # in the cache, idle ones included; oldest first
        # Idle rows keep their line of the tables without taking a seat from the running ones.
        num_slots = 2 * limits.max_rows
        self._slots = list(range(num_slots))
        self._tables = np.zeros((num_slots, num_blocks), dtype=np.int64)

    # what the rollout calls

    def open_group(self, prompt_ids: list[int], noise_keys: list[NoiseKey]) -> list[int]:
        """Start one row per noise key, all from the same prompt; returns their handles.

        Raises ValueError for an empty prompt and for one that could not reach max_trajectory_tokens even with the
        whole cache to itself.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        needed = self._blocks(len(prompt_ids) + self.sampling.max_trajectory_tokens)
        needed += len(prompt_ids) % self.pool.block_size > 0  # the prompt keeps its partial block
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and max_trajectory_tokens {self.sampling.max_trajectory_tokens} "
                f"need {needed} cache blocks, there are {self.pool.num_blocks}: raise cache_bytes"
            )
        prompt = _Prompt(list(prompt_ids))
        rows = [_Row(self._next_handle + i, prompt, hash_key(key)) for i, key in enumerate(noise_keys)]
        self._next_handle += len(rows)
        self._rows.update((row.handle, row) for row in rows)
        self._waiting += rows
        return [row.handle for row in rows]

    def extend(self, handle: int, ids: list[int]) -> None:
        """Append an observation and ask for the next reply. With no ids the model just goes on.

        Raises ValueError if the row still decodes or if max_trajectory_tokens leaves no room for a reply.
        """
        row = self._row(handle)
        if not row.is_idle:
            raise ValueError(f"handle {handle} is still decoding: extend it after its completion")
        if len(row.ids) + len(ids) >= self.sampling.max_trajectory_tokens:
            raise ValueError(
                f"{len(ids)} ids after {len(row.ids)} leave no room for a reply in max_trajectory_tokens "
                f"{self.sampling.max_trajectory_tokens}: close the handle"
            )
        row.ids += ids
        row.reply_start = len(row.ids)
        row.logprobs = []
        row.is_idle = False
        if row.slot is None:
            bisect.insort(self._waiting, row, key=_age)

    def close(self, handle: int) -> None:
        """Forget a row, whatever it is doing, and free its blocks."""
        row = self._row(handle)
        if row.slot is not None:
            self._evict(row)
        elif not row.is_idle:
            self._waiting.remove(row)
        del self._rows[handle]

    def put_off(self, handle: int) -> None:
        """Take a row's blocks away; it is computed again when its turn comes. Its tokens do not change."""
        row = self._row(handle)
        if row.slot is not None:
            self._evict(row)
            if not row.is_idle:
                bisect.insort(self._waiting, row, key=_age)

    @property
    def has_work(self) -> bool:
        """Whether `step` can compute something: false when all rows are idle or wait for what idle rows hold."""
        return any(not row.is_idle for row in self._cached) or self._can_admit(0)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Compute one batch of tokens; returns the replies that it completed."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() before generating")
        self._admit()
        decoding, chunks = self._schedule()
        hidden = self._compute(decoding, chunks) if decoding or chunks else None
        # Rows whose pending tokens are all computed draw the next one.
        drawing, index = list(decoding), list(range(len(decoding)))
        at = len(decoding)
        for owner, num in chunks:
            at += num
            if isinstance(owner, _Prompt):
                if owner.is_ready:
                    owner.hidden = hidden[at - 1].clone()
            elif owner.cached == owner.length:
                drawing.append(owner)
                index.append(at - 1)
        states = [hidden[index]] if index else []
        for row in self._running():
            if not row.ids and row.prompt.is_ready:
                drawing.append(row)
                states.append(row.prompt.hidden[None])
        return self._draw(drawing, torch.cat(states)) if drawing else []

    # scheduling

    def _row(self, handle: int) -> _Row:
        if handle not in self._rows:
            raise ValueError(f"handle {handle} is not open")
        return self._rows[handle]

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _running(self) -> list[_Row]:
        """Rows with a seat in this step: the oldest that have something to do."""
        return [row for row in self._cached if not row.is_idle][: self.limits.max_rows]

    def _can_admit(self, num_running: int) -> bool:
        """Whether the oldest waiting row finds a seat, a line of the tables and blocks."""
        if not self._waiting or not self._slots or num_running >= self.limits.max_rows:
            return False
        row = self._waiting[0]
        prompt = len(row.prompt.ids)
        needed = self._blocks(row.length + 1) - prompt // self.pool.block_size
        if not row.prompt.rows:
            needed += self._blocks(prompt)
        # A block of growth for every row that is already in, lest the new one be put off at once. Alone, it fits.
        return needed + len(self._cached) <= len(self.pool.free) or not self._cached

    def _admit(self) -> None:
        num_running = sum(not row.is_idle for row in self._cached)
        while self._can_admit(num_running):
            row = self._waiting.pop(0)
            prompt = row.prompt
            if not prompt.rows:
                prompt.blocks = self.pool.take(self._blocks(len(prompt.ids)), from_top=True)
            self.pool.share(prompt.blocks)
            prompt.rows.append(row)
            row.slot = self._slots.pop()
            row.num_blocks = len(prompt.blocks)
            row.cached = len(prompt.ids)
            self._tables[row.slot, : row.num_blocks] = prompt.blocks
            bisect.insort(self._cached, row, key=_age)
            num_running += 1

    def _evict(self, row: _Row) -> None:
        """Take a row out of the cache, and its prompt with it if it was the last of its group."""
        self.pool.release(self._tables[row.slot, : row.num_blocks].tolist())
        self._slots.append(row.slot)
        row.slot, row.num_blocks, row.cached = None, 0, 0
        self._cached.remove(row)
        prompt = row.prompt
        prompt.rows.remove(row)
        if not prompt.rows:
            self.pool.release(prompt.blocks)
            prompt.blocks, prompt.cached = [], 0

    def _schedule(self) -> tuple[list[_Row], list[tuple[_Prompt | _Row, int]]]:
        """Rows that decode one token, and (prompt or row, number of its next tokens) to prefill, with their blocks."""
        budget = self.limits.max_step_batch_tokens
        decoding: list[_Row] = []
        others: list[_Row] = []
        for row in self._running():
            if row.length - row.cached != 1 or not row.prompt.is_ready:
                others.append(row)
            elif row.slot is not None and self._grow(row, row.length):
                decoding.append(row)
        budget -= len(decoding)
        chunks: dict[_Prompt | _Row, int] = {}
        for row in others:
            owner = row if row.prompt.is_ready else row.prompt
            pending = (row.length if owner is row else len(owner.ids)) - owner.cached
            num = min(pending, budget)
            if row.slot is None or owner in chunks or num == 0:
                continue
            if owner is row and not self._grow(row, row.cached + num):
                continue
            chunks[owner] = num
            budget -= num
        # An older row may have put off one that was scheduled before it.
        decoding = [row for row in decoding if row.slot is not None]
        alive = [(o, n) for o, n in chunks.items() if (o.rows if isinstance(o, _Prompt) else o.slot is not None)]
        return decoding, alive

    def _grow(self, row: _Row, length: int) -> bool:
        """Give a row the blocks for `length` tokens, the next to be written its own; False if it was put off."""
        at = row.cached // self.pool.block_size
        if length <= row.num_blocks * self.pool.block_size and self.pool.refs[self._tables[row.slot, at]] == 1:
            return True
        needed = self._blocks(length)
        must_copy = at < row.num_blocks and self.pool.refs[self._tables[row.slot, at]] > 1
        while len(self.pool.free) < needed - row.num_blocks + must_copy:
            youngest = self._cached[-1]
            self.put_off(youngest.handle)
            if youngest is row:
                return False
        if must_copy:
            shared, (own,) = int(self._tables[row.slot, at]), self.pool.take(1)
            self.pool.copy(shared, own)
            self.pool.release([shared])
            self._tables[row.slot, at] = own
        self._tables[row.slot, row.num_blocks : needed] = self.pool.take(needed - row.num_blocks)
        row.num_blocks = needed
        return True

    # computing

    def _compute(self, decoding: list[_Row], chunks: list[tuple[_Prompt | _Row, int]]) -> Tensor:
        """Run the decoder over the step's tokens; (T, width) last hidden states."""
        ids = [row.ids[-1] for row in decoding]
        lengths = np.array([row.length for row in decoding], dtype=np.int64)  # (R,)
        positions = [lengths - 1]
        spans = []
        for owner, num in chunks:
            is_prompt = isinstance(owner, _Prompt)
            start = owner.cached - (0 if is_prompt else len(owner.prompt.ids))
            slot = owner.rows[0].slot if is_prompt else owner.slot
            end = owner.cached + num
            blocks = self._tables[slot, : self._blocks(end)]
            spans.append(Chunk(len(ids), len(ids) + num, end, blocks))
            ids += owner.ids[start : start + num]
            positions.append(np.arange(owner.cached, end))
        slots = [row.slot for row in decoding]
        width = self._blocks(int(lengths.max())) if decoding else 0
        context = PagedContext(self.pool, self._tables[slots, :width], lengths, spans)
        output = self.decoder(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.from_numpy(np.concatenate(positions))[None].to(self.device),
            use_cache=False,
            attention_context=context,
        )
        self.tokens_computed += len(ids)
        for owner, num in [*((row, 1) for row in decoding), *chunks]:
            owner.cached += num
            self.tokens_distinct += max(0, owner.cached - max(owner.seen, owner.cached - num))
            owner.seen = max(owner.seen, owner.cached)
        return output.last_hidden_state[0]

    def _draw(self, rows: list[_Row], hidden: Tensor) -> list[Completion]:
        """Sample the next token of each row from its hidden state (R, width); returns the replies that ended."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        positions = np.array([len(row.ids) for row in rows])
        noise = torch.from_numpy(uniform(keys, positions)).to(self.device)  # (R,)
        per_go = max(1, MAX_LOGITS // self.head.weight.shape[0])
        drawn = []
        for go in range(0, len(rows), per_go):
            ids, logprobs = sample(self.head(hidden[go : go + per_go]), self.sampling, noise[go : go + per_go])
            drawn.append(torch.stack((ids.double(), logprobs.double())))
        ids, logprobs = torch.cat(drawn, dim=1).tolist()  # the step's one transfer to the host
        completions = []
        for row, new_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(int(new_id))
            row.logprobs.append(logprob)
            reason = self._stop_reason(row)
            if reason is not None:
                row.is_idle = True
                completions.append(Completion(row.handle, row.ids[row.reply_start :], row.logprobs, reason))
        return completions

    def _stop_reason(self, row: _Row) -> StopReason | None:
        if row.ids[-1] in self.stop_ids:
            return StopReason.STOP_ID
        if self.is_stopped is not None and self.is_stopped(row.ids[row.reply_start :]):
            return StopReason.STOP_STRING
        if len(row.ids) >= self.sampling.max_trajectory_tokens:
            return StopReason.TRAJECTORY_TOKENS
        if len(row.logprobs) >= self.sampling.max_step_tokens:
            return StopReason.STEP_TOKENS
        return None


def _age(row: _Row) -> int:
    return row.handle


def _check_attention(config) -> None:
    """ValueError unless "mtsql" attention computes exactly what the model's own would."""
    if config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"the model uses attention {config._attn_implementation!r}: "
            f"call register_attention() and load it with attn_implementation={ATTENTION_NAME!r}"
        )
    if config.model_type not in SUPPORTED:
        raise ValueError(f"model type {config.model_type!r} is not supported: only {', '.join(SUPPORTED)}")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        raise ValueError(f"attention of type {', '.join(sorted(layer_types - {'full_attention'}))} is not supported")
