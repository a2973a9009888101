"""Generation over all live trajectories at once, on the policy's own weights and modules.

Each trajectory has a slot in one key-value cache and keeps it across its tool calls, so an observation costs its own
tokens and no more. A group's prompt is computed once and its keys and values are copied to the siblings. One `step`
mixes the next token of every running row with new prompts and observations in a single flat forward; a row that stops
leaves at once. The engine sees ids only.

Legend: R slots, T tokens of a flat step, L cache length, H heads, D head width, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from mtsql.llm.attention import ATTENTION_NAME


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled, and their budgets."""

    temperature: float = 1.0
    """Logits are divided by it, in training too. 0: greedy (log-probs are then those at temperature 1)."""
    max_step_tokens: int = 512
    """Tokens of one model reply, stop id included."""
    max_trajectory_tokens: int = 8000
    """Tokens after the prompt, observations included (paper: 8000)."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError("sampling.temperature must not be negative")
        if self.max_step_tokens < 1 or self.max_trajectory_tokens < 1:
            raise ValueError("sampling.max_step_tokens and sampling.max_trajectory_tokens must be at least 1")


@dataclass(frozen=True)
class EngineLimits:
    """Memory and scheduling."""

    max_rows: int = 64
    """Trajectories in the cache at once; more wait for a free slot."""
    max_prefill_tokens: int = 4096
    """New prompts join a step while it holds fewer tokens than this."""


class StopReason(Enum):
    """Why a reply ended."""

    STOP_ID = "stop_id"
    STEP_TOKENS = "step_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"


@dataclass(frozen=True)
class Completion:
    """One finished reply: sampled ids, stop id included, and the log-prob of each under the sampled distribution."""

    handle: int
    ids: list[int]
    logprobs: list[float]
    reason: StopReason


@dataclass
class _Row:
    handle: int
    key: int
    slot: int = -1
    length: int = 0
    prompt_length: int = 0
    feed: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Batched generation. Open groups, step, take completions, extend or close them; see `rollout.py`."""

    def __init__(self, model, stop_ids: tuple[int, ...], sampling: Sampling, limits: EngineLimits = EngineLimits()):
        if model.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(f"the engine needs a model loaded with attention {ATTENTION_NAME!r}")
        self.model, self.stop_ids, self.sampling, self.limits = model, frozenset(stop_ids), sampling, limits
        self.tokens_computed = 0
        self.tokens_distinct = 0
        self._queue: deque[tuple[list[int], list[_Row]]] = deque()
        self._running: dict[int, _Row] = {}
        self._rows: dict[int, _Row] = {}
        self._siblings: dict[int, list[_Row]] = {}
        self._free = list(range(limits.max_rows))[::-1]
        self._num_opened = 0
        self._cache = _Cache(model, limits.max_rows)

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute anything: rows decode, or a waiting group fits."""
        return bool(self._running) or bool(self._queue and len(self._queue[0][1]) <= len(self._free))

    def open_group(self, prompt_ids: list[int], noise_keys: list[tuple[int, int, int, int]]) -> list[int]:
        """Start one trajectory per noise key (seed, update, turn, sample) from a shared prompt; returns handles."""
        if not prompt_ids:
            raise ValueError("a prompt needs at least one token")
        if len(noise_keys) > self.limits.max_rows:
            raise ValueError(f"a group of {len(noise_keys)} does not fit engine.max_rows={self.limits.max_rows}")
        rows = []
        for key in noise_keys:
            rows.append(_Row(self._num_opened, _mix_key(key), prompt_length=len(prompt_ids)))
            self._num_opened += 1
        self._rows.update((row.handle, row) for row in rows)
        self._queue.append((list(prompt_ids), rows))
        self.tokens_distinct += len(prompt_ids)
        return [row.handle for row in rows]

    def extend(self, handle: int, ids: list[int]) -> None:
        """Append an observation to a trajectory whose reply was handed out, and ask for its next reply."""
        if not ids:
            raise ValueError("an observation needs at least one token")
        row = self._rows[handle]
        row.feed += ids
        row.ids, row.logprobs = [], []
        self.tokens_distinct += len(ids)
        self._running[handle] = row

    def close(self, handle: int) -> None:
        """Forget a trajectory and free its slot."""
        row = self._rows.pop(handle)
        self._running.pop(handle, None)
        if row.slot >= 0:
            self._free.append(row.slot)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One flat forward: a token for each running row, plus observations and new prompts. Finished replies."""
        num_tokens = sum(len(row.feed) for row in self._running.values())
        while self._queue and len(self._queue[0][1]) <= len(self._free) and num_tokens < self.limits.max_prefill_tokens:
            prompt, rows = self._queue.popleft()
            for row in rows:
                row.slot = self._free.pop()
            rows[0].feed = prompt
            self._running[rows[0].handle] = rows[0]
            self._siblings[rows[0].handle] = rows[1:]
            num_tokens += len(prompt)
        rows = sorted(self._running.values(), key=lambda row: row.slot)
        if not rows:
            return []
        hidden = self._forward(rows)
        rows, index = self._fork(rows)
        ids, logprobs = self._sample(self.model.get_output_embeddings()(hidden[index]), rows)
        completions = []
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.feed = [token]
            reason = self._reason(row, token)
            if reason is not None:
                del self._running[row.handle]
                completions.append(Completion(row.handle, row.ids, row.logprobs, reason))
        self.tokens_distinct += len(rows) - len(completions)
        return completions

    def _forward(self, rows: list[_Row]) -> torch.Tensor:
        """Feed every row's pending tokens; returns the hidden state at each row's last token, (rows, W)."""
        lengths = [len(row.feed) for row in rows]
        starts = [row.length for row in rows]
        context = self._cache.plan([row.slot for row in rows], starts, lengths)
        device = self._cache.device
        ids = torch.tensor([i for row in rows for i in row.feed], device=device)
        hidden = self.model.get_decoder()(
            input_ids=ids[None],
            position_ids=context.positions[None],
            use_cache=False,
            attention_context=context,
        ).last_hidden_state[0]  # (T, W)
        for row, length in zip(rows, lengths, strict=True):
            row.length += length
            row.feed = []
        self.tokens_computed += len(ids)
        return hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]

    def _fork(self, rows: list[_Row]) -> tuple[list[_Row], list[int]]:
        """After a prompt's prefill its siblings join with copied keys and values and the same last hidden state."""
        grown, index = [], []
        for i, row in enumerate(rows):
            siblings = self._siblings.pop(row.handle, [])
            if siblings:
                self._cache.copy(row.slot, [s.slot for s in siblings], row.length)
            for sibling in siblings:
                sibling.length = row.length
                self._running[sibling.handle] = sibling
            grown += [row, *siblings]
            index += [i] * (1 + len(siblings))
        return grown, index

    def _sample(self, logits: torch.Tensor, rows: list[_Row]) -> tuple[list[int], list[float]]:
        """Draw one token per row; noise depends on (key, position) alone. logits (rows, V)."""
        temperature = self.sampling.temperature
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            ids = logits.argmax(-1)
        else:
            keys = np.array([row.key for row in rows], dtype=np.uint64)
            positions = np.array([row.length for row in rows], dtype=np.uint64)
            noise = torch.from_numpy(uniform_noise(keys, positions)).to(logits.device)
            ladder = logp.double().exp().cumsum(-1)
            ids = torch.searchsorted(ladder, noise[:, None] * ladder[:, -1:], right=True)[:, 0]
            ids = ids.clamp(max=logits.shape[1] - 1)
        return ids.tolist(), logp.gather(1, ids[:, None])[:, 0].tolist()

    def _reason(self, row: _Row, token: int) -> StopReason | None:
        if token in self.stop_ids:
            return StopReason.STOP_ID
        if row.length + 1 - row.prompt_length >= self.sampling.max_trajectory_tokens:
            return StopReason.TRAJECTORY_TOKENS
        return StopReason.STEP_TOKENS if len(row.ids) >= self.sampling.max_step_tokens else None


