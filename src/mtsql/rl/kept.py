"""Which trajectories a run keeps, and the file that they are kept in: JSON Lines, compressed with
gzip, a line for each trajectory (trajectory_record.py).

Each group is a gzip member of its own, so that ranks compress side by side and the size is known
before anything is written. Programs that read gzip read the members as one text. The same groups
give the same bytes, however many ranks there are.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
KeptGroup = tuple[str, bytes]
"""The id of a turn, and the compressed lines of its trajectories."""
LEVEL = 6
"""Of gzip: 9 takes three times as long and saves 1 %."""


@dataclass(frozen=True)
class KeptConfig:
    """Which trajectories are kept as compressed JSON Lines, in RUN/trajectories."""

    keep_frac: float = 1.0
    """Fraction of the turns whose trajectories are kept, chosen by a hash of turn and update. A
    group is kept as a whole. 0: none."""
    max_mb: float = 4.0
    """Maximum size of a file, in megabytes as compressed. An update has a file, and so has each
    split or part of an evaluation. Turns that do not fit are left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep_frac <= 1:
            raise ValueError(
                f"trajectories.keep_frac is {self.keep_frac}: it must be between 0 and 1"
            )
        if not self.max_mb > 0:
            raise ValueError(f"trajectories.max_mb is {self.max_mb}: it must be above 0")


def is_kept(turn_id: str, update: int, config: KeptConfig) -> bool:
    """Whether the trajectories of a turn are kept, if they fit."""
    return _place(turn_id, update) < config.keep_frac


def packed(records: Sequence[Record]) -> bytes:
    """The records of a group as compressed lines, the same bytes each time. Half a character (a
    lone surrogate), which UTF-8 does not have, becomes a question mark."""
    lines = [json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in records]
    text = "".join(f"{line}\n" for line in lines)
    return gzip.compress(text.encode(errors="replace"), LEVEL, mtime=0)


def file_content(groups: Sequence[KeptGroup], update: int, config: KeptConfig) -> bytes:
    """The content of a file: of the groups of all ranks, as many as fit into it, in the order of
    their turns' ids. Which ones are left out does not depend on their content."""
    room = int(config.max_mb * 1e6)
    chosen = []
    for turn_id, content in sorted(groups, key=lambda one: _place(one[0], update)):
        room -= len(content)
        if room < 0:
            break
        chosen.append((turn_id, content))
    chosen.sort(key=lambda one: _in_order(one[0]))
    return b"".join(content for _, content in chosen)


def _place(turn_id: str, update: int) -> float:
    """A number in [0, 1) for a turn and an update, the same on every machine."""
    digest = hashlib.blake2b(f"{update}/{turn_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _in_order(turn_id: str) -> list[tuple[bool, int, str]]:
    """A key that sorts `dev:9:1` before `dev:10:0`."""
    parts = turn_id.split(":")
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
