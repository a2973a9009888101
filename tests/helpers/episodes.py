"""Episodes without a model: a small database, and replies as data that are played on it."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict, format_reply
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Database, schema_from_sqlite

if TYPE_CHECKING:
    from mtsql.rl.trajectory import Trajectory

EXEC, MEMORY = ("exec_sql",), ("memory_retrieve",)
BOTH = EXEC + MEMORY
GOLD = "SELECT name FROM singer WHERE age > 30 AND country = 'USA'"
HISTORY = (("who is there ?", "SELECT name FROM singer"),)


def singers(path: Path) -> Database:
    """A database with two singers: Ann, 41, from the USA, and Bob, 25, from Peru."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (name TEXT, country TEXT, age INTEGER);"
            "INSERT INTO singer VALUES ('Ann', 'USA', 41), ('Bob', 'Peru', 25);"
        )
    return Database(schema_from_sqlite(path), path)


def call(
    sql: str,
    tool: str = "exec_sql",
    *,
    ran: Verdict | None = None,
    fits: Verdict | None = None,
    think: str = "",
) -> Reply:
    """A call with a query. `ran` and `fits` are verdicts on what earlier calls returned."""
    return Reply(ToolCall(tool, {"code": sql}), think, ran, fits)


def answer(
    sql: str = GOLD, *, ran: Verdict | None = None, fits: Verdict | None = None, think: str = ""
) -> Reply:
    """An answer, with verdicts on what earlier calls returned."""
    return Reply(Answer(sql), think, ran, fits)


def make_env(
    database: Database,
    *,
    gold: str = GOLD,
    history: tuple[tuple[str, str], ...] = (),
    style: PromptStyle = "brief",
    **config: object,
) -> SqlEnv:
    """An environment with one question, whose gold SQL is `gold`."""
    turn = Turn("dev:0:0", len(history), "shows", "who is old ?", gold, history)
    return SqlEnv(turn, database, EnvConfig(**config), style)


def play(env: SqlEnv, replies: list[Reply | str]) -> "Trajectory":
    """Play replies until they or the episode end. The trajectory has no tokens."""
    from mtsql.rl.trajectory import Trajectory  # it imports torch, which some tests do without

    for reply in replies:
        env.step(reply if isinstance(reply, str) else format_reply(reply))
    return Trajectory(env.turn, 0, [], env)
