"""Who computes what in a step, and in which blocks of the cache. No model: ids, rows and blocks only.

Rows are served oldest first. A row *waits* until it finds a seat and blocks, then is *cached* until it is
closed or put off; a cached row whose reply has been handed out is *idle* and keeps its blocks. When blocks
run out the youngest cached row is put off: it loses its blocks, waits, and is computed again. The oldest row
can always go on, so nothing deadlocks.
"""

import bisect
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mtsql.engine.paged_attention import BlockPool


@dataclass(eq=False)
class Prompt:
    """A prompt and its blocks, which exist while some row of its group is in the cache."""

    ids: list[int]
    rows: list["Row"] = field(default_factory=list)  # those in the cache
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # tokens with keys and values
    seen: int = 0  # most tokens ever cached
    hidden: Tensor | None = (
        None  # (width,) its last hidden state: every sample draws its first token from it
    )

    @property
    def is_ready(self) -> bool:
        return self.cached == len(self.ids)


@dataclass(eq=False)
class Row:
    """One trajectory."""

    handle: int  # grows with age: the smallest is the oldest
    prompt: Prompt
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


@dataclass(frozen=True)
class Plan:
    """What one step computes."""

    decoding: list[Row]  # one token each, the last of their ids
    chunks: list[
        tuple[Prompt | Row, int]
    ]  # so many next tokens of a prompt or of a row's observation


class Scheduler:
    """Rows, their places in the cache, and the plan of each step."""

    def __init__(self, pool: BlockPool, max_rows: int, max_scheduled_tokens: int):
        self.pool = pool
        self.max_rows = max_rows
        self.max_scheduled_tokens = max_scheduled_tokens
        self.waiting: list[Row] = []  # not in the cache, with something to do; oldest first
        self.cached: list[Row] = []  # in the cache, idle ones included; oldest first
        # Idle rows keep their line of the tables without taking a seat from running ones.
        num_slots = 2 * max_rows
        self.slots = list(range(num_slots))
        self.tables = np.zeros((num_slots, pool.num_blocks), dtype=np.int64)

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def running(self) -> list[Row]:
        """Rows with a seat: the oldest cached ones that have something to do."""
        return [row for row in self.cached if not row.is_idle][: self.max_rows]

    @property
    def has_work(self) -> bool:
        """False when all rows are idle, or wait for places that only idle rows hold."""
        return any(not row.is_idle for row in self.cached) or self._can_admit(0)

    # a row's life

    def wait(self, row: Row) -> None:
        """A row has something to do."""
        row.is_idle = False
        if row.slot is None:
            bisect.insort(self.waiting, row, key=_age)

    def remove(self, row: Row) -> None:
        if row.slot is not None:
            self._evict(row)
        elif not row.is_idle:
            self.waiting.remove(row)

    def preempt(self, row: Row) -> None:
        """Take a row's blocks away. An idle one stays idle, and is computed again when it is
        extended."""
        if row.slot is not None:
            self._evict(row)
            if not row.is_idle:
                self.wait(row)

    def _can_admit(self, num_running: int) -> bool:
        """Whether the oldest waiting row finds a seat, a line of the tables, and blocks for all it
        has."""
        if not self.waiting or not self.slots or num_running >= self.max_rows:
            return False
        row = self.waiting[0]
        prompt = len(row.prompt.ids)
        needed = self.num_blocks(row.length + 1) - prompt // self.pool.block_size
        if not row.prompt.rows:
            needed += self.num_blocks(prompt)
        # A block of growth for each row that is already in, lest the new one be put off at once. Alone it
        # always fits.
        return not self.cached or needed + len(self.cached) <= len(self.pool.free)

    def _admit(self) -> None:
        num_running = sum(not row.is_idle for row in self.cached)
        while self._can_admit(num_running):
            row = self.waiting.pop(0)
            prompt = row.prompt
            if not prompt.rows:
                prompt.blocks = self.pool.take(self.num_blocks(len(prompt.ids)), from_top=True)
            self.pool.share(prompt.blocks)
            prompt.rows.append(row)
            row.slot, row.num_blocks, row.cached = (
                self.slots.pop(),
                len(prompt.blocks),
                len(prompt.ids),
            )
            self.tables[row.slot, : row.num_blocks] = prompt.blocks
            bisect.insort(self.cached, row, key=_age)
            num_running += 1

    def _evict(self, row: Row) -> None:
        """Take a row out of the cache, and its prompt with it if it was the last of its group
        there."""
        self.pool.release(self.tables[row.slot, : row.num_blocks].tolist())
        self.slots.append(row.slot)
        row.slot, row.num_blocks, row.cached = None, 0, 0
        self.cached.remove(row)
        row.prompt.rows.remove(row)
        if not row.prompt.rows:
            self.pool.release(row.prompt.blocks)
            row.prompt.blocks, row.prompt.cached = [], 0

    # a step

    def plan(self) -> Plan:
        """Admit what fits; each running row gets its next token, chunks get the rest of the
        budget."""
        self._admit()
        self._compact()
        decoding: list[Row] = []
        others: list[Row] = []
        for row in self.running():
            if row.length != row.cached + 1 or not row.prompt.is_ready:
                others.append(row)
            elif row.slot is not None and self._grow(row, row.length):
                decoding.append(row)
        budget = self.max_scheduled_tokens - len(decoding)
        chunks: dict[Prompt | Row, int] = {}
        for row in others:
            owner = row if row.prompt.is_ready else row.prompt
            pending = (row.length if owner is row else len(owner.ids)) - owner.cached
            num = min(pending, budget)
            if num == 0 or row.slot is None or owner in chunks:
                continue
            if owner is row and not self._grow(row, row.cached + num):
                continue
            chunks[owner] = num
            budget -= num
        # A row may have put off a younger one that had its place in the plan already.
        decoding = [row for row in decoding if row.slot is not None]
        return Plan(decoding, [(owner, num) for owner, num in chunks.items() if _is_cached(owner)])

    def _compact(self) -> None:
        place = self.pool.compact()
        if place is not None:
            self.tables = place[self.tables]
            for prompt in {id(row.prompt): row.prompt for row in self.cached}.values():
                prompt.blocks = place[prompt.blocks].tolist()

    def _grow(self, row: Row, length: int) -> bool:
        """Give a row blocks for `length` tokens, its own where it writes; False if it was put
        off."""
        at = row.cached // self.pool.block_size  # the block of the next token
        is_shared = at < row.num_blocks and self.pool.refs[self.tables[row.slot, at]] > 1
        num_new = self.num_blocks(length) - row.num_blocks
        if num_new == 0 and not is_shared:
            return True
        while len(self.pool.free) < num_new + is_shared:
            youngest = self.cached[-1]
            self.preempt(youngest)
            if youngest is row:
                return False
        if is_shared:
            shared, (own,) = int(self.tables[row.slot, at]), self.pool.take(1)
            self.pool.copy(shared, own)
            self.pool.release([shared])
            self.tables[row.slot, at] = own
        end = row.num_blocks + num_new
        self.tables[row.slot, row.num_blocks : end] = self.pool.take(num_new)
        row.num_blocks = end
        return True


def _age(row: Row) -> int:
    return row.handle


def _is_cached(owner: Prompt | Row) -> bool:
    return bool(owner.rows) if isinstance(owner, Prompt) else owner.slot is not None
