"""What must hold for the cache of an engine after every step."""

import numpy as np

from mtsql.engine.blocks import PrefixBlock
from mtsql.engine.engine import Engine


def check_cache(engine: Engine) -> None:
    """Every block is in one state, and its references are those of the rows and prompts that have
    it."""
    pool = engine.pool
    refs = [0] * pool.num_blocks
    scheduler = engine.scheduler
    for prompt in {row.prompt for row in scheduler.cached}:
        assert prompt.path
        for block in prompt.blocks:
            refs[block] += 1
    for row in scheduler.cached:
        for block in scheduler.tables[row.slot, : row.num_blocks]:
            refs[block] += 1
    assert pool.refs.tolist() == refs
    unused = [one.block for one in pool.unused]
    used = [block for block in range(pool.num_blocks) if refs[block]]
    assert sorted([*pool.empty, *unused, *used]) == list(range(pool.num_blocks))
    assert pool.empty == sorted(pool.empty)
    known = {one.block: one for one in known_blocks(scheduler.prefixes.first)}
    if scheduler.prefixes.is_shared:
        assert pool.content == known
    assert np.flatnonzero(pool.is_known).tolist() == sorted(pool.content)
    assert set(unused) <= set(pool.content)


def known_blocks(following: dict[tuple[int, ...], PrefixBlock]) -> list[PrefixBlock]:
    """All blocks of a tree of prompts."""
    found: list[PrefixBlock] = []
    for ids, one in following.items():
        assert one.ids == ids and one.siblings is following
        found += [one, *known_blocks(one.following)]
    return found
