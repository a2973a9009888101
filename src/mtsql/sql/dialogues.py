"""Dialogues and their turns, each with the schema and the file of its database."""

from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Literal

from mtsql.sql.database_files import DatabaseFolder, unread_changes
from mtsql.sql.questions import Conversation, Question, read_conversations
from mtsql.sql.schema import Database, Schema, first_difference, load_schemas, schema_from_sqlite

ExRule = Literal["official", "set"]
"""How EX compares results (judge/execution_match.py). official: as the evaluator of Spider, SParC
and CoSQL. set: as that of BIRD."""


@dataclass(frozen=True)
class Turn:
    """One user question. Indices count from 0 in the file, skipped turns included.

    turn_id: "train:12:3" is turn 3 of dialogue 12 in train.json, "train:12:goal:0" is its goal.
    history: (question, gold SQL) of all earlier turns of the dialogue, the oldest first.
    evidence: an explanation that BIRD gives with a question, shown with it; often empty.
    difficulty: BIRD's own level (simple, moderate, challenging); empty elsewhere.
    """

    turn_id: str
    index: int
    db_id: str
    question: str
    sql: str
    history: tuple[tuple[str, str], ...] = ()
    evidence: str = ""
    difficulty: str = ""
    ex: ExRule = "official"


@dataclass(frozen=True)
class Dialogue:
    """One interaction of a file. dialogue_id: "train:12" is dialogue 12 in train.json, and
    "train:12:goal" is its goal, which is a dialogue of one turn."""

    dialogue_id: str
    db_id: str
    turns: tuple[Turn, ...]

    @property
    def is_goal(self) -> bool:
        """Whether it is the goal of another one."""
        return self.dialogue_id.endswith(":goal")


@dataclass(frozen=True)
class Skip:
    """Turns of a file that no run can use: `num_turns` turns of the dialogue `index`, and why."""

    file: str
    index: int
    reason: str
    num_turns: int


@dataclass(frozen=True)
class Corpus:
    """Dialogues, and the databases that they use by their ids.

    skipped: the turns of the file that no run can use. left_out: turn id -> reason, for the turns
    that the user left out.
    """

    dialogues: list[Dialogue]
    databases: dict[str, Database]
    skipped: list[Skip] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def turns(self) -> list[Turn]:
        """The turns of all dialogues, in their order."""
        return [turn for dialogue in self.dialogues for turn in dialogue.turns]

    def sample_dialogues(self, max_dialogues: int) -> list[Dialogue]:
        """At most `max_dialogues` of them (0 = all), in their order. They are spread over the
        databases, because a data set lists the dialogues about a database one after another: the
        first dialogue about each database is chosen, then the second one about each, and so on.
        ValueError for a negative number."""
        return [self.dialogues[place] for place in sorted(self._spread(max_dialogues))]

    def sample_turns(self, max_turns: int) -> list[Turn]:
        """At most `max_turns` turns (0 = all), in their order. Dialogues are chosen as by
        `sample_dialogues` until they have enough turns; the one that is chosen last may lose its
        last turns. So the turns are about as many databases as dialogues fit: 16 turns in
        dialogues of four are about four. ValueError for a negative number."""
        chosen = [
            (place, turn)
            for place in self._spread(max_turns)
            for turn in self.dialogues[place].turns
        ]
        return [turn for _, turn in sorted(chosen[: max_turns or None], key=itemgetter(0))]

    def _spread(self, most: int) -> list[int]:
        """The places of at most `most` dialogues (0 = all), in the order in which they are
        chosen."""
        if most < 0:
            raise ValueError(f"a sample of {most}: the number must not be negative (0 = all)")
        num_before: Counter[str] = Counter()
        found = []
        for place, dialogue in enumerate(self.dialogues):
            found.append((num_before[dialogue.db_id], place))
            num_before[dialogue.db_id] += 1
        return [place for _, place in sorted(found)][: most or None]

    @property
    def ex(self) -> ExRule:
        """How EX compares the results of its turns."""
        return next((dialogue.turns[0].ex for dialogue in self.dialogues), "official")


