"""The embedded world: many small SQLite databases and SParC-like dialogues made from a seed.

It is small enough for two CPU cores and hard enough that running, checking and correcting pay off: only a database
knows how it spells a text value, and follow-ups keep earlier filters without saying so. It writes the files of the
public data sets, so nothing else knows that it is a toy, and a demonstrations.jsonl, one JSON object a line:
{"turn_id", "steps": [{"think", "exec_verdict", "memory_verdict", "action", "sql"}]} without any protocol tag.
"""

import hashlib
import json
import os
import random
import shutil
import sqlite3
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from mtsql.toyworld import dialogues as toydialogues
from mtsql.toyworld import words as toydomains
from mtsql.toyworld.dialogues import MAX_ROWS, Domain, demonstrate, first_turn, follow_up, to_sql
from mtsql.toyworld.words import CATEGORIES, DEV_DOMAINS, FIRST, LAST, NUMBERS, TRAIN_DOMAINS

SOURCES = (__file__, toydialogues.__file__, toydomains.__file__)
"""The code that decides what the world looks like."""


@dataclass(frozen=True)
class WorldConfig:
    """How much of the world is written."""

    num_train_databases: int = 300
    """Too many to learn their spellings by heart."""
    num_dev_databases: int = 24
    train_dialogues: int = 15
    """Per training database."""
    seen_dialogues: int = 1
    """Per training database, for dev_seen.json."""
    dev_dialogues: int = 8
    """Per held-out database."""

    def __post_init__(self):
        if min(self.num_train_databases, self.num_dev_databases) < 1:
            raise ValueError(
                "toy size: num_train_databases and num_dev_databases must be at least 1"
            )


def write_toy_world(folder: Path, seed: int = 0, size: WorldConfig = WorldConfig()) -> None:
    """Write the world for `seed` to `folder`: tables.json, train.json, dev_seen.json, dev.json,
    demonstrations.jsonl and database/. Its stamp, toyworld.json, says what it was made from.

    A folder that already holds this very world is left alone. ValueError for one that holds
    anything else: a world of another seed or size, or one that other code wrote.
    """
    folder = Path(folder)
    sources = b"".join(Path(source).read_bytes() for source in SOURCES)
    made_from = {"seed": seed, **asdict(size)}
    stamp = {"code": hashlib.blake2b(sources, digest_size=6).hexdigest(), **made_from}
    if folder.exists():
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
    train_pairs = _train_pairs(size.num_train_databases, seed)
    pairs = [*train_pairs, *islice(cycle(DEV_DOMAINS), size.num_dev_databases)]
    domains = [
        _make_domain(partial, pair, pairs[:i].count(pair), seed) for i, pair in enumerate(pairs)
    ]
    told: dict[str, list] = {"train": [], "dev_seen": [], "dev": []}
    for number, domain in enumerate(domains):
        path = partial / "database" / domain.db_id / f"{domain.db_id}.sqlite"
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        rng, seen = random.Random(f"{seed}/dialogues/{domain.db_id}"), set()
        is_train = number < len(train_pairs)
        plan = (
            [("train", size.train_dialogues), ("dev_seen", size.seen_dialogues)] if is_train else []
        )
        for split, count in plan or [("dev", size.dev_dialogues)]:
            for _ in range(count):
                told[split].append(
                    _make_dialogue(domain, rng, lambda sql: _run(connection, sql), seen)
                )
        connection.close()
    for (
        split,
        dialogues,
    ) in told.items():  # in mixed order: the first so many turns are a fair sample of all databases
        random.Random(f"{seed}/order/{split}").shuffle(dialogues)
        _write_json(partial / f"{split}.json", [dialogue for dialogue, _ in dialogues])
    demonstrations = [
        {"turn_id": f"train:{place}:{i}", "steps": turn_steps}
        for place, (_, steps) in enumerate(told["train"])
        for i, turn_steps in enumerate(steps)
    ]
    _write_json(partial / "tables.json", [_tables_entry(domain) for domain in domains])
    lines = "".join(json.dumps(record) + "\n" for record in demonstrations)
    (partial / "demonstrations.jsonl").write_text(lines, encoding="utf-8")
    _write_json(partial / "toyworld.json", stamp)
    os.replace(partial, folder)


