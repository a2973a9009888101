"""The embedded world: many small SQLite databases and SParC-like dialogues made from a seed.

It is small enough for two CPU cores and hard enough that running, checking and correcting queries
pay off. Follow-ups keep and drop earlier filters without saying so, only the database shows how it
spells a text value that they name, and only an earlier result shows what "that singer" is. The
files have the formats of the public data sets, so they are read like any other data. Besides, there
is a demonstrations.jsonl, one JSON object a line: {"turn_id", "steps": [{"think", "exec_verdict",
"memory_verdict", "action", "sql"}]} without any protocol tag.
"""

import hashlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from mtsql.demos import plan
from mtsql.toyworld import (
    changes,
    databases,
    demonstrations,
    dialogues,
    openings,
    references,
    states,
    words,
)
from mtsql.toyworld.databases import make_database, tables_entry
from mtsql.toyworld.demonstrations import demonstrate
from mtsql.toyworld.dialogues import AskedTurn, draw_dialogue
from mtsql.toyworld.states import Domain, RunQuery, to_sql
from mtsql.toyworld.words import DEV_DOMAINS, TRAIN_DOMAINS

SOURCES = (
    __file__,
    changes.__file__,
    databases.__file__,
    demonstrations.__file__,
    dialogues.__file__,
    openings.__file__,
    references.__file__,
    states.__file__,
    words.__file__,
    plan.__file__,
)
"""The code that decides what the world looks like: all files of this folder, and the shapes of its
demonstrations."""


@dataclass(frozen=True)
class WorldConfig:
    """The size of the world: numbers of databases and of dialogues."""

    num_train_databases: int = 300
    """Training databases: too many to memorise their spellings."""
    num_dev_databases: int = 24
    train_dialogues: int = 15
    """Dialogues of train.json for each training database."""
    seen_dialogues: int = 1
    """Dialogues of dev_seen.json for each training database."""
    dev_dialogues: int = 8
    """Dialogues of dev.json for each held-out database."""

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            least = int(name.endswith("_databases"))
            if number < least:
                raise ValueError(
                    f"the size of the world: {name} is {number}: it must be at least {least}"
                )


@dataclass(frozen=True)
class MadeDialogue:
    """A dialogue as it was drawn, as train.json has it, and the steps that demonstrate each of its
    turns."""

    domain: Domain
    turns: list[AskedTurn]
    entry: dict
    steps: list[list[dict]]


