"""Prompts that begin alike share the blocks of their beginning.

The turns of a dialogue, and all dialogues over a database, begin with the same task and schema. A
full block of a prompt is found by its content: its tokens and the block before it. The comparison
is exact. Three prompts with a task T, a schema S and questions q, r, in blocks of 4 tokens:

    prompt x   T T T T | S S S S | q q r        x, y and z share the first block, x and y also the
    prompt y   T T T T | S S S S | q q q q      second one. The last block of y begins as a copy of
    prompt z   T T T T | S S r                  that of x, because both begin with q q.

A prompt keeps its blocks while a row of its group is in the cache. After that their content stays
known until the blocks are needed: the least recently used one is taken first, and a block before
the one that it follows. Keys and values belong to the weights that computed them, so an engine must
not outlive its weights.

A block is computed once: a prompt whose next block is computed by another one waits for it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mtsql.engine.blocks import BlockPool, PrefixBlock

if TYPE_CHECKING:
    from mtsql.engine.scheduler import Row

WORTH_WAITING = 4
"""A prompt waits for another one to compute the beginning of a block if that is at least a fourth
of the block."""


@dataclass(eq=False)
class Prompt:
    """A prompt and its blocks, which it has while some row of its group is in the cache."""

    ids: list[int]
    rows: list["Row"] = field(default_factory=list)  # those in the cache
    path: list[PrefixBlock] = field(default_factory=list)  # its blocks in order
    cached: int = 0  # tokens with keys and values
    seen: int = 0  # most tokens ever cached
    hidden: Tensor | None = None  # (width,) of its last token: all samples draw their first from it

    @property
    def is_ready(self) -> bool:
        """Whether the keys and values of all its tokens are in the cache."""
        return self.cached == len(self.ids)

    @property
    def blocks(self) -> list[int]:
        """The places of its blocks."""
        return [one.block for one in self.path]


class Prefixes:
    """The blocks of all prompts, in use or not."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.first: dict[tuple[int, ...], PrefixBlock] = {}  # first blocks of prompts by their ids
        self.computing: dict[Prompt, None] = {}  # prompts with blocks that are not yet ready
        self.num_hits = 0  # tokens of prompts that were found
        self.is_shared = True  # False to measure without: no prompt finds a block of another one
        self._seen: dict[int, int] = {}  # chain of a block -> most tokens of it ever cached

    def num_missing(self, prompt: Prompt) -> int:
        """Free blocks that the prompt would take."""
        if prompt.path:
            return 0
        num_used = sum(bool(self.pool.refs[one.block]) for one in self._find(prompt))
        return self.pool.blocks_for(len(prompt.ids)) - num_used

    def attach(self, prompt: Prompt) -> None:
        """Give a prompt its blocks: those that are known, and free ones for the rest."""
        path = self._find(prompt)
        for one in path:
            self.pool.reuse(one)
        size = self.pool.block_size
        num_new = self.pool.blocks_for(len(prompt.ids)) - len(path)
        following = path[-1].following if path else self._first()
        for block in self.pool.take(num_new, from_top=True):
            ids = tuple(prompt.ids[len(path) * size : (len(path) + 1) * size])
            chain = hash((path[-1].chain if path else 0, ids))
            one = PrefixBlock(block, ids, following, chain)
            following[ids] = one
            self.pool.keep(one)
            path.append(one)
            following = one.following
        prompt.path = path
        self.computing[prompt] = None
        self._advance(prompt)

    def detach(self, prompt: Prompt) -> None:
        """Release the blocks of a prompt, the last one first."""
        for one in reversed(prompt.path):
            self.pool.release([one.block])
            if one in self.pool.unused and (one.cached == 0 or not self.is_shared):
                self.pool.forget(one)
        prompt.path = []
        prompt.cached = 0
        self.computing.pop(prompt, None)

    def forget(self) -> None:
        """Empty all blocks. No row may be in the cache."""
        while self.pool.unused:
            self.pool.forget(next(iter(self.pool.unused)))
        self._seen.clear()

    def advance(self) -> None:
        """Note which tokens of prompts have keys and values by now, whoever has computed them."""
        for prompt in list(self.computing):
            if not prompt.is_ready:
                self._advance(prompt)
            if prompt.is_ready:
                del self.computing[prompt]

    def _advance(self, prompt: Prompt) -> None:
        size = self.pool.block_size
        before = max(prompt.cached, prompt.seen)
        for place in range(prompt.cached // size, len(prompt.path)):
            one = prompt.path[place]
            if one.cached == 0:
                self._copy_beginning(one)
            prompt.cached = max(prompt.cached, place * size + one.cached)
            if one.cached < len(one.ids):
                break
        if prompt.is_ready and prompt.hidden is None:
            prompt.cached -= 1  # compute the last token again: its hidden state is needed
        self.num_hits += max(0, prompt.cached - before)
        prompt.seen = max(prompt.seen, prompt.cached)

    def may_compute(self, prompt: Prompt, computing: set[PrefixBlock]) -> bool:
        """Whether the prompt may compute its next token in a step that computes tokens of the
        blocks `computing` for other prompts."""
        one = prompt.path[prompt.cached // self.pool.block_size]
        if one in computing:
            return False
        if one.cached:
            return True
        worth = max(1, self.pool.block_size // WORTH_WAITING)
        others = (other for other in computing if other.siblings is one.siblings)
        return all(_num_common(one.ids, other.ids) < worth for other in others)

    def next_blocks(self, prompt: Prompt, num: int) -> list[PrefixBlock]:
        """The blocks of the prompt's next `num` tokens."""
        end = self.pool.blocks_for(prompt.cached + num)
        return prompt.path[prompt.cached // self.pool.block_size : end]

    def computed(self, prompt: Prompt, num: int) -> int:
        """Note that the prompt's next `num` tokens have been computed. Returns how many of them
        were not computed before; a block that is computed again after its content was forgotten is
        recognised as a whole."""
        size = self.pool.block_size
        num_distinct = 0
        blocks = self.next_blocks(prompt, num)
        for place, one in enumerate(blocks, prompt.cached // size):
            before = max(prompt.cached - place * size, self._seen.get(one.chain, 0))
            cached = min(prompt.cached + num - place * size, len(one.ids))
            num_distinct += max(0, cached - before)
            one.cached = max(one.cached, cached)
            self._seen[one.chain] = max(before, cached)
        prompt.cached += num
        prompt.seen = max(prompt.seen, prompt.cached)
        return num_distinct

    def _first(self) -> dict[tuple[int, ...], PrefixBlock]:
        return self.first if self.is_shared else {}

    def _find(self, prompt: Prompt) -> list[PrefixBlock]:
        """The known blocks that the prompt begins with."""
        size = self.pool.block_size
        path: list[PrefixBlock] = []
        following = self._first()
        for start in range(0, len(prompt.ids), size):
            one = following.get(tuple(prompt.ids[start : start + size]))
            if one is None:
                break
            path.append(one)
            following = one.following
        return path

    def _copy_beginning(self, one: PrefixBlock) -> None:
        """Copy the tokens that an empty block has in common with a computed one at its place."""
        best = 0
        source = one
        for other in one.siblings.values():
            num = min(other.cached, _num_common(one.ids, other.ids))
            if num > best:
                best, source = num, other
        if best:
            self.pool.copy(source.block, one.block)
            one.cached = best


def _num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many first ids are the same."""
    num = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        num += 1
    return num
