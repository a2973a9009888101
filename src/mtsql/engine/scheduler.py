"""Who computes what in a step, and in which blocks of the cache. There is no model here, only ids,
rows and blocks.

Rows are served oldest first. A row *waits* until it finds a seat and blocks, then is *cached* until
it is closed or preempted. A cached row whose reply has been handed out is *idle*: it keeps its
blocks and gives up its seat. When blocks run out the youngest cached row is preempted: it loses its
blocks, waits, and is computed again. The oldest row can always continue, so nothing deadlocks.
"""

import bisect
from dataclasses import dataclass, field

import numpy as np

from mtsql.engine.blocks import BlockPool, PrefixBlock
from mtsql.engine.prefixes import Prefixes, Prompt


@dataclass(eq=False)
class Row:
    """One trajectory.

    `prompt.ids` = P P P, `ids` = a0 a1 E E b0: the reply a, an observation E, and the first token
    of the reply b, which begins at `reply_start` = 4.
    """

    handle: int  # grows with time: the smallest is the oldest
    prompt: Prompt
    key: int  # hashed noise key
    ids: list[int] = field(default_factory=list)  # after the prompt
    reply_start: int = 0  # where in `ids` the current reply begins
    logprobs: list[float] = field(default_factory=list)  # of the current reply
    is_idle: bool = False  # its reply is handed out
    slot: int | None = None  # its line of the block tables while in the cache
    num_blocks: int = 0
    room: int = 0  # tokens for which it has blocks, the last of them its own; 0: not yet looked at
    cached: int = 0  # tokens with keys and values, prompt included
    seen: int = 0  # most tokens ever cached

    @property
    def length(self) -> int:
        """Tokens of the prompt and after it."""
        return len(self.prompt.ids) + len(self.ids)