def write_toy_world(folder: Path, seed: int = 0, size: WorldConfig = WorldConfig()) -> None:
    """Write the world for `seed` to `folder`: tables.json, train.json, dev_seen.json, dev.json,
    demonstrations.jsonl and database/. Its stamp, toyworld.json, says what it was made from.

    A folder that already holds this very world is left alone, and an empty one is filled.
    ValueError if it holds anything else: a world of another seed or size, one that other code
    wrote, or other files.
    """
    folder = Path(folder)
    made_from = {"seed": seed, **asdict(size)}
    stamp = {"code": _hash_of_sources(), **made_from}
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty:
        found = _read_stamp(folder)
        if found == stamp:
            return
        is_stale = made_from.items() <= found.items()
        what = "this world as other code wrote it" if is_stale else "another world"
        raise ValueError(
            f"{folder} exists and holds {what}: remove it, or set data.toy_folder to a new folder"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    domains, made = make_dialogues(partial, seed, size)
    write_tables(partial, domains)
    for split, of_split in made.items():
        _write_json(partial / f"{split}.json", [dialogue.entry for dialogue in of_split])
    lines = "".join(json.dumps(record) + "\n" for record in _demonstrations(made["train"]))
    (partial / "demonstrations.jsonl").write_text(lines, encoding="utf-8")
    _write_json(partial / "toyworld.json", stamp)
    os.replace(partial, folder)


def make_dialogues(
    folder: Path, seed: int, size: WorldConfig
) -> tuple[list[Domain], dict[str, list[MadeDialogue]]]:
    """Write the databases of a world to `folder`/database, and return their domains and the
    dialogues of each split as they are in its file."""
    train_domains = _make_databases(folder, _train_pairs(size.num_train_databases, seed), seed)
    dev_pairs = list(islice(cycle(DEV_DOMAINS), size.num_dev_databases))
    dev_domains = _make_databases(folder, dev_pairs, seed)

    made: dict[str, list[MadeDialogue]] = {"train": [], "dev_seen": [], "dev": []}
    train_counts = {"train": size.train_dialogues, "dev_seen": size.seen_dialogues}
    for domain in train_domains:
        _add_dialogues(folder, domain, seed, train_counts, made)
    for domain in dev_domains:
        _add_dialogues(folder, domain, seed, {"dev": size.dev_dialogues}, made)
    for split, of_split in made.items():
        # In mixed order, so that the first dialogues of a file are a fair sample of all databases.
        random.Random(f"{seed}/order/{split}").shuffle(of_split)
    return train_domains + dev_domains, made


def write_tables(folder: Path, domains: list[Domain]) -> None:
    """Write the schemas of the databases to `folder`/tables.json."""
    _write_json(folder / "tables.json", [tables_entry(domain) for domain in domains])


def _hash_of_sources() -> str:
    sources = b"".join(Path(source).read_bytes() for source in SOURCES)
    return hashlib.blake2b(sources, digest_size=6).hexdigest()


def _read_stamp(folder: Path) -> dict:
    """What a world was made from; empty if the folder holds no world."""
    try:
        stamp = json.loads((folder / "toyworld.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _train_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """The listed pairs, then pairs of a child and a parent drawn at random.

    If each word appeared with one partner only, the model would memorise pairs instead of reading
    the schema. Held-out pairs are never drawn, in either order.
    """
    rng = random.Random(f"{seed}/pairs")
    pairs = list(TRAIN_DOMAINS)
    children = [child for child, _ in TRAIN_DOMAINS]
    parents = [parent for _, parent in TRAIN_DOMAINS]
    while len(pairs) < count:
        child = rng.choice(children)
        parent = rng.choice(parents)
        is_held_out = (child, parent) in DEV_DOMAINS or (parent, child) in DEV_DOMAINS
        if child != parent and not is_held_out:
            pairs.append((child, parent))
    return pairs[:count]


def _make_databases(folder: Path, pairs: list[tuple[str, str]], seed: int) -> list[Domain]:
    """A database for each pair of a child and a parent. A pair that is listed again gets another
    database."""
    domains = []
    for number, pair in enumerate(pairs):
        num_before = pairs[:number].count(pair)
        domains.append(make_database(folder, pair, num_before, seed))
    return domains


def _add_dialogues(
    folder: Path,
    domain: Domain,
    seed: int,
    counts: dict[str, int],
    made: dict[str, list[MadeDialogue]],
) -> None:
    """Add dialogues about a database to `made`: for each split, as many as `counts` says."""
    path = folder / "database" / domain.db_id / f"{domain.db_id}.sqlite"
    rng = random.Random(f"{seed}/dialogues/{domain.db_id}")
    seen: set[tuple[str, ...]] = set()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        run = RunQuery(connection)
        for split, count in counts.items():
            for _ in range(count):
                made[split].append(_make_dialogue(domain, rng, run, seen))


def _make_dialogue(
    domain: Domain, rng: random.Random, run: RunQuery, seen: set[tuple[str, ...]]
) -> MadeDialogue:
    """A dialogue of 2 to 6 turns, with a demonstration of each turn.

    seen: the questions of all earlier dialogues about the database. No dialogue repeats them.
    """
    while True:
        turns = draw_dialogue(domain, rng, run)
        questions = tuple(turn.question for turn in turns)
        if len(turns) >= 2 and questions not in seen:
            seen.add(questions)
            break
    steps = [demonstrate(turn, turns[:place], domain, rng, run) for place, turn in enumerate(turns)]
    interaction = [
        {"utterance": turn.question, "query": to_sql(turn.state, domain)} for turn in turns
    ]
    entry = {"database_id": domain.db_id, "interaction": interaction}
    return MadeDialogue(domain, turns, entry, steps)


def _demonstrations(train: list[MadeDialogue]) -> Iterator[dict]:
    """A record for each turn of train.json, in the order of the file."""
    for place, dialogue in enumerate(train):
        for index, steps in enumerate(dialogue.steps):
            yield {"turn_id": f"train:{place}:{index}", "steps": steps}
