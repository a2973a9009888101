"""Dialogues and their turns, from the official SParC, CoSQL and Spider files."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from mtsql.sql.schema import Schema, load_schemas, read_json_list


@dataclass(frozen=True)
class Turn:
    """One user question. Indices count from 0 in the file, whatever was skipped before.

    turn_id: "train:12:3", the file's stem, the dialogue and the turn.
    history: (question, gold SQL) of all earlier turns of the dialogue, the oldest first.
    evidence: what the data says besides the question (BIRD), shown with it; often empty.
    """

    turn_id: str
    index: int
    db_id: str
    question: str
    sql: str
    history: tuple[tuple[str, str], ...] = ()
    evidence: str = ""


@dataclass(frozen=True)
class Dialogue:
    dialogue_id: str
    db_id: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Skip:
    """What was left out of a file: `num_turns` turns of the dialogue `index`, and why."""

    file: str
    index: int
    reason: str
    num_turns: int


@dataclass(frozen=True)
class Corpus:
    """Dialogues, and the schema and file of each database they use.

    skipped: what the file holds and no run can use. left_out: turn id -> reason, what the user took out.
    """

    dialogues: list[Dialogue]
    schemas: dict[str, Schema]
    db_paths: dict[str, Path]
    skipped: list[Skip] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def turns(self) -> list[Turn]:
        return [turn for dialogue in self.dialogues for turn in dialogue.turns]


def load_corpus(dialogues_file: Path, tables_file: Path, database_dir: Path) -> Corpus:
    """Read a SParC or CoSQL file (entries with `interaction`) or a Spider file (with `question`).

    Turn questions only, not an interaction's `final` goal. A Spider entry is a dialogue of one turn.
    CoSQL joins the user's and the system's clarifications to the question by ` | `; that text stays.

    Left out, and listed in `skipped`: a dialogue whose database is not in the tables file or has no
    file `database_dir/<db_id>/<db_id>.sqlite`; a dialogue without turns; a turn without SQL together with
    all later turns of its dialogue. Those are cut because their history would have a gap: their
    questions lean on a turn ("which of these ...") whose SQL nobody knows.

    Raises ValueError naming the file or folder that is missing or malformed (with the entry and the
    key), and the file that has no usable turn.
    """
    dialogues_file, database_dir = Path(dialogues_file), Path(database_dir)
    schemas = load_schemas(tables_file)
    entries = read_json_list(dialogues_file)
    if not database_dir.is_dir():
        raise ValueError(f"{database_dir}: no such folder of databases")
    dialogues: list[Dialogue] = []
    skipped: list[Skip] = []
    db_paths: dict[str, Path] = {}
    for index, entry in enumerate(entries):
        db_id, pairs = _read_entry(entry, f"{dialogues_file}: entry {index}")
        path = database_dir / db_id / f"{db_id}.sqlite"
        num_usable = next((i for i, (_, sql) in enumerate(pairs) if not sql), len(pairs))
        if db_id not in schemas:
            reason, num_usable = f"database {db_id!r} is not in {tables_file}", 0
        elif not path.is_file() or path.stat().st_size == 0:
            reason, num_usable = f"no database file {path}", 0
        elif not pairs:
            reason = "no turns"
        else:
            reason = f"turn {num_usable} has no SQL: it and all later turns are left out"
        if num_usable < len(pairs) or not pairs:
            skipped.append(Skip(str(dialogues_file), index, reason, len(pairs) - num_usable))
        if num_usable:
            dialogue_id = f"{dialogues_file.stem}:{index}"
            dialogues.append(
                Dialogue(dialogue_id, db_id, _build_turns(dialogue_id, db_id, pairs[:num_usable]))
            )
            db_paths[db_id] = path
    if not dialogues:
        why = f"; the first of {len(skipped)} skipped: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{dialogues_file}: no usable turn{why}")
    return Corpus(dialogues, {db_id: schemas[db_id] for db_id in db_paths}, db_paths, skipped)


def _read_entry(entry: object, where: str) -> tuple[str, list[tuple[str, str]]]:
    """-> (database id, [(question, SQL or "")])."""
    if not isinstance(entry, dict) or not ("interaction" in entry or "question" in entry):
        raise ValueError(
            f"{where}: expected an object with `interaction` (SParC, CoSQL) or `question` (Spider)"
        )
    if "interaction" not in entry:
        return _text(entry, "db_id", where), [(_text(entry, "question", where), _sql(entry, where))]
    turns = entry["interaction"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: interaction: expected a list of objects")
    pairs = []
    for index, turn in enumerate(turns):
        at_turn = f"{where}: interaction[{index}]"
        pairs.append((_text(turn, "utterance", at_turn), _sql(turn, at_turn)))
    return _text(entry, "database_id", where), pairs


def _text(entry: dict, key: str, where: str) -> str:
    if not isinstance(entry.get(key), str):
        raise ValueError(f"{where}: {key}: expected a string, found {entry.get(key)!r:.80}")
    return entry[key]


def _sql(entry: dict, where: str) -> str:
    return "" if entry.get("query") is None else _text(entry, "query", where).strip()


def _build_turns(dialogue_id: str, db_id: str, pairs: list[tuple[str, str]]) -> tuple[Turn, ...]:
    return tuple(
        Turn(f"{dialogue_id}:{index}", index, db_id, question, sql, tuple(pairs[:index]))
        for index, (question, sql) in enumerate(pairs)
    )


def split_by_database(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out whole databases -> (rest, held out), to select models on databases never trained on.

    The held-out part has at most `fraction` of the dialogues, unless no database is that small; at
    least one database stays on either side. `skipped` stays with the rest. The paper selects on its
    test file instead; about 5 % of the training dialogues is our choice.
    """
    db_ids = sorted(corpus.db_paths)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, found {fraction}")
    if len(db_ids) < 2:
        raise ValueError(f"only {len(db_ids)} database in the corpus: nothing to hold out")
    sizes = {db_id: sum(dialogue.db_id == db_id for dialogue in corpus.dialogues) for db_id in db_ids}
    random.Random(seed).shuffle(db_ids)
    held_out: set[str] = set()
    num_free = fraction * len(corpus.dialogues)
    for db_id in db_ids:
        if sizes[db_id] <= num_free:
            held_out.add(db_id)
            num_free -= sizes[db_id]
    held_out = held_out or {min(db_ids, key=lambda db_id: sizes[db_id])}
    return _select(corpus, set(db_ids) - held_out, corpus.skipped), _select(corpus, held_out, [])


def _select(corpus: Corpus, db_ids: set[str], skipped: list[Skip]) -> Corpus:
    return Corpus(
        [dialogue for dialogue in corpus.dialogues if dialogue.db_id in db_ids],
        {db_id: schema for db_id, schema in corpus.schemas.items() if db_id in db_ids},
        {db_id: path for db_id, path in corpus.db_paths.items() if db_id in db_ids},
        skipped,
        corpus.left_out,
    )
