"""Generation for many multi-turn trajectories at once: every distinct token is computed once, and
no row waits for a slower one.

A *row* is one trajectory: a prompt that it shares with its group, then replies (sampled here) and
observations (given to `extend`). Its keys and values stay in the paged cache from its first token
to `close`. One `step` computes the next token of every row that decodes, together with *chunks* of
new prompts and observations. A row whose reply is complete leaves at once and keeps its cache until
`extend` or `close`. When the cache is full the youngest row is *preempted*: it loses its blocks and
is computed again later. Its tokens come out the same up to rounding, since noise belongs to (key,
position).

A row may compute a *draft* with its newest token: guesses of its next tokens (`drafts.py`), which
are kept as far as they equal what is sampled. So a step can add several tokens to a row, and they
are the same as without drafts, up to rounding.

A step has three parts, as in nano-vLLM: schedule (`_plan`), run (`_run`), and postprocess (`_draw`,
which samples and ends replies).

The engine sees ids only. Its cache belongs to the model's weights, prompts of closed rows included
(`prefixes.py`): make a new engine when the weights have changed. On a GPU with flash-attn, steps
that only decode run as CUDA graphs.

P positions that are sampled in a step, T tokens computed in it, W hidden width.
"""

from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.blocks import BlockPool, to_device
from mtsql.engine.completions import Completion, StopReason
from mtsql.engine.config import (
    EngineConfig,
    block_bytes,
    cache_memory,
    cache_shape,
    resolved_block_size,
)
from mtsql.engine.counts import EngineCounts
from mtsql.engine.cuda_graphs import DecodeGraphs
from mtsql.engine.drafts import Drafter
from mtsql.engine.paged_attention import Chunk, step_context, uses_flash
from mtsql.engine.prefixes import Prompt
from mtsql.engine.sampling import NoiseKey, SamplingConfig, hash_key, rows_at_once, sample, uniform
from mtsql.engine.scheduler import Plan, Row, Scheduler
from mtsql.engine.step_costs import Costs, default_costs
from mtsql.engine.uploads import upload
from mtsql.engine.weights import weights_version, without_gradients
from mtsql.model.decoder import CausalLM


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
        block_size = resolved_block_size(limits, use_flash)
        num_bytes = block_bytes(config, block_size, dtype)
        num_blocks = limits.cache_bytes // num_bytes
        if num_blocks < 1:
            raise ValueError(
                f"engine.cache_bytes is {limits.cache_bytes}, less than a block of "
                f"engine.block_size {block_size} tokens ({num_bytes} bytes)"
            )
        num_layers, num_kv_heads, head_dim = cache_shape(config)
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.num_heads = config.num_attention_heads
        self.num_embeddings = self.decoder.embed_tokens.weight.shape[0]
        with cache_memory(limits):
            self.pool = BlockPool(*shape, dtype, self.device, use_flash)
            self.scheduler = Scheduler(self.pool, limits.max_rows, limits.max_scheduled_tokens)
        by_graphs = limits.cuda_graphs and use_flash
        self.graphs = DecodeGraphs(self.decoder, self.pool) if by_graphs else None
        self.drafter = None
        if limits.max_draft:
            costs = limits.step_costs or default_costs(config, dtype, self.device.type)
            self.drafter = Drafter(limits.max_draft, Costs(costs), self.stop_ids, sampling)
        self.max_scheduled_tokens = limits.max_scheduled_tokens
        self.counts = EngineCounts()
        self._version = weights_version(model)
        self._rows: dict[int, Row] = {}
        self._next_handle = 0

    def open_group(self, prompt_ids: list[int], noise_keys: list[NoiseKey]) -> list[int]:
        """Start one row per noise key, all from the same prompt; returns their handles.

        Raises ValueError for an empty prompt, for one that could not reach max_trajectory_tokens
        even with the whole cache to itself, and if the weights have changed since the engine was
        made.
        """
        if weights_version(self.model) != self._version:
            raise ValueError(
                "the model's weights have changed since this engine was made, and its cache holds "
                "keys and values of the old ones: make a new engine"
            )
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
        self.counts.prompt += len(prompt_ids)
        prompt = Prompt(list(prompt_ids))
        handles = []
        for key in noise_keys:
            row = Row(self._next_handle, prompt, hash_key(key))
            self._next_handle += 1
            self._rows[row.handle] = row
            self.scheduler.wait(row)
            if self.drafter is not None:
                self.drafter.open(row)
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
        row = self._row(handle)
        self.scheduler.remove(row)
        if self.drafter is not None:
            self.drafter.close(row)
        del self._rows[handle]

    def forget_prompts(self) -> None:
        """Empty the cache, as that of a new engine is. ValueError if a row is open."""
        if self._rows:
            raise ValueError("a row is open: close all rows before the cache is emptied")
        self.scheduler.prefixes.forget()

    @property
    def has_work(self) -> bool:
        """Whether `step` can compute something. It cannot if all rows are idle, or wait for blocks
        that idle rows hold."""
        return self.scheduler.has_work

    def step(self) -> list[Completion]:
        """Compute one batch of tokens; returns the replies that it completed."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() before generating")
        with without_gradients(self.device.type):
            plan = self._plan()
            rows, hidden = self._run(plan)
            return [] if hidden is None else self._draw(plan, rows, hidden)

    def _plan(self) -> Plan:
        """What this step computes: the scheduler's plan, and drafts for which blocks are free."""
        plan = self.scheduler.plan()
        self.counts.preemptions = self.scheduler.num_preemptions
        self.counts.prefix_hits = self.scheduler.prefixes.num_hits
        if self.drafter is None or not plan.decoding:
            return plan
        num_chunk = sum(num for _, num in plan.chunks)
        left = self.max_scheduled_tokens - len(plan.decoding) - num_chunk
        drafts = self.drafter.choose(plan.decoding, num_chunk, left)
        if not any(drafts):
            return plan
        for row, draft in zip(plan.decoding, drafts, strict=True):
            if draft and row.length + len(draft) > row.room:
                del draft[self.scheduler.give_room(row, len(draft)) :]
        return replace(plan, drafts=drafts)

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
        """Compute the plan. Returns the rows that draw tokens now, and the hidden states (P, W)
        that they draw them from.

        These are the decoding rows, which come first and draw a token for each of the tokens that
        they computed; the rows whose observation is complete, and the rows that have no token yet
        and whose prompt is complete.
        """
        rows = list(plan.decoding)
        states: list[Tensor] = []
        if plan.decoding or plan.chunks:
            hidden = self._compute(plan)
            num_decoded = len(hidden) - len(plan.chunks)
            chosen = list(range(num_decoded))
            for i, (owner, _) in enumerate(plan.chunks, num_decoded):
                if isinstance(owner, Prompt):
                    if owner.is_ready:
                        owner.hidden = hidden[i].clone()
                elif owner.cached == owner.length:
                    rows.append(owner)
                    chosen.append(i)
            if len(chosen) < len(hidden):
                (indices,) = upload([np.array(chosen, dtype=np.int64)], self.device)
                hidden = hidden[indices]
            states.append(hidden)
        for row in self.scheduler.running():
            if row.ids:
                continue
            first = row.prompt.hidden
            if row.prompt.is_ready and first is not None:
                rows.append(row)
                states.append(first[None])
        self.counts.row_steps += len(rows)
        return rows, torch.cat(states) if rows else None

    def _compute(self, plan: Plan) -> Tensor:
        """Run the decoder over the tokens of a plan: last hidden states of all tokens of the
        decoding rows, and at the last token of each chunk.

        The tokens stand in the plan's order. Two decoding rows, the first with a draft of two
        tokens, a chunk x and a chunk y:

            ids   a7 d d b3 x0 x1 x2 y5 y6     the last id of each row and its draft, the chunks
            out    * * *  *        *     *
        """
        tables = self.scheduler.tables
        drafts = plan.drafts
        if drafts:
            together = ((row.ids[-1], *draft) for row, draft in zip(plan.decoding, drafts))
            ids = list(chain.from_iterable(together))
            num_new = np.array([len(draft) for draft in drafts], dtype=np.int64) + 1
        else:
            ids = [row.ids[-1] for row in plan.decoding]
            num_new = np.ones(len(plan.decoding), dtype=np.int64)
        num_decoded = len(ids)
        before = np.array([row.cached for row in plan.decoding], dtype=np.int64)
        lengths = before + num_new
        row_starts = num_new.cumsum() - num_new
        positions = [np.arange(num_decoded) + np.repeat(before - row_starts, num_new)]
        chunks = []
        for owner, num in plan.chunks:
            end = owner.cached + num
            if isinstance(owner, Row):
                slot = owner.slot
                first = len(owner.prompt.ids)  # tokens that are not in `owner.ids`
            else:
                slot = owner.rows[0].slot  # the tables of all rows of a group begin with its prompt
                first = 0
            blocks = tables[slot, : self.pool.blocks_for(end)]
            chunks.append(Chunk(len(ids), len(ids) + num, end, blocks))
            ids += owner.ids[owner.cached - first : end - first]
            positions.append(np.arange(owner.cached, end))
        slots = [row.slot for row in plan.decoding if row.slot is not None]  # all have one
        width = self.pool.blocks_for(int(lengths.max())) if plan.decoding else 0
        if self.graphs is not None and not chunks:
            hidden = self.graphs.run(ids, tables[slots, :width], lengths, num_new)
        else:
            wanted = [*range(num_decoded), *(chunk.stop - 1 for chunk in chunks)]
            arrays = [np.array(ids), np.concatenate(positions), np.array(wanted)]
            on_device = upload(arrays, self.device)
            context = step_context(
                self.pool, self.num_heads, tables[slots, :width], lengths, num_new, chunks
            )
            hidden = self.decoder(on_device[0], on_device[1], context, on_device[2])
            self.counts.eager_steps += 1
        self.counts.steps += 1
        self.counts.computed += len(ids)
        self.counts.drafted += num_decoded - len(plan.decoding)
        for owner, num in plan.chunks:
            self._keep(owner, num)
        return hidden

    def _keep(self, owner: Prompt | Row, num: int) -> None:
        """Note that the cache holds the next `num` tokens of a prompt or row."""
        if isinstance(owner, Prompt):
            self.counts.distinct += self.scheduler.prefixes.computed(owner, num)
            return
        owner.cached += num
        if owner.cached > owner.seen:
            self.counts.distinct += min(num, owner.cached - owner.seen)
            owner.seen = owner.cached

    def _draw(self, plan: Plan, rows: list[Row], hidden: Tensor) -> list[Completion]:
        """Sample the next tokens of each row from its hidden states (P, W): one, and one more for
        each token of its draft that was sampled so. Returns the replies that this ends."""
        drafts = plan.drafts + [[]] * (len(rows) - len(plan.drafts))
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        positions = np.array([len(row.ids) for row in rows])
        if plan.drafts:
            num_drawn = np.array([len(draft) for draft in drafts]) + 1
            starts = num_drawn.cumsum() - num_drawn
            keys = keys.repeat(num_drawn)
            positions = np.arange(len(keys)) + (positions - starts).repeat(num_drawn)
        ids, logprobs = self._sample(hidden, keys, positions)
        completions = []
        num_decoding = len(plan.decoding)
        at = 0  # of the row's first position among all
        for index, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            num = 0  # tokens of the draft that are kept
            while True:
                new_id = ids[at + num]
                row.ids.append(new_id)
                row.logprobs.append(logprobs[at + num])
                reason = self._stop_reason(row)
                if not draft or reason is not None or num == len(draft) or draft[num] != new_id:
                    break
                num += 1
            if index < num_decoding:
                self._keep(row, 1 + num)
            if draft:
                is_equal = num < len(draft) and draft[num] == new_id  # it ended the reply
                self._note_draft(row, index, len(draft), num + is_equal)
            if reason is not None:
                row.is_idle = True
                reply = row.ids[row.reply_start :]
                completions.append(Completion(row.handle, reply, row.logprobs, reason))
            at += len(draft) + 1
        return completions

    def _note_draft(self, row: Row, index: int, num_drafted: int, num_accepted: int) -> None:
        """Note what became of the draft of the decoding row `index`, and free its spare blocks."""
        self.counts.accepted += num_accepted
        if self.drafter is not None:
            self.drafter.record(index, num_drafted, num_accepted)
        self.scheduler.take_back(row)

    def _sample(
        self, hidden: Tensor, keys: np.ndarray, positions: np.ndarray
    ) -> tuple[list[int], list[float]]:
        """Sample an id from each hidden state (P, W) with the noise of its row's hashed key and its
        position, both (P,). Returns the ids and their log-probs."""
        noise = to_device(uniform(keys, positions), self.device)  # (P,)
        at_once = rows_at_once(self.device, self.head.weight.shape[0])
        drawn = []
        for first in range(0, len(hidden), at_once):
            part = slice(first, first + at_once)
            ids, logprobs = sample(self.head(hidden[part]), self.sampling, noise[part])
            drawn.append(torch.stack((ids.double(), logprobs.double())))
        both = torch.cat(drawn, dim=1).cpu()  # the step's only transfer to the host
        return both[0].long().tolist(), both[1].tolist()

    def _stop_reason(self, row: Row) -> StopReason | None:
        """Why the row's reply ends with its newest token, or None if the reply continues."""
        if row.ids[-1] in self.stop_ids:
            return StopReason.STOP_ID
        if len(row.ids) >= self.sampling.max_trajectory_tokens:
            return StopReason.TRAJECTORY_TOKENS
        if len(row.logprobs) >= self.sampling.max_reply_tokens:
            return StopReason.REPLY_TOKENS
        return None