def _read_stamp(folder: Path) -> dict:
    """What a world was made from; nothing if the folder holds no world."""
    try:
        stamp = json.loads((folder / "toyworld.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _train_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """The listed pairs, then pairs of a child and a parent drawn at random: a model that met each
    word in one company only learns the pairs by heart and not to read a schema. Held-out pairs are
    never drawn, in either order."""
    rng, pairs = random.Random(f"{seed}/pairs"), list(TRAIN_DOMAINS)
    children, parents = zip(*TRAIN_DOMAINS, strict=True)
    while len(pairs) < count:
        pair = (rng.choice(children), rng.choice(parents))
        if pair[0] != pair[1] and pair not in DEV_DOMAINS and pair[::-1] not in DEV_DOMAINS:
            pairs.append(pair)
    return pairs[:count]


def _make_domain(folder: Path, pair: tuple[str, str], copy: int, seed: int) -> Domain:
    """Choose columns and spellings for a database, fill it and write its file."""
    child, parent = pair
    db_id = f"{child}_{parent}" + (f"_{copy + 1}" if copy else "")
    rng = random.Random(f"{seed}/database/{db_id}")
    texts = rng.sample(sorted(CATEGORIES), 3)
    numbers = rng.sample(sorted(NUMBERS), 3)
    tables = {parent: ([texts[0]], [numbers[0]]), child: (texts[1:], numbers[1:])}
    spelling, values, rows = {}, {}, {}
    names = [f"{a} {b}".title() for a in FIRST for b in LAST]
    for table, (text_columns, number_columns) in tables.items():
        num_rows = 10 if table == parent else 45
        columns = [range(1, num_rows + 1), rng.sample(names, num_rows)]
        for column in text_columns:
            said = rng.sample(CATEGORIES[column], min(4, len(CATEGORIES[column])))
            drawn = said + rng.choices(said, k=num_rows - len(said))
            values[table, column] = tuple(sorted(set(drawn)))
            styles = rng.choices((str.lower, str.title, str.upper), k=len(said))
            spelled = {value: style(value) for value, style in zip(said, styles, strict=True)}
            spelling[table, column] = spelled
            columns.append([spelled[value] for value in drawn])
        for column in number_columns:
            low, high, step = NUMBERS[column]
            drawn = [rng.randrange(low, high + 1, step) for _ in range(num_rows)]
            values[table, column] = tuple(drawn)
            columns.append(drawn)
        if table == child:
            columns.append([rng.randint(1, 8) for _ in range(num_rows)])
        rows[table] = list(zip(*columns, strict=True))
    domain = Domain(
        db_id,
        child,
        parent,
        tuple(texts[1:]),
        tuple(numbers[1:]),
        texts[0],
        numbers[0],
        spelling,
        values,
    )
    path = folder / "database" / domain.db_id / f"{domain.db_id}.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    with connection:
        for table in (parent, child):
            columns = ", ".join(f"{name} {kind}" for name, kind in _columns(domain, table))
            key = f", FOREIGN KEY ({parent}_id) REFERENCES {parent}(id)" if table == child else ""
            connection.execute(f"CREATE TABLE {table} ({columns}, PRIMARY KEY (id){key})")
            marks = ", ".join("?" * len(rows[table][0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows[table])
    connection.close()
    return domain


def _columns(domain: Domain, table: str) -> list[tuple[str, str]]:
    """(column, SQL type) of a table, in order."""
    columns = [("id", "INTEGER"), ("name", "TEXT")]
    columns += [(c, "TEXT") for c in domain.categories(table)] + [
        (c, "INTEGER") for c in domain.numbers(table)
    ]
    return columns + ([(f"{domain.parent}_id", "INTEGER")] if table == domain.child else [])


def _tables_entry(domain: Domain) -> dict:
    """The database's entry in tables.json, in the official format."""
    tables = [domain.parent, domain.child]
    columns = [(-1, "*", "text")]
    for index, table in enumerate(tables):
        kinds = {"TEXT": "text", "INTEGER": "number"}
        columns += [(index, name, kinds[kind]) for name, kind in _columns(domain, table)]
    place = {(index, name): i for i, (index, name, _) in enumerate(columns)}
    return {
        "db_id": domain.db_id,
        "table_names": tables,
        "table_names_original": tables,
        "column_names": [[index, name.replace("_", " ")] for index, name, _ in columns],
        "column_names_original": [[index, name] for index, name, _ in columns],
        "column_types": [kind for _, _, kind in columns],
        "primary_keys": [place[0, "id"], place[1, "id"]],
        "foreign_keys": [[place[1, f"{domain.parent}_id"], place[0, "id"]]],
    }


def _make_dialogue(
    domain: Domain, rng: random.Random, run, seen: set
) -> tuple[dict, list[list[dict]]]:
    """A dialogue of 2 to 5 turns, never told twice for a database, and a demonstration of each
    turn."""
    while True:
        num_turns = rng.choices((2, 3, 4, 5), (2, 4, 3, 1))[0]
        question, state = first_turn(domain, rng)
        turns = [(question, state)] if _is_sound(state, None, domain, run) else []
        for _ in range(40):
            if not turns or len(turns) == num_turns:
                break
            after = follow_up(turns[-1][1], domain, rng)
            if after is not None and _is_sound(after[1], turns[-1][1], domain, run):
                turns.append(after)
        told = (domain.db_id, *(question for question, _ in turns))
        if len(turns) >= 2 and told not in seen:
            seen.add(told)
            break
    before = [None] + [state for _, state in turns]
    steps = [demonstrate(state, before[i], domain, rng, run) for i, (_, state) in enumerate(turns)]
    dialogue = {
        "database_id": domain.db_id,
        "interaction": [
            {"utterance": question, "query": to_sql(state, domain)} for question, state in turns
        ],
    }
    return dialogue, steps


def _is_sound(state, before, domain: Domain, run) -> bool:
    """Whether the turn's result is neither empty nor long, has no NULL or zero count alone, leaves
    no tie to LIMIT, and differs from the last turn's and from the result without its newest filter.
    """
    rows = run(to_sql(state, domain))
    if not rows or len(rows) > MAX_ROWS and not (before is None and len(rows) <= 45):
        return False
    if len(rows) == 1 and rows[0][0] in (None, 0):
        return False
    if state.limit:
        first, *rest = run(to_sql(replace(state, limit=False, columns=(state.order,)), domain))
        if first[0] in [row[0] for row in rest]:
            return False
    if before is not None and rows == run(to_sql(before, domain)):
        return False
    if state.filters and not state.limit:
        return rows != run(to_sql(replace(state, filters=state.filters[:-1]), domain))
    return True


def _run(connection: sqlite3.Connection, sql: str) -> list | None:
    """All rows, or None where the query fails."""
    try:
        return connection.execute(sql).fetchall()
    except sqlite3.Error:
        return None
