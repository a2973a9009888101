"""The conversation in a terminal or a pipe: a line is a question or, after a `/`, a command."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from difflib import get_close_matches
from pathlib import Path

from mtsql.agent.memory import MemoryEntry
from mtsql.chat.screen import Screen
from mtsql.chat.session import Session
from mtsql.chat.steps import counted
from mtsql.files import WriteError
from mtsql.run.signals import Terminated
from mtsql.sql.names import fold, quoted
from mtsql.sql.schema import schema_text

COMMANDS = {
    "schema": ("[TABLE]", "the tables, or the first rows of one"),
    "memory": ("", "earlier questions with their SQL and result, as the model recalls them"),
    "steps": ("[N]", "all steps of the last question, or of question N, unfolded"),
    "fold": ("", "fold the details of steps away, or show them again"),
    "edit": ("[N] [SQL]", "put your SQL in place of an answer; later questions build on it"),
    "undo": ("", "take the last question, edit or new dialogue back"),
    "new": ("", "begin another dialogue, without history"),
    "export": ("FILE", "write all dialogues as SParC JSON, which training reads"),
    "csv": ("FILE", "write the result of the last answer as CSV"),
    "help": ("", "this list"),
    "quit": ("", "end, as Ctrl-D does"),
}
PROMPT = "? "
EDIT_PROMPT = "SQL: "


class End(Exception):
    """The user wants to end the conversation."""


def talk(session: Session, screen: Screen, examples: list[str]) -> None:
    """Converse until the end of the input, or /quit."""
    reader = Reader(screen)
    welcome(session, screen, examples)
    while True:
        try:
            line = reader.read(PROMPT)
            if line is None:
                return
            handle(line.strip(), session, screen, reader)
        except End:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not reader.is_terminal:
                raise
            screen.print("stopped; Ctrl-D ends the conversation", "dim")


def welcome(session: Session, screen: Screen, examples: list[str]) -> None:
    """What the conversation is about, and how to begin."""
    database = session.conversation.database
    tables = database.schema.tables
    screen.print(f"{database.path}: {counted(len(tables), 'table')}")
    screen.print(f"model: {session.agent.config.model}")
    if examples:
        screen.print("The model knows only questions like these:")
        screen.lines(f"  {question}" for question in examples)
    screen.print("Ask a question. /help lists the commands, Ctrl-D ends.", "dim")


def handle(line: str, session: Session, screen: Screen, reader: "Reader") -> None:
    """Answer a question, or run a command. The user's mistakes are printed."""
    if not line:
        return
    try:
        if line.startswith("/"):
            run_command(line[1:], session, screen, reader)
        else:
            with screen.live(), closing(session.ask(line)) as events:
                for event in events:
                    screen.show(event)
    except WriteError as error:
        if "standard output" in str(error):
            raise
        screen.print(f"error: {error}", "red")
    except ValueError as error:
        screen.print(f"error: {error}", "red")


