"""A conversation with an agent, without a screen: what terminal, web page and --json use."""

import csv
import io
import math
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtsql.chat.conversation import ChatTurn, Conversation
from mtsql.chat.events import Ended, Event, Played, Reading
from mtsql.chat.steps import ENDINGS, counted, describe
from mtsql.files import write_text
from mtsql.sql.sandbox import QueryResult

if TYPE_CHECKING:  # torch takes seconds to import, and the screens need none
    from mtsql.chat.agent import Agent

MAX_EXACT = 2**53
"""A larger integer is rounded by programs that read the numbers of JSON as floating point."""
SIDE_FILES = ("-wal", "-shm", "-journal")
"""Ends of the names of files that belong to an SQLite database."""
SURROGATE = re.compile("[\ud800-\udfff]")


class Session:
    """An agent and a conversation. One thread at a time may use it, except for `agent.stop`."""

    def __init__(self, agent: "Agent", conversation: Conversation) -> None:
        self.agent = agent
        self.conversation = conversation
        self._written: dict[Path, str] = {}  # the files of this conversation, with their kinds

    def ask(self, question: str) -> Generator[Event, None, None]:
        """Ask a question: what happens, as it happens, and at last `Ended`.

        If the caller leaves before that, the generation stops and the conversation is as it was.
        """
        question = SURROGATE.sub("\ufffd", question).strip()
        if not question:
            raise ValueError("the question is empty")
        with closing(self.agent.ask(self.conversation.next_turn(question))) as events:
            for event in events:
                if isinstance(event, Played):
                    yield Ended(self._keep(question, event))
                else:
                    yield event

    def _keep(self, question: str, played: Played) -> ChatTurn:
        ending = ENDINGS[played.outcome]
        if played.num_prompt > self.agent.config.max_prompt_tokens:
            most = self.agent.config.max_prompt_tokens
            ending = f"the prompt has {played.num_prompt} tokens, max_prompt_tokens is {most}"
            if self.conversation.turns:
                ending += "; a new dialogue has no history in it"
        return self.conversation.answered(
            question, played.sql, ending, played.steps, played.num_sampled, played.secs
        )

    def export(self, file: Path) -> str:
        """Write all dialogues in SParC's format. Returns what was written, in a line. ValueError as
        in `write` and `Conversation.as_sparc`."""
        conversation = self.conversation
        self.write(file, conversation.sparc_text(), "dialogues")
        num_turns = sum(map(len, conversation.dialogues))
        line = f"{file}: {counted(num_turns, 'question')}"
        without = conversation.num_without_sql()
        if without:
            line += (
                f", {without} without SQL: a training leaves those out, and the questions after "
                "them; /edit gives them SQL"
            )
        return line

    def export_csv(self, file: Path, number: int | None = None) -> str:
        """Write the result of an answer as CSV. Returns what was written, in a line. ValueError as
        in `write`, and if the answer has no result."""
        turn = self.conversation.turn(number)
        self.write(file, csv_text(rows_of(turn)), "a result")
        return f"{file}: {describe(rows_of(turn))}"

    def write(self, file: Path, text: str, kind: str) -> None:
        """Write a file. ValueError if it exists and this conversation has not written the same kind
        of text to it, or if SQLite would read it with the database, so that neither the database
        nor the user's work is lost."""
        place, is_there = _place_of(file)
        if is_there and self._written.get(place) != kind:
            holds = f" and holds {self._written[place]}" if place in self._written else ""
            raise ValueError(f"{file} exists{holds}: name a new file")
        database = self.conversation.database.path.resolve()
        if place in [database.with_name(database.name + end) for end in SIDE_FILES]:
            raise ValueError(f"{file}: SQLite would read it with the database: name another file")
        write_text(place, text)
        self._written[place] = kind


def _place_of(file: Path) -> tuple[Path, bool]:
    """-> (the file's whole path, whether there is something). ValueError that names the file if no
    file can have this name."""
    try:
        place = file.expanduser().resolve()
        return place, place.exists()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{file}: cannot be written: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # ~nobody, a link to itself, a zero byte
        raise ValueError(f"{file}: cannot be written: {error}") from error


def rows_of(turn: ChatTurn) -> QueryResult:
    """The result of an answer. ValueError if there is none."""
    if turn.result is None:
        raise ValueError(f"this question has no answer: {turn.ending}")
    if not turn.result.is_ok:
        raise ValueError(f"the SQL of this question does not run: {describe(turn.result)}")
    return turn.result


def csv_text(result: QueryResult) -> str:
    """A result as CSV with a header. NULL is an empty cell, a blob its hexadecimal digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(result.columns)
    for row in result.rows:
        writer.writerow("" if cell is None else plain_cell(cell) for cell in row)
    return out.getvalue()


def turn_as_data(turn: ChatTurn, max_rows: int | None = None) -> dict[str, Any]:
    """A turn as plain values for JSON, with at most `max_rows` rows of its result."""
    result = turn.result
    return {
        "question": turn.question,
        "sql": turn.sql or None,
        "is_edited": turn.is_edited,
        "ending": turn.ending,
        "status": None if result is None else result.status.value,
        "summary": None if result is None else describe(result),
        "columns": [] if result is None else list(result.columns),
        "rows": []
        if result is None
        else [list(map(plain_cell, r)) for r in result.rows[:max_rows]],
        "num_rows": 0 if result is None else len(result.rows),
        "steps": [asdict(step) for step in turn.steps],
        "num_sampled": turn.num_sampled,
        "secs": round(turn.secs, 3),
    }


def event_as_data(event: Event, max_rows: int | None = None) -> dict[str, Any]:
    """An event as plain values for JSON. `kind` is the name of its class in lower case."""
    kind = type(event).__name__.lower()
    if isinstance(event, Ended):
        return {"kind": kind, "turn": turn_as_data(event.turn, max_rows)}
    return {"kind": kind, **asdict(event)}


def plain_cell(cell: object) -> object:
    """A cell as JSON and CSV have it. Texts stand for a blob (hexadecimal digits), an infinity, and
    an integer that readers of JSON round."""
    if isinstance(cell, bytes):
        return f"X'{cell.hex().upper()}'"
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(cell)
    if isinstance(cell, int) and abs(cell) > MAX_EXACT:
        return str(cell)
    return cell


def progress(event: Reading) -> str:
    """How far the model has read, in words."""
    return f"reading {event.num_done:,} of {event.num_all:,} tokens"
