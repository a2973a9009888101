"""Play every turn of a long list with the same weights, in chunks that are kept as they finish.

Stage 1 and the curriculum's probe play thousands of turns. Each rank appends its finished chunks to
a file, so a killed run goes on with the first missing chunk:

    FOLDER/rank0.jsonl     a chunk a line
        {"of": "round 0", "key": "5b1f..", "chunk": 12, "turns": ["train:3:0", ..],
         "work": {"sampled": 91204, ..}, "found": ..}

A chunk begins with an empty cache. So its tokens, and the last bits of their log-probs, depend on
its turns, the weights and the seeds, but neither on other chunks nor on the rank that plays it. A
resumed run may therefore have another number of ranks, and on a CPU it finds what the straight run
finds bit for bit. `key` is a hash of the weights, the turns and the settings of the rollouts: a
line with another key is not used. `found` is what is kept of the chunk's trajectories, which
themselves are forgotten.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mtsql.engine.counts import EngineCounts
from mtsql.engine.engine import Engine
from mtsql.files import WriteError, append_line, parse_json
from mtsql.rl.rollout import Show, show_nothing, show_part
from mtsql.run.ranks import Ranks
from mtsql.sql.dialogues import Turn

TURNS_PER_CHUNK = 64
"""Turns of a chunk. A killed run loses at most one chunk a rank; at the end of each one fewer and
fewer rows decode."""
FIRST_TURNS = 100
"""After this many turns `check` looks at what was found."""
KEYS = {"of": str, "key": str, "chunk": int, "turns": list, "work": dict, "found": object}
"""The keys of a line, and their types."""

Play = Callable[[list[Turn], Show], Any]
"""Plays a chunk and returns what is kept of it, as JSON."""
Record = dict[str, Any]
"""A line of a file."""


@dataclass(frozen=True)
class Sweep:
    """What is played, and where it is kept."""

    name: str
    """For the reader of a file, such as "round 0"."""
    folder: Path
    key: str
    """See `sweep_key`."""
    chunks: list[list[Turn]]
    num_samples: int
    """Episodes for each turn."""


@dataclass(frozen=True)
class Swept:
    """What all ranks have found."""

    found: list[Any]
    """What `play` has returned for each chunk, in their order."""
    work: EngineCounts
    """The engines' counts of all chunks, without seconds."""
    played: EngineCounts
    """What this rank has counted since the run was started or resumed."""


def chunks_of(turns: list[Turn], seed: int) -> list[list[Turn]]:
    """The turns in chunks. The turns of a database follow each other, so that their prompts find
    its schema in the cache. The seed draws the order of the chunks, so that the first ones give an
    idea of all."""
    ordered = sorted(turns, key=lambda turn: (turn.db_id, turn.turn_id))
    starts = range(0, len(ordered), TURNS_PER_CHUNK)
    chunks = [ordered[start : start + TURNS_PER_CHUNK] for start in starts]
    random.Random(seed).shuffle(chunks)
    return chunks


def sweep_key(model: torch.nn.Module, chunks: list[list[Turn]], settings: dict[str, Any]) -> str:
    """A hash of the settings, of the turns of each chunk, and of a few numbers of each weight."""
    total = hashlib.blake2b(digest_size=8)
    turn_ids = [[turn.turn_id for turn in chunk] for chunk in chunks]
    total.update(json.dumps([settings, turn_ids], sort_keys=True).encode())
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()[:16].float().tolist()
        total.update(json.dumps([name, numbers]).encode())
    return total.hexdigest()


def sweep(
    plan: Sweep,
    engine: Engine,
    play: Play,
    ranks: Ranks,
    *,
    check: Callable[[list[Any]], None] | None = None,
    show: Show = show_nothing,
) -> Swept:
    """Play the chunks that are not kept yet; each rank takes its share of them.

    When about `FIRST_TURNS` turns are played, `check` is called on every rank with what all ranks
    have found so far; it may raise a ValueError. This is the only time that ranks wait for each
    other before the end. `show` is told of each episode of this rank that ends.
    """
    kept: dict[int, Record] = {}
    ranks.on_main(lambda: kept.update(read_chunks(plan)))
    kept = ranks.from_main(lambda: kept)
    missing = [number for number in range(len(plan.chunks)) if number not in kept]
    mine = ranks.share(missing)
    num_all = plan.num_samples * sum(len(plan.chunks[number]) for number in mine)
    file = plan.folder / f"rank{ranks.index}.jsonl"
    if mine:
        prepare(file)
    records: list[Record] = []
    num_done = 0
    begun = replace(engine.counts)

    def play_chunks(numbers: list[int]) -> None:
        nonlocal num_done
        for number in numbers:
            chunk = plan.chunks[number]
            engine.forget_prompts()
            before = replace(engine.counts)
            found = play(chunk, show_part(show, num_done, num_all))
            counts = asdict(engine.counts - before)
            work = {name: count for name, count in counts.items() if isinstance(count, int)}
            line = json.dumps(
                {
                    "of": plan.name,
                    "key": plan.key,
                    "chunk": number,
                    "turns": [turn.turn_id for turn in chunk],
                    "work": work,
                    "found": found,
                }
            )
            append_synced(file, line)
            records.append(json.loads(line))  # what a resumed run reads
            num_done += plan.num_samples * len(chunk)

    num_first = 0
    if check is not None and sum(len(record["turns"]) for record in kept.values()) < FIRST_TURNS:
        num_first = -(-FIRST_TURNS // (TURNS_PER_CHUNK * ranks.count))
    play_chunks(mine[:num_first])
    if check is not None:
        check([record["found"] for record in [*kept.values(), *ranks.gather(records)]])
    play_chunks(mine[num_first:])
    everything = kept | {record["chunk"]: record for record in ranks.gather(records)}
    ordered = [everything[number] for number in range(len(plan.chunks))]
    total = EngineCounts()
    for record in ordered:
        total += EngineCounts(**record["work"])
    found = [record["found"] for record in ordered]
    return Swept(found, total, engine.counts - begun)


def read_chunks(plan: Sweep) -> dict[int, Record]:
    """The finished chunks of a sweep by their numbers. A last line without its end was torn when
    the process was killed, and does not count. ValueError that names file and line for other
    damage."""
    chunks: dict[int, Record] = {}
    for file in sorted(plan.folder.glob("rank*.jsonl")):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            record = _record(line, f"{file}, line {number}")
            if record["key"] == plan.key:
                chunks.setdefault(record["chunk"], record)
    return chunks


def prepare(file: Path) -> None:
    """Make the file if there is none, and remove a torn last line. WriteError that names it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as handle:
            handle.seek(0)
            num_bytes = sum(len(line) for line in handle if line.endswith(b"\n"))
            handle.truncate(num_bytes)
    except OSError as error:
        raise WriteError(f"{file}: cannot be written: {error.strerror}") from error


def append_synced(file: Path, line: str) -> None:
    """Add a line that stays even if the machine fails. WriteError that names the file."""
    try:
        append_line(file, line)
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise WriteError(f"{file}: cannot be written: {error.strerror}") from error


def _record(line: bytes, where: str) -> Record:
    """A line as a record. ValueError that begins with `where` if it is none."""
    try:
        record = parse_json(line.decode(), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8") from error
    if not isinstance(record, dict) or not all(
        key in record and isinstance(record[key], kind) for key, kind in KEYS.items()
    ):
        raise ValueError(
            f"{where}: not a finished chunk of this program: delete the line to play it again"
        )
    return dict(record)
