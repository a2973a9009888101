"""The state of a conversation: its questions, the SQL that answers them, and every earlier state.

It needs no model and no screen. The history that the model sees is the agent's own SQL, or the SQL
that the user has put in its place, as in eval.py with `history: predicted`.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from mtsql.agent.env import EnvConfig
from mtsql.agent.memory import MemoryEntry, recall
from mtsql.chat.steps import Step, describe
from mtsql.judge.official_files import prediction_line
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, run_query
from mtsql.sql.schema import Database


@dataclass(frozen=True)
class ChatTurn:
    """A question and what became of it.

    sql: the answer as one line; empty if there is none. is_edited: whether the user wrote it.
    ending: how the episode ended, in words. result: of the answer; None without one. num_sampled:
    tokens that the model sampled. secs: seconds from the question to the end of the episode.
    """

    question: str
    sql: str
    ending: str
    result: QueryResult | None
    steps: tuple[Step, ...] = ()
    is_edited: bool = False
    num_sampled: int = 0
    secs: float = 0.0

    @property
    def has_rows(self) -> bool:
        """Whether the answer is a query that runs."""
        return self.result is not None and self.result.is_ok


Dialogues = tuple[tuple[ChatTurn, ...], ...]
"""All dialogues of a conversation, the current one last."""


class Conversation:
    """Dialogues over one database. Every change can be taken back with `undo`."""

    def __init__(self, database: Database, env: EnvConfig, evidence: str = "") -> None:
        """`evidence` is shown with each question, as that of BIRD is."""
        self.database = database
        self.env = env
        self.evidence = evidence
        self.dialogues: Dialogues = ((),)
        self.version = 0
        """The number of changes so far; undoing is one."""
        self._before: list[Dialogues] = []

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """The turns of the current dialogue."""
        return self.dialogues[-1]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been asked."""
        return not any(self.dialogues)

    def next_turn(self, question: str) -> Turn:
        """A question as the environment takes it, after those of the current dialogue."""
        return Turn(
            turn_id=f"chat:{len(self.dialogues) - 1}:{len(self.turns)}",
            index=len(self.turns),
            db_id=self.database.schema.db_id,
            question=question,
            sql="",  # nobody knows the gold SQL
            history=tuple((turn.question, turn.sql) for turn in self.turns),
            evidence=self.evidence,
        )

    def answered(
        self,
        question: str,
        sql: str | None,
        ending: str,
        steps: tuple[Step, ...],
        num_sampled: int,
        secs: float,
    ) -> ChatTurn:
        """Add a question that was played, and run its answer."""
        line = "" if sql is None else prediction_line(sql)
        result = self.run(line) if line else None
        turn = ChatTurn(question, line, ending, result, steps, False, num_sampled, secs)
        self._change((*self.dialogues[:-1], (*self.turns, turn)))
        return turn

    def run(self, sql: str) -> QueryResult:
        """Run a query, within the limits of the environment. Nothing is ever written."""
        return run_query(self.database.path, sql, self.env.query)

    def edit(self, number: int, sql: str) -> ChatTurn:
        """Put the user's SQL in place of an answer; later questions see it as their history.

        `number` counts the turns of the current dialogue from 1. ValueError if there is no such
        turn, or if the SQL does not run; then nothing has changed.
        """
        before = self.turn(number)
        line = prediction_line(sql)
        if not line:
            raise ValueError("the SQL is empty")
        result = self.run(line)
        if not result.is_ok:
            raise ValueError(
                f"this SQL does not run, so the answer stays as it was: {describe(result)}"
            )
        turn = replace(before, sql=line, result=result, is_edited=True)
        place = number - 1
        turns = (*self.turns[:place], turn, *self.turns[place + 1 :])
        self._change((*self.dialogues[:-1], turns))
        return turn

    def turn(self, number: int | None = None) -> ChatTurn:
        """The turn with this number, counted from 1, or the last one. ValueError if there is none
        in the current dialogue."""
        if not self.turns:
            raise ValueError("nothing has been asked in this dialogue")
        if number is None:
            return self.turns[-1]
        if not 1 <= number <= len(self.turns):
            raise ValueError(f"there is no question {number}: this dialogue has {len(self.turns)}")
        return self.turns[number - 1]

    def begin(self) -> None:
        """Begin another dialogue, without history. ValueError if the current one is empty."""
        if not self.turns:
            raise ValueError("this dialogue is still empty")
        self._change((*self.dialogues, ()))

    def undo(self) -> None:
        """Take the last question, edit or new dialogue back. ValueError if there is none."""
        if not self._before:
            raise ValueError("there is nothing to undo")
        self.dialogues = self._before.pop()
        self.version += 1

    def memory(self) -> list[MemoryEntry]:
        """What memory_retrieve knows when the next question is asked: all turns with their SQL,
        its clauses and its result."""
        return recall(self.next_turn(""), self.database, self.env.query, with_results=True)

    def as_sparc(self) -> list[dict[str, Any]]:
        """All dialogues in the format of SParC, which `load_corpus` reads. `edited` says whether
        the user wrote the SQL. ValueError if nothing has been asked."""
        if self.is_empty:
            raise ValueError("nothing has been asked, so there is no dialogue to export")
        entries = []
        for dialogue in filter(None, self.dialogues):
            turns = [
                {"utterance": turn.question, "query": turn.sql, "edited": turn.is_edited}
                for turn in dialogue
            ]
            entries.append({"database_id": self.database.schema.db_id, "interaction": turns})
        return entries

    def sparc_text(self) -> str:
        """The same as the text of a JSON file."""
        return json.dumps(self.as_sparc(), indent=1, ensure_ascii=False) + "\n"

    def num_without_sql(self) -> int:
        """Questions without SQL. A training leaves these out, with all later ones of their
        dialogue."""
        return sum(not turn.sql for dialogue in self.dialogues for turn in dialogue)

    def _change(self, dialogues: Dialogues) -> None:
        self._before.append(self.dialogues)
        self.dialogues = dialogues
        self.version += 1