def run_command(text: str, session: Session, screen: Screen, reader: "Reader") -> None:
    """Run one of `COMMANDS`. ValueError for a wrong one."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    takes, _ = COMMANDS.get(name, ("", ""))
    if name in COMMANDS and rest and not takes:
        raise ValueError(f"/{name} takes nothing after it")
    if takes == "FILE" and not rest:
        raise ValueError(f"/{name} needs the name of a new file")
    conversation = session.conversation
    match name:
        case "schema":
            show_schema(rest, session, screen)
        case "memory":
            show_memory(conversation.memory(), screen)
        case "steps":
            show_steps(number_in(rest), session, screen)
        case "fold":
            screen.is_folded = not screen.is_folded
            screen.print("steps are folded" if screen.is_folded else "steps are shown whole")
        case "edit":
            edit(rest, session, screen, reader)
        case "undo":
            conversation.undo()
            screen.print(f"undone; {counted(len(conversation.turns), 'question')} in this dialogue")
        case "new":
            conversation.begin()
            screen.print("a new dialogue; /export writes the earlier ones, too")
        case "export":
            screen.print(session.export(Path(rest)))
        case "csv":
            screen.print(session.export_csv(Path(rest)))
        case "help":
            show_help(screen)
        case "quit" | "exit":
            raise End
        case _:
            close = get_close_matches(name, COMMANDS, 1)
            hint = f" (did you mean /{close[0]}?)" if close else ""
            raise ValueError(f"unknown command /{name}{hint}; /help lists all")


def show_help(screen: Screen) -> None:
    """All commands, one a line."""
    screen.print("A line is a question. Commands:")
    for name, (takes, summary) in COMMANDS.items():
        screen.print(f"  {f'/{name} {takes}':<17} {summary}")
    screen.print("Ctrl-C stops an answer, and keeps the conversation.")


def show_schema(table: str, session: Session, screen: Screen) -> None:
    """All tables as the model reads them, or the first rows of one."""
    conversation = session.conversation
    schema = conversation.database.schema
    if not table:
        screen.lines(schema_text(schema).splitlines())
        if conversation.evidence:
            screen.print(f"values: {conversation.evidence}")
        return
    names = [one.name for one in schema.tables if fold(one.name) == fold(table)]
    if not names:
        raise ValueError(f"there is no table {table}; /schema lists them")
    screen.table(conversation.run(f"SELECT * FROM {quoted(names[0])} LIMIT {screen.max_rows}"))


def show_memory(entries: list[MemoryEntry], screen: Screen) -> None:
    """What the model can recall."""
    if not entries:
        screen.print("there are no earlier questions in this dialogue")
    for number, entry in enumerate(entries, 1):
        screen.print(f"{number}. {entry.question}")
        screen.print(f"   SQL: {entry.sql or '(none)'}")
        if entry.sql:
            screen.print(f"   clauses: {'; '.join(entry.clauses)}")
            rows = "does not run" if entry.result is None else counted(len(entry.result), "row")
            screen.print(f"   result: {rows}")


def show_steps(number: int | None, session: Session, screen: Screen) -> None:
    """The steps of a question, unfolded."""
    turn = session.conversation.turn(number)
    screen.question(turn.question)
    with screen.unfolded():
        for step in turn.steps:
            screen.step(step)
    screen.answer(turn)


def edit(rest: str, session: Session, screen: Screen, reader: "Reader") -> None:
    """Put SQL in place of an answer: the SQL after the command, or a line that is edited."""
    conversation = session.conversation
    first, _, others = rest.partition(" ")
    number = len(conversation.turns)
    if first.isdecimal():
        number, rest = int(first), others.strip()
    before = conversation.turn(number if conversation.turns else None)
    if not rest:
        rest = (reader.read(EDIT_PROMPT, before.sql) or "").strip()
    if not rest:
        raise ValueError("the SQL is empty, so the answer stays as it was")
    screen.answer(conversation.edit(number, rest))


def number_in(text: str) -> int | None:
    """The number of a question; None for an empty text."""
    if text and not text.isdecimal():
        raise ValueError(f"expected the number of a question, found {text}")
    return int(text) if text else None


class Reader:
    """Reads lines: with editing and a history of lines on a terminal, else from a pipe."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.is_terminal = sys.stdin.isatty()
        self._readline = None
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if self.is_terminal and screen.is_live:
            try:
                import readline
            except ImportError:  # some builds of Python have none
                return
            self._readline = readline

    def read(self, prompt: str, filled: str = "") -> str | None:
        """The next line, on a terminal with `filled` to begin with. None at the end of the
        input."""
        try:
            if not self.is_terminal:
                return self._piped(prompt)
            with self._filled(filled):
                return input(prompt)
        except EOFError:
            self.screen.print()
            return None
        except KeyboardInterrupt:
            if self.is_terminal:  # what follows does not stand behind the line that was typed
                self.screen.print()
            raise

    def _piped(self, prompt: str) -> str | None:
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            self.screen.print(f"{prompt}{line.strip()}")
        return line

    @contextmanager
    def _filled(self, text: str) -> Iterator[None]:
        if self._readline is None or not text:
            yield
            return
        self._readline.set_startup_hook(lambda: self._readline.insert_text(text))
        try:
            yield
        finally:
            self._readline.set_startup_hook(None)
