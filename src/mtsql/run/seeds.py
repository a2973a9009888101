"""Seeds of the generators, drawn from (seed, update, rank), so that a checkpoint stores none."""

import hashlib

from accelerate.utils import set_seed


def require_seed(seed: int) -> None:
    """ValueError for a seed that torch does not take, or that draws the same numbers as another
    seed."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}: it must be at least 0 and below 2 ** 63")


def seed_update(seed: int, update: int, rank: int) -> None:
    """Seed every generator of this process from (seed, update, rank).

    An update can then be repeated without a saved generator state. No two ranks or updates of a
    run draw the same numbers (up to 4,096 ranks and a million updates).
    """
    set_seed(generator_seed(seed, update, rank))


def generator_seed(seed: int, update: int, rank: int) -> int:
    """A seed of 32 bits, which is all that NumPy takes and that torch's CPU generator uses.

    Hashing all three numbers to 32 bits would start to collide after some ten thousand (update,
    rank) pairs, so only `seed` is hashed.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") ^ ((update << 12 | rank) & 0xFFFFFFFF)