class _Cache:
    """Keys and values of all slots, one pair of (R, Hkv, L, D) tensors a layer; grows in length as rows do."""

    def __init__(self, model, num_slots: int):
        parameter = next(model.parameters())
        self.device, self.dtype, self.num_slots = parameter.device, parameter.dtype, num_slots
        self.layers: dict[int, list[torch.Tensor]] = {}
        self.capacity = 256

    def plan(self, slots: list[int], starts: list[int], lengths: list[int]) -> "_SlotContext":
        """The attention of one step: row i appends `lengths[i]` tokens at `starts[i]` of slot `slots[i]`."""
        needed = max(start + length for start, length in zip(starts, lengths, strict=True))
        while self.capacity < needed:
            self.capacity *= 2
        return _SlotContext(self, slots, starts, lengths)

    def layer(self, index: int, num_heads: int, width: int) -> list[torch.Tensor]:
        """[keys, values] of a layer, made or lengthened on demand."""
        shape = (self.num_slots, num_heads, self.capacity, width)
        pair = self.layers.get(index)
        if pair is None or pair[0].shape != shape:
            grown = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
            for new, old in zip(grown, pair or [], strict=False):
                new[:, :, : old.shape[2]] = old
            self.layers[index] = pair = grown
        return pair

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` positions of a slot to others."""
        for pair in self.layers.values():
            for tensor in pair:
                tensor[targets, :, :length] = tensor[source, :, :length]


class _SlotContext:
    """Attention of one flat step. Rows that add one token share one SDPA over a view of the cache; rows that add more
    (prompts, observations) share a padded one."""

    def __init__(self, cache: _Cache, slots: list[int], starts: list[int], lengths: list[int]):
        self.cache, device = cache, cache.device
        row_of = [i for i, n in enumerate(lengths) for _ in range(n)]
        within = [j for n in lengths for j in range(n)]
        self.slot_of = torch.tensor([slots[i] for i in row_of], device=device)  # (T,)
        self.positions = torch.tensor([starts[i] + j for i, j in zip(row_of, within, strict=True)], device=device)
        flat_start = np.cumsum([0, *lengths])
        ones = [i for i, n in enumerate(lengths) if n == 1]
        many = [i for i, n in enumerate(lengths) if n > 1]
        self.ones = self.many = None
        if ones:
            self.ones = torch.tensor(flat_start[ones], device=device)
            self.one_slots = torch.tensor([slots[i] for i in ones], device=device)
            self.num_views = max(slots[i] for i in ones) + 1
            self.one_length = max(starts[i] for i in ones) + 1
            ends = torch.zeros(self.num_views, dtype=torch.long, device=device)
            ends[self.one_slots] = torch.tensor([starts[i] for i in ones], device=device)
            self.one_mask = (torch.arange(self.one_length, device=device) <= ends[:, None])[:, None, None]  # (R,1,1,L)
        if many:
            width = max(lengths[i] for i in many)
            self.many_length = max(starts[i] + lengths[i] for i in many)
            self.many_slots = torch.tensor([slots[i] for i in many], device=device)
            steps = torch.arange(width, device=device)
            counts = torch.tensor([lengths[i] for i in many], device=device)
            offsets = torch.tensor(flat_start[many], device=device)
            self.many = offsets[:, None] + torch.minimum(steps[None], counts[:, None] - 1)  # (M, width) flat indices
            self.many_valid = steps[None] < counts[:, None]
            limits = torch.tensor([starts[i] for i in many], device=device)[:, None] + steps
            self.many_mask = (torch.arange(self.many_length, device=device) <= limits[..., None])[:, None]

    def attend(self, layer_idx, query, key, value, scaling):
        """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D); keys and values enter the cache."""
        num_heads, num_kv, width = query.shape[1], key.shape[1], query.shape[3]
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        keys, values = self.cache.layer(layer_idx, num_kv, width)
        keys[self.slot_of, :, self.positions] = key
        values[self.slot_of, :, self.positions] = value
        out = torch.empty_like(query)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if self.ones is not None:
            # The query heads that share a key head are a short query of their own: no key is ever repeated.
            grouped = query.new_zeros(self.num_views, num_kv, num_heads // num_kv, width)
            grouped[self.one_slots] = query[self.ones].view(len(self.ones), num_kv, -1, width)
            seen = slice(0, self.num_views), slice(None), slice(0, self.one_length)
            answer = sdpa(grouped, keys[seen], values[seen], attn_mask=self.one_mask, scale=scaling)
            out[self.ones] = answer[self.one_slots].reshape(len(self.ones), num_heads, width)
        if self.many is not None:
            asked = query[self.many].transpose(1, 2)  # (M, H, width, D)
            seen = self.many_slots, slice(None), slice(0, self.many_length)
            answer = sdpa(
                asked, keys[seen], values[seen], attn_mask=self.many_mask, scale=scaling,
                enable_gqa=num_heads != num_kv,
            ).transpose(1, 2)  # fmt: skip
            out[self.many[self.many_valid]] = answer[self.many_valid]
        return out[None]


def _mix_key(parts: tuple[int, ...]) -> int:
    """One 64-bit key of several integers, by repeated mixing."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _splitmix(state ^ np.array([part & (2**64 - 1)], dtype=np.uint64))
    return int(state[0])


def uniform_noise(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), each a function of its (key, position) alone. Both arrays are uint64 (N,)."""
    return (_splitmix(keys ^ _splitmix(positions)) >> np.uint64(11)) * 2.0**-53


def _splitmix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 output function (Steele, Lea and Flood, 2014), elementwise on uint64 with wrap-around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
