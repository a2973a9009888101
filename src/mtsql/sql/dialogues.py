"""Dialogues and their turns, each with the schema and the file of its database."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from mtsql.sql.database_files import DatabaseFolder, unread_changes
from mtsql.sql.questions import Question, read_conversations
from mtsql.sql.schema import Database, Schema, first_difference, load_schemas, schema_from_sqlite


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
    """Dialogues, and each database they use by its id.

    skipped: what the file holds and no run can use. left_out: turn id -> reason, what the user took
    out.
    """

    dialogues: list[Dialogue]
    databases: dict[str, Database]
    skipped: list[Skip] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def turns(self) -> list[Turn]:
        return [turn for dialogue in self.dialogues for turn in dialogue.turns]


def load_corpus(
    dialogues_file: Path | str, tables_file: Path | str | None, database_dir: Path | str
) -> Corpus:
    """Read the dialogues of a file, in any of the formats of questions.py, with their databases.

    Turn questions only, not an interaction's `final` goal. A single question is a dialogue of one
    turn. CoSQL joins the user's and the system's clarifications to the question by ` | `; that text
    stays. tables_file: the official tables.json; None: schemas are read from the database files.

    Left out, and listed in `skipped`: a dialogue whose database is not in the tables file, has no
    file (database_files.py says where it is looked for) or one that SQLite cannot read; a dialogue
    without turns; a turn without SQL together with all later turns of its dialogue. Those are cut
    because their history would have a gap: their questions lean on a turn ("which of these ...")
    whose SQL nobody knows.

    Raises ValueError naming the file or folder that is missing or malformed (with the entry and the
    key), the first thing in which a database in use differs from the tables file, and the file that
    has no usable turn.
    """
    dialogues_file = Path(dialogues_file)
    schemas = None if tables_file is None else load_schemas(tables_file)
    conversations = read_conversations(dialogues_file)
    databases = Databases(DatabaseFolder(database_dir), schemas, tables_file)
    dialogues: list[Dialogue] = []
    skipped: list[Skip] = []
    for index, conversation in enumerate(conversations):
        db_id, questions = conversation.db_id, conversation.questions
        num_usable = next((i for i, q in enumerate(questions) if not q.sql), len(questions))
        reason = databases.open(db_id)
        if reason:
            num_usable = 0
        elif not questions:
            reason = "no turns"
        else:
            reason = f"turn {num_usable} has no SQL: it and all later turns are left out"
        if num_usable < len(questions) or not questions:
            skipped.append(Skip(str(dialogues_file), index, reason, len(questions) - num_usable))
        if num_usable:
            dialogue_id = f"{dialogues_file.stem}:{index}"
            turns = _build_turns(dialogue_id, db_id, questions[:num_usable])
            dialogues.append(Dialogue(dialogue_id, db_id, turns))
    if not dialogues:
        why = f"; the first of {len(skipped)} skipped: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{dialogues_file}: no usable turn{why}")
    used = {dialogue.db_id for dialogue in dialogues}
    found = {db_id: known for db_id, known in databases.known.items() if db_id in used}
    return Corpus(dialogues, found, skipped)


class Databases:
    """The databases that the dialogues of a file use.

    known: id -> database. unusable: id -> why dialogues on it are skipped.
    """

    def __init__(
        self,
        folder: DatabaseFolder,
        schemas: dict[str, Schema] | None,
        tables_file: Path | str | None,
    ) -> None:
        self.folder, self.schemas, self.tables_file = folder, schemas, tables_file
        self.known: dict[str, Database] = {}
        self.unusable: dict[str, str] = {}

    def open(self, db_id: str) -> str:
        """Find a database and its schema; -> why it cannot be used, or an empty text.

        ValueError if it has several files, or if the tables file does not describe its file.
        """
        if db_id not in self.known and db_id not in self.unusable:
            found = self._look_up(db_id)
            if isinstance(found, str):
                self.unusable[db_id] = found
            else:
                self.known[db_id] = found
        return self.unusable.get(db_id, "")

    def _look_up(self, db_id: str) -> Database | str:
        if self.schemas is not None and db_id not in self.schemas:
            return f"database {db_id!r} is not in {self.tables_file}"
        path = self.folder.find(db_id)
        if path is None:
            return self.folder.missing(db_id)
        if path.stat().st_size == 0:
            return f"no database file {path}: it is empty"
        try:
            own = schema_from_sqlite(path, db_id, has_virtual=self.schemas is not None)
        except ValueError as error:
            return f"no database file: {error}"
        if not own.tables:
            return f"{path} has no tables{unread_changes(path)}"
        if self.schemas is None:
            return Database(own, path)
        schema = self.schemas[db_id]
        if not schema.tables:
            return f"database {db_id!r} has no tables in {self.tables_file}"
        difference = first_difference(schema, own)
        if difference:
            entry = list(self.schemas).index(db_id)
            raise ValueError(
                f"{self.tables_file}: entry {entry} ({db_id}): the database has no {difference} in "
                f"{path}{unread_changes(path)}; python -m mtsql.schema writes a file that fits"
            )
        return Database(schema, path)


def _build_turns(dialogue_id: str, db_id: str, questions: tuple[Question, ...]) -> tuple[Turn, ...]:
    pairs = [(question.text, question.sql) for question in questions]
    return tuple(
        Turn(
            f"{dialogue_id}:{index}",
            index,
            db_id,
            question.text,
            question.sql,
            tuple(pairs[:index]),
            question.evidence,
        )
        for index, question in enumerate(questions)
    )


def split_by_database(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out whole databases -> (rest, held out), to select models on databases never trained on.

    The held-out part has at most `fraction` of the dialogues, unless no database is that small; at
    least one database stays on either side. `skipped` stays with the rest. The paper selects on its
    test file instead; about 5 % of the training dialogues is our choice.
    """
    db_ids = sorted(corpus.databases)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, found {fraction}")
    if len(db_ids) < 2:
        raise ValueError(f"only {len(db_ids)} database in the corpus: nothing to hold out")
    sizes = {
        db_id: sum(dialogue.db_id == db_id for dialogue in corpus.dialogues) for db_id in db_ids
    }
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
        {db_id: database for db_id, database in corpus.databases.items() if db_id in db_ids},
        skipped,
        corpus.left_out,
    )
