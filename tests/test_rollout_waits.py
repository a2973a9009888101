"""What a rollout waits for, and for how long: on a CPU for each observation in its turn, on a GPU
for none while a row decodes."""

import time
from itertools import pairwise

import pytest

from helpers import episodes
from helpers.databases import make_database
from helpers.scripted_engine import ScriptedEngine
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Verdict, format_reply
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.rollout import SQL_STEPS, rollout
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Database, schema_from_sqlite

FAST = "SELECT name FROM singer"
SLOW = "SELECT name FROM singer WHERE age > 26"
SLOW_SECS = 0.3


class Slow(SqlEnv):
    """Acts at once, but takes `SLOW_SECS` for the slow query."""

    def step(self, text, meter=None):
        if SLOW in text:
            time.sleep(SLOW_SECS)
        return super().step(text, meter)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    script = "CREATE TABLE singer (name TEXT, age INTEGER); INSERT INTO singer VALUES ('a', 27);"
    path = make_database(tmp_path_factory.mktemp("db") / "toy.sqlite", script)
    return Database(schema_from_sqlite(path), path)


@pytest.fixture(scope="module")
def renderer():
    texts = [FAST, SLOW, "which singers ? user assistant"] * 20
    return Renderer(train_tokenizer(texts, 420, TAGS))


def call(sql):
    return format_reply(episodes.call(sql))


def answer():
    return format_reply(episodes.answer(FAST, ran=Verdict.PASS))


def play(engine, renderer, database, judge=lambda trajectory: trajectory):
    """One group with a row for each line of the engine's script."""
    turn = Turn("dev:0:0", 0, "toy", "which singers ?", FAST)
    return rollout(
        engine,
        renderer,
        [turn],
        lambda turn: Slow(turn, database, EnvConfig(), "brief"),
        num_samples=len(engine.script),
        seed=0,
        update=0,
        max_prompt_tokens=4000,
        judge=judge,
    )


def longest_pause(engine):
    return max(after - before for before, after in pairwise(engine.times))


SCRIPT = [
    [(2, call(SLOW)), (1, answer())],
    *[[(2, call(FAST)), (2, call(FAST)), (9, answer())] for _ in range(10)],
    [(500, answer())],
]
"""One row of twelve runs a slow query in its first reply, and another one decodes all the time."""


def test_on_a_gpu_a_slow_query_stops_no_other_row(renderer, database):
    engine = ScriptedEngine(renderer, SCRIPT, step_secs=0.001, device="cuda")
    trajectories = play(engine, renderer, database)
    assert longest_pause(engine) < SLOW_SECS / 2
    assert engine.counts.sql_wait_secs < SLOW_SECS / 2
    assert all(t.outcome is Outcome.ANSWERED for t in trajectories)
    joined = {handle: now for now, handle, _ in reversed(engine.extended)}  # the first of each
    assert joined[0] > joined[1] >= 2 + SQL_STEPS


def test_on_a_cpu_every_row_waits_for_it_and_the_seconds_are_counted(renderer, database):
    engine = ScriptedEngine(renderer, SCRIPT, step_secs=0.0001)
    play(engine, renderer, database)
    assert longest_pause(engine) > 0.8 * SLOW_SECS
    assert engine.counts.sql_wait_secs > 0.8 * SLOW_SECS
    assert (2 + SQL_STEPS, 0) in [(now, handle) for now, handle, _ in engine.extended]


def test_on_a_gpu_a_rollout_in_which_no_row_decodes_waits_for_the_query(renderer, database):
    script = [[(1, call(SLOW)), (1, answer())] for _ in range(2)]
    engine = ScriptedEngine(renderer, script, device="cuda")
    start = time.thread_time()
    play(engine, renderer, database)
    assert engine.now <= 3  # the two observations need not be ready together
    assert engine.counts.sql_wait_secs > 0.8 * SLOW_SECS
    assert time.thread_time() - start < SLOW_SECS / 2  # it sleeps


def test_a_fault_of_an_environment_is_raised_on_a_gpu_too(renderer, database, monkeypatch):
    def fail(*_):
        raise LookupError("a fault")

    monkeypatch.setattr(Slow, "step", fail)
    with pytest.raises(LookupError):
        play(ScriptedEngine(renderer, SCRIPT, device="cuda"), renderer, database)


def test_tokens_and_what_they_attend_to_are_counted(renderer, database):
    script = [[(1, call(FAST)), (1, answer())], [(1, answer())]]
    engine = ScriptedEngine(renderer, script)
    trajectories = play(engine, renderer, database)
    assert engine.counts.sampled == sum(t.num_sampled for t in trajectories)
    num_prompt = len(trajectories[0].prompt_ids)
    positions = list(range(num_prompt))  # a token attends to those before it and to itself
    for trajectory in trajectories:
        positions += range(num_prompt, num_prompt + len(trajectory.ids) - 1)
    assert engine.counts.attended == sum(position + 1 for position in positions)


def test_the_judging_at_the_end_is_counted(renderer, database):
    def judge(trajectory):
        time.sleep(0.1)
        return trajectory

    engine = ScriptedEngine(renderer, [[(1, call(FAST)), (1, answer())]] * 3)
    play(engine, renderer, database, judge)
    assert engine.counts.judge_wait_secs > 0.15  # three trajectories, two judges