@dataclass(frozen=True)
class Plan:
    """What one step computes."""

    decoding: list[Row]
    """Rows of which the last of their ids is computed, and their draft."""
    chunks: list[tuple[Prompt | Row, int]]
    """Prompts, or rows with an observation, and how many of their next tokens are computed."""
    drafts: list[list[int]] = field(default_factory=list)
    """The draft of each decoding row, which may be empty. Without drafts the list is empty."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        num_drafted = sum(map(len, self.drafts))
        return len(self.decoding) + num_drafted + sum(num for _, num in self.chunks)


class Scheduler:
    """Rows, their places in the cache, and the plan of each step."""

    def __init__(self, pool: BlockPool, max_rows: int, max_scheduled_tokens: int) -> None:
        self.pool = pool
        self.prefixes = Prefixes(pool)
        self.max_rows = max_rows
        self.max_scheduled_tokens = max_scheduled_tokens
        self.waiting: list[Row] = []  # not in the cache, with something to do; oldest first
        self.cached: list[Row] = []  # in the cache, idle rows included; oldest first
        self.num_preemptions = 0  # of rows with something to do
        # Idle rows keep their line of the tables although they have no seat.
        num_slots = 2 * max_rows
        self.slots = list(range(num_slots))  # free lines
        self.tables = np.zeros((num_slots, pool.num_blocks), dtype=np.int64)

    def running(self) -> list[Row]:
        """Rows with a seat: the oldest cached ones that have something to do."""
        return [row for row in self.cached if not row.is_idle][: self.max_rows]

    @property
    def has_work(self) -> bool:
        """False if all rows are idle, or wait for places that only idle rows hold."""
        return any(not row.is_idle for row in self.cached) or self._can_admit(0)

    # a row's life

    def wait(self, row: Row) -> None:
        """Note that a row has something to do."""
        row.is_idle = False
        if row.slot is None:
            bisect.insort(self.waiting, row, key=_age)

    def remove(self, row: Row) -> None:
        """Forget a row, whatever it is doing."""
        if row.slot is not None:
            self._evict(row, row.slot)
        elif not row.is_idle:
            self.waiting.remove(row)

    def preempt(self, row: Row) -> None:
        """Take a row's blocks away; it waits and is computed again. An idle row stays idle until it
        is extended."""
        if row.slot is None:
            return
        self._evict(row, row.slot)
        if not row.is_idle:
            self.num_preemptions += 1
            self.wait(row)

    def _can_admit(self, num_running: int) -> bool:
        """Whether the oldest waiting row finds a seat, a line of the tables, and blocks for all of
        its tokens."""
        if not self.waiting or not self.slots or num_running >= self.max_rows:
            return False
        if not self.cached:  # a row that is alone always fits
            return True
        row = self.waiting[0]
        num_shared = len(row.prompt.ids) // self.pool.block_size  # full blocks of the prompt
        needed = self.pool.blocks_for(row.length + 1) - num_shared
        needed += self.prefixes.num_missing(row.prompt)
        # One block stays free for each cached row to grow; otherwise the new row could be preempted
        # immediately.
        return needed + len(self.cached) <= self.pool.num_free

    def _admit(self) -> None:
        """Move waiting rows into the cache, oldest first, as long as they fit."""
        num_running = sum(not row.is_idle for row in self.cached)
        while self._can_admit(num_running):
            row = self.waiting.pop(0)
            prompt = row.prompt
            if not prompt.rows:
                self.prefixes.attach(prompt)
            self.pool.share(prompt.blocks)
            prompt.rows.append(row)
            row.slot = self.slots.pop()
            row.num_blocks = len(prompt.blocks)
            row.cached = len(prompt.ids)
            self.tables[row.slot, : row.num_blocks] = prompt.blocks
            bisect.insort(self.cached, row, key=_age)
            num_running += 1

    def _evict(self, row: Row, slot: int) -> None:
        """Take the row of this slot out of the cache, and its prompt too if no other row of its
        group is there."""
        self.pool.release(self.tables[slot, : row.num_blocks].tolist())
        self.slots.append(slot)
        row.slot = None
        row.num_blocks = 0
        row.room = 0
        row.cached = 0
        self.cached.remove(row)
        row.prompt.rows.remove(row)
        if not row.prompt.rows:
            self.prefixes.detach(row.prompt)

    # a step

    def plan(self) -> Plan:
        """Admit what fits. Each running row gets its next token; chunks get the scheduled tokens
        that are left."""
        self._admit()
        self._compact()
        self.prefixes.advance()
        decoding: list[Row] = []
        others: list[Row] = []
        for row in self.running():
            prompt = row.prompt
            num_prompt = len(prompt.ids)  # written out, as it is done for each token
            length = num_prompt + len(row.ids)
            if length != row.cached + 1 or prompt.cached != num_prompt:
                others.append(row)
            elif row.slot is not None and (length <= row.room or self._grow(row, length)):
                decoding.append(row)
        budget = self.max_scheduled_tokens - len(decoding)
        chunks: dict[Prompt | Row, int] = {}
        computing: set[PrefixBlock] = set()  # blocks of prompts
        for row in others:
            owner = row if row.prompt.is_ready else row.prompt
            length = row.length if owner is row else len(owner.ids)
            num = min(length - owner.cached, budget)
            if num == 0 or row.slot is None or owner in chunks:
                continue
            if owner is row and not self._grow(row, row.cached + num):
                continue
            if isinstance(owner, Prompt):
                if not self.prefixes.may_compute(owner, computing):
                    continue
                computing.update(self.prefixes.next_blocks(owner, num))
            chunks[owner] = num
            budget -= num
        # A row that grew may have preempted a younger one that was already in the plan.
        return Plan(
            decoding=[row for row in decoding if row.slot is not None],
            chunks=[(owner, num) for owner, num in chunks.items() if _is_cached(owner)],
        )

    def _compact(self) -> None:
        """Let the pool move blocks together, and follow the moves in all tables."""
        place = self.pool.compact()
        if place is None:
            return
        width = max((row.num_blocks for row in self.cached), default=0)
        self.tables[:, :width] = place[self.tables[:, :width]]

    def _grow(self, row: Row, length: int) -> bool:
        """Give a row blocks for `length` tokens; False if it was preempted for lack of blocks.

        The last block of a prompt may have room left. It is shared, so a row that writes behind the
        prompt's tokens gets a copy of that block first.
        """
        at = row.cached // self.pool.block_size  # the block of the next token
        is_shared = at < row.num_blocks and self.pool.refs[self.tables[row.slot, at]] > 1
        num_new = self.pool.blocks_for(length) - row.num_blocks
        while self.pool.num_free < num_new + is_shared:
            youngest = self.cached[-1]
            self.preempt(youngest)
            if youngest is row:
                return False
        if is_shared:
            shared = int(self.tables[row.slot, at])
            (own,) = self.pool.take(1)
            self.pool.copy(shared, own)
            self.pool.release([shared])
            self.tables[row.slot, at] = own
        end = row.num_blocks + num_new
        self.tables[row.slot, row.num_blocks : end] = self.pool.take(num_new)
        row.num_blocks = end
        row.room = end * self.pool.block_size
        return True

    def give_room(self, row: Row, num: int) -> int:
        """Give a decoding row room for a draft of `num` tokens; returns for how many there is room.
        Free blocks are taken, known ones too, since the row needs them soon anyway. But nobody is
        preempted for a guess."""
        wanted = self.pool.blocks_for(row.length + num) - row.num_blocks
        taken = self.pool.take(min(wanted, self.pool.num_free)) if wanted > 0 else []
        end = row.num_blocks + len(taken)
        self.tables[row.slot, row.num_blocks : end] = taken
        row.num_blocks = end
        row.room = end * self.pool.block_size
        return min(num, row.room - row.length)

    def take_back(self, row: Row) -> None:
        """Free the blocks that only refused tokens of a draft have needed."""
        needed = self.pool.blocks_for(row.cached)
        if needed < row.num_blocks:
            self.pool.release(self.tables[row.slot, needed : row.num_blocks].tolist())
            row.num_blocks = needed
            row.room = needed * self.pool.block_size


def _age(row: Row) -> int:
    return row.handle


def _is_cached(owner: Prompt | Row) -> bool:
    if isinstance(owner, Prompt):
        return bool(owner.rows)
    return owner.slot is not None
