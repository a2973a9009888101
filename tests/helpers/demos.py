"""A database of singers and songs, turns on it, and what demonstrations of them must keep to."""

import random
import re
from functools import lru_cache
from pathlib import Path

from helpers.databases import make_database
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Reply, Verdict, format_reply
from mtsql.demos.scene import Scene
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import run_query
from mtsql.sql.schema import Database, schema_from_sqlite

MUSIC = """
    CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
    CREATE TABLE song (
        id INTEGER PRIMARY KEY, singer_id INTEGER REFERENCES singer(id), name TEXT,
        song_length REAL, genre TEXT
    );
    INSERT INTO singer VALUES
        (1, 'Ann', 'United States', 41), (2, 'Bob', 'France', 25), (3, 'Cleo', 'France', 35),
        (4, 'Dan', 'Netherlands', 52);
    INSERT INTO song VALUES
        (11, 1, 'Sun', 3.5, 'Rock'), (12, 1, 'Moon', 4.0, 'Jazz'), (13, 3, 'Sea', 2.5, 'Rock'),
        (14, 4, 'Sun', 3.0, 'Folk');
"""
JOINED = "FROM singer AS T1 JOIN song AS T2 ON T1.id = T2.singer_id"
FRENCH = ("who is from France ?", "SELECT name FROM singer WHERE country = 'France'")


@lru_cache(maxsize=1)
def music(folder: Path) -> Database:
    """The database, which is written to the folder."""
    path = make_database(folder / "music.sqlite", MUSIC)
    return Database(schema_from_sqlite(path), path)


def make_scene(
    database: Database,
    gold: str,
    question: str = "what is asked ?",
    history: tuple[tuple[str, str], ...] = (),
    seed: int = 0,
    **config: object,
) -> Scene:
    """A turn on a database, as demonstrations are made from it."""
    turn = Turn(f"train:0:{len(history)}", len(history), "music", question, gold, history)
    rng = random.Random(f"{seed}/{turn.turn_id}")
    return Scene(turn, database, database.schema, EnvConfig(**config), rng)


def play_demo(
    turn: Turn,
    database: Database,
    replies: list[Reply],
    style: PromptStyle,
    config: EnvConfig | None = None,
) -> tuple[SqlEnv, list[str]]:
    """Play a demonstration to its answer. -> the environment, and what it showed after each
    call."""
    env = SqlEnv(turn, database, config or EnvConfig(), style)
    env.reset()
    shown = [env.step(format_reply(reply)) for reply in replies]
    assert shown.pop() is env.outcome is Outcome.ANSWERED
    assert len(env.records) == len(replies)
    return env, shown


def require_full_reward(env: SqlEnv, config: RewardConfig) -> None:
    """The answer and the last proposal are right, and each verdict is the honest one: the one that
    the reward's table pays most for an execution, and for the memory whether the query is gold."""
    found = reward_components(Trajectory(env.turn, 0, [], env), config)
    has_calls = any(record.sql for record in env.records)
    assert found["ex"] == found["em"] == 1 and (found["propose"] == 1 or not has_calls)
    for before, after in zip(env.records, env.records[1:], strict=False):
        action = before.reply.action
        if action.name == "exec_sql":
            is_good = before.is_ok and not before.is_empty
            verdict = after.reply.exec_verdict
            assert after.reply.memory_verdict is None
        else:
            is_good = before.sql == env.turn.sql
            verdict = after.reply.memory_verdict
            assert after.reply.exec_verdict is None
        assert verdict is (Verdict.PASS if is_good else Verdict.NO_PASS)


_ROWS = re.compile(r"\b(?:(\d+) rows|(one) row)\b")
_QUOTED = re.compile(r"(?:writes|is) '([^']*)'|^'([^']*)' is the value")
_OF_LAST = re.compile(
    r"The last query had (.*?)\. This question|^(.*?) (?:of the last question still holds|"
    r"was a condition of the last|comes from the last|is kept from the last)|"
    r"keep (?!that|it\.)(.*)\.$|keeps (.*?), as it|about (.*?), as (?:the one before|the last one)|"
    r"from \w+(?: and \w+)*\. (.*?) holds as before"
)


def require_true_thoughts(env: SqlEnv, shown: list[str]) -> int:
    """Whatever a thought says of a result, an error or the last query can be seen there. -> how
    many such claims there were."""
    num_claims = 0
    sqls = [sql for _, sql in env.turn.history]
    last = _plain(sqls[-1]) if sqls else ""
    for place, record in enumerate(env.records):
        think = record.reply.think
        before = env.records[place - 1] if place else None
        seen = shown[place - 1] if place else ""
        for many, one in _ROWS.findall(think):
            rows = run_query(env.database.path, before.sql).rows
            assert len(rows) == (1 if one else int(many)), think
            num_claims += 1
        if "no rows" in think:
            assert before.is_ok and "no rows" in seen, (think, seen)
            num_claims += 1
        if "only NULL" in think:
            assert before.is_empty and "no rows" not in seen, (think, seen)
            num_claims += 1
        for first, second in _QUOTED.findall(think):
            value = first or second
            told = env.turn.question if "question" in think else seen
            assert value in told, (think, told)
            num_claims += 1
        is_about_columns = re.search(r"no column|There is no|is a column|is not there|needs", think)
        if place and is_about_columns:
            assert "no such column" in seen or "ambiguous column name" in seen, (think, seen)
            num_claims += 1
        if "WHERE" in think and "HAVING" in think:
            assert "misuse of aggregate" in seen, (think, seen)
            num_claims += 1
        for groups in _OF_LAST.findall(think):
            said = next(filter(None, groups))
            assert _plain(said) in last, (think, last)
            num_claims += 1
    return num_claims


def _plain(sql: str) -> str:
    """SQL without qualifiers, case and spaces, and with quotes of one kind."""
    return re.sub(r"\s+", "", re.sub(r"\b\w+\.(?=\w)", "", sql).replace('"', "'")).lower()