def load_corpus(
    dialogues_file: Path | str,
    tables_file: Path | str | None,
    database_dir: Path | str,
    *,
    has_goals: bool = False,
    ex: ExRule | Literal["auto"] = "auto",
) -> Corpus:
    """Read the dialogues of a file, in any of the formats of questions.py, with their databases.

    A single question is a dialogue of one turn. CoSQL joins the user's and the system's
    clarifications to the question by ` | `; that text stays. tables_file: the official tables.json;
    None: schemas are read from the database files. has_goals: the goal of each interaction
    (`final`) is one more dialogue, of one turn; they follow the others. ex: how EX compares
    results; auto: set if all entries have the keys of BIRD, else official.

    These are left out and listed in `skipped`:

    - a dialogue whose database is not in the tables file, has no file (database_files.py says where
      it is looked for), or has a file that SQLite cannot read, and its goal;
    - a dialogue without turns;
    - a turn without SQL and all later turns of its dialogue, because their questions refer to a
      turn ("which of these ...") whose SQL is not known;
    - a goal without SQL.

    A ValueError names the file or folder that is missing or malformed (with the entry and the key),
    the first difference between a database in use and the tables file, or the file that has no
    usable turn or, if they are asked for, no goal.
    """
    dialogues_file = Path(dialogues_file)
    schemas = None if tables_file is None else load_schemas(tables_file)
    conversations = read_conversations(dialogues_file, has_goals)
    if has_goals and not any(conversation.goal for conversation in conversations):
        raise ValueError(
            f"{dialogues_file}: no goal: data.goals and data.held_out_goals need entries with "
            "`final`, which holds the goal's utterance and query"
        )
    rule = _rule(conversations) if ex == "auto" else ex
    databases = Databases(DatabaseFolder(database_dir), schemas, tables_file)
    dialogues: list[Dialogue] = []
    goals: list[Dialogue] = []
    skipped: list[Skip] = []
    for index, conversation in enumerate(conversations):
        dialogue_id = f"{dialogues_file.stem}:{index}"
        usable, reason = _usable_questions(conversation, databases)
        if reason:
            num_skipped = len(conversation.questions) - len(usable)
            skipped.append(Skip(str(dialogues_file), index, reason, num_skipped))
        if usable:
            turns = _build_turns(dialogue_id, conversation.db_id, usable, rule)
            dialogues.append(Dialogue(dialogue_id, conversation.db_id, turns))
        if conversation.goal:
            goal = (conversation.goal,) if conversation.goal.sql else ()
            reason = databases.open(conversation.db_id) or ("" if goal else "the goal has no SQL")
            if reason:
                skipped.append(Skip(str(dialogues_file), index, reason, 1))
                continue
            turns = _build_turns(f"{dialogue_id}:goal", conversation.db_id, goal, rule)
            goals.append(Dialogue(f"{dialogue_id}:goal", conversation.db_id, turns))
    dialogues += goals
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
        self.folder = folder
        self.schemas = schemas
        self.tables_file = tables_file
        self.known: dict[str, Database] = {}
        self.unusable: dict[str, str] = {}

    def open(self, db_id: str) -> str:
        """Find a database and its schema. -> why it cannot be used, or an empty text.

        ValueError if it has several files, or if its file differs from the tables file.
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
                f"{path}{unread_changes(path)}; mtsql schema writes a file that fits"
            )
        return Database(schema, path)


def _usable_questions(
    conversation: Conversation, databases: Databases
) -> tuple[tuple[Question, ...], str]:
    """-> (the questions before the first one without SQL, why the others are left out or "")."""
    reason = databases.open(conversation.db_id)
    if reason:
        return (), reason
    questions = conversation.questions
    if not questions:
        return (), "no turns"
    for index, question in enumerate(questions):
        if not question.sql:
            reason = f"turn {index} has no SQL: it and all later turns are left out"
            return questions[:index], reason
    return questions, ""


def _rule(conversations: list[Conversation]) -> ExRule:
    """The rule of the data set that the entries seem to come from."""
    are_bird = [question.is_bird for one in conversations for question in one.questions]
    return "set" if are_bird and all(are_bird) else "official"


def _build_turns(
    dialogue_id: str, db_id: str, questions: tuple[Question, ...], rule: ExRule
) -> tuple[Turn, ...]:
    turns = []
    history: tuple[tuple[str, str], ...] = ()
    for index, question in enumerate(questions):
        turn = Turn(
            turn_id=f"{dialogue_id}:{index}",
            index=index,
            db_id=db_id,
            question=question.text,
            sql=question.sql,
            history=history,
            evidence=question.evidence,
            difficulty=question.difficulty,
            ex=rule,
        )
        turns.append(turn)
        history += ((question.text, question.sql),)
    return tuple(turns)
