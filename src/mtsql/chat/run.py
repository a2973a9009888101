"""How `mtsql chat` runs: from its flags to a session, then to the screen that they ask for."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.chat.agent import Agent, AgentConfig
from mtsql.chat.conversation import Conversation
from mtsql.chat.screen import Screen
from mtsql.chat.session import Session, turn_as_data
from mtsql.chat.start import newest_embedded, open_database, toy_database
from mtsql.chat.terminal import talk
from mtsql.chat.values import sampled_values
from mtsql.chat.web import serve
from mtsql.engine.sampling import SamplingConfig
from mtsql.files import print_line
from mtsql.model_notes import notes_file, prompt_style, read_notes
from mtsql.run.config import parse_config
from mtsql.run.screen import wrapped
from mtsql.sql.database_files import unread_changes
from mtsql.sql.schema import Database

NO_ANSWER = 3
"""Exit code of --ask if a question has no answer that runs."""
NO_MODEL = (
    "no model in the folder runs was trained on the embedded world: name a model folder with "
    "--model, or run python train_rl.py, which trains the embedded model in ten to twenty minutes; "
    "its warm start is there earlier and can be talked to"
)
FOREIGN = (
    "has learned the embedded world only, and answers hardly anything on other databases: name "
    "another model with --model"
)


class ChatConfig(Protocol):
    """What the configuration of the command says."""

    @property
    def database(self) -> str | None: ...

    @property
    def model(self) -> str | None: ...

    @property
    def ask(self) -> tuple[str, ...]: ...

    @property
    def json(self) -> bool: ...

    @property
    def web(self) -> bool: ...

    @property
    def port(self) -> int: ...

    @property
    def values(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def env(self) -> EnvConfig: ...

    @property
    def style(self) -> PromptStyle | None: ...

    @property
    def max_prompt_tokens(self) -> int: ...

    @property
    def sampling(self) -> SamplingConfig: ...


@dataclass(frozen=True)
class Opening:
    """What a conversation is about. questions: examples that the model may know."""

    database: Database
    model: str
    questions: list[str]
    warnings: list[str]


def converse(config: ChatConfig, flags: Sequence[str]) -> int:
    """Run the command with these flags, of which `config` was made. Returns the exit code.

    ValueError, before the model is loaded, for a database or a model that cannot be used.
    """
    opening = open_both(config)
    notes = notes_file(opening.model)
    if notes is not None:  # the prompts, tools and budgets of the training are the defaults
        read_notes(notes)  # it names a fault better than the parser does
        config = parse_config(type(config), ["--config", str(notes), *flags], "")
    with open_session(config, opening) as session:
        screen = Screen(config.rows)
        if config.ask:
            return ask_all(session, screen, config)
        if config.web:
            serve(session, config.port, config.rows, opening.questions)
            return 0
        talk(session, screen, opening.questions)
        return 0


def open_both(config: ChatConfig) -> Opening:
    """The database and the model that the flags name or imply."""
    warnings: list[str] = []
    questions: list[str] = []
    embedded = newest_embedded() if config.model is None else None
    model = config.model
    if model is None:
        if embedded is None:
            raise ValueError(NO_MODEL)
        model = str(embedded.model)
    if config.database is not None:
        file = Path(config.database)
    elif embedded is None:
        raise ValueError("name the SQLite file to talk about: mtsql chat my.sqlite --model FOLDER")
    else:
        file, questions = toy_database(embedded)
    database = open_database(file)
    if config.database is not None and embedded is not None:
        warnings.append(f"{model} {FOREIGN}")
    unread = unread_changes(file)
    if unread:
        warnings.append(f"{file}{unread}")
    return Opening(database, model, questions, warnings)


@contextmanager
def open_session(config: ChatConfig, opening: Opening) -> Iterator[Session]:
    """Load the model. Lines about it go to the standard error, so that the output holds answers
    only."""
    database = opening.database
    how = AgentConfig(
        opening.model,
        config.env,
        prompt_style(config.style, opening.model),
        config.max_prompt_tokens,
        config.sampling,
        config.seed,
    )
    evidence = sampled_values(database, config.values, config.env.query)
    if sys.stderr.isatty():
        note(f"loading {opening.model}")
    with Agent(how, database) as agent:
        for text in (*opening.warnings, agent.warning()):
            if text:
                note(f"warning: {text}")
        yield Session(agent, Conversation(database, config.env, evidence))


def note(text: str) -> None:
    """Print a line to the standard error."""
    print(wrapped(text), file=sys.stderr, flush=True)


def ask_all(session: Session, screen: Screen, config: ChatConfig) -> int:
    """Ask the questions of --ask one after the other. Returns the exit code."""
    all_ran = True
    for question in config.ask:
        if config.json:
            for _ in session.ask(question):
                pass
            print_line(as_json(turn_as_data(session.conversation.turn())))
        else:
            screen.question(question)
            with screen.live():
                for event in session.ask(question):
                    screen.show(event)
        all_ran = all_ran and session.conversation.turn().has_rows
    return 0 if all_ran else NO_ANSWER


def as_json(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
