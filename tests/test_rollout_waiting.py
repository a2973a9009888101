"""A rollout waits for no row, and its results do not depend on how fast SQL is."""

import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers import episodes
from helpers.databases import make_database
from helpers.scripted_engine import ScriptedEngine
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Verdict, format_reply
from mtsql.engine.completions import StopReason
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.model.decoder import from_transformers
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.rollout import SQL_STEPS, rollout
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig, QueryStatus, clear_result_cache
from mtsql.sql.schema import Database, schema_from_sqlite
from mtsql.sql.worker_pool import set_num_workers

GOLD = "SELECT name FROM singer WHERE age > 26"
RUNAWAY = (
    "SELECT count(*) FROM singer a, singer b, singer c, singer d, singer e "
    "WHERE a.age + b.age < c.age - {}"
)


@pytest.fixture(scope="module")
def db_path(tmp_path_factory):
    rows = ", ".join(f"('n{i}', {20 + i % 30})" for i in range(60))
    script = f"CREATE TABLE singer (name TEXT, age INTEGER); INSERT INTO singer VALUES {rows};"
    return make_database(tmp_path_factory.mktemp("db") / "toy.sqlite", script)


@pytest.fixture(scope="module")
def renderer():
    return Renderer(
        train_tokenizer(
            [GOLD, RUNAWAY, "which singers are older than 26 ? user assistant"] * 20, 420, TAGS
        )
    )


def turn(name="dev:0:0"):
    return Turn(name, 0, "toy", "which singers are older than 26 ?", GOLD)


def call(sql):
    return format_reply(episodes.call(sql))


def answer(sql=GOLD):
    return format_reply(episodes.answer(sql, ran=Verdict.PASS))


def play(
    engine, renderer, db_path, num_samples, env=SqlEnv, judge=lambda trajectory: trajectory, **query
):
    schema, limits = schema_from_sqlite(db_path), EnvConfig(query=QueryConfig(**query))
    return rollout(
        engine,
        renderer,
        [turn()],
        lambda t: env(t, Database(schema, db_path), limits, "brief"),
        num_samples=num_samples,
        seed=0,
        update=0,
        max_prompt_tokens=4000,
        judge=judge,
    )


def test_an_observation_joins_by_the_work_of_its_query(renderer, db_path):
    """The observation of a query of five million steps comes five engine steps later than that of a
    small query, whether its result is cached or not. Other rows decode meanwhile."""
    script = [
        [(3, call(GOLD)), (1, answer())],
        [(3, call(RUNAWAY.format(0))), (1, answer())],
        [(3, call(RUNAWAY.format(0))), (1, answer())],  # the same query at the same time
        [(4, call(RUNAWAY.format(0))), (1, answer())],  # and a little later
        [(40, call(GOLD)), (1, answer())],
    ]
    expected = [
        (3 + SQL_STEPS, 0),
        (3 + SQL_STEPS + 5, 1),
        (3 + SQL_STEPS + 5, 2),
        (4 + SQL_STEPS + 5, 3),
        (40, 4),
    ]
    clear_result_cache()
    for secs in (0.0, 0.03, 0.0):  # SQL slower than the steps, faster, and all of it kept
        engine = ScriptedEngine(renderer, script, step_secs=secs)
        trajectories = play(engine, renderer, db_path, 5, max_vm_steps=5_000_000)
        assert [(now, handle) for now, handle, _ in engine.extended] == expected
        statuses = [t.env.records[0].status for t in trajectories]
        assert statuses == [QueryStatus.OK, *[QueryStatus.TIMEOUT] * 3, QueryStatus.OK]
        assert all(t.outcome is Outcome.ANSWERED for t in trajectories)


def test_steps_are_counted_while_no_row_decodes(renderer, db_path):
    script = [[(1, call(RUNAWAY.format(1))), (1, call(GOLD)), (1, answer())]]
    engine = ScriptedEngine(renderer, script)
    [trajectory] = play(engine, renderer, db_path, 1, max_vm_steps=3_000_000)
    assert engine.now == 3
    assert len(trajectory.reply_spans) == 3
    assert trajectory.outcome is Outcome.ANSWERED


def test_a_finished_trajectory_is_judged_while_others_decode(renderer, db_path):
    judged = threading.Event()

    class Waiting(ScriptedEngine):
        def step(self):
            assert self.now < 10 or judged.wait(20), "nobody judged the first trajectory"
            return super().step()

    def judge(trajectory):
        parts = reward_components(trajectory, RewardConfig(process_after="any", proposals="all"))
        judged.set()
        return trajectory.sample, parts["ex"]

    engine = Waiting(renderer, [[(1, answer())], [(20, answer("SELECT name FROM singer"))]])
    assert play(engine, renderer, db_path, 2, judge=judge) == [(0, 1.0), (1, 0.0)]


@pytest.mark.parametrize("where", ["judge", "environment", "engine"])
def test_a_fault_is_raised_without_waiting_for_queries(renderer, db_path, where):
    """Meanwhile queries of other rows run that would take a minute."""

    class Faulty(SqlEnv):
        def step(self, text, meter=None):
            if where == "environment" and "older" in text:
                raise LookupError("a fault")
            return super().step(text, meter)

    class FaultyEngine(ScriptedEngine):
        def step(self):
            if where == "engine" and self.now == 6:
                raise LookupError("a fault")
            return super().step()

    def judge(trajectory):
        if where == "judge":
            raise LookupError("a fault")

    script = [
        [(1, call(RUNAWAY.format(100 + i))), (1, answer())] for i in range(6)
    ]  # more than there are workers
    script += [[(2, call("SELECT 'older'")), (1, answer())], [(2, answer())], [(99, answer())]]
    start = time.monotonic()
    with pytest.raises(LookupError):
        play(
            FaultyEngine(renderer, script, step_secs=0.01),
            renderer,
            db_path,
            9,
            Faulty,
            judge,
            max_vm_steps=10**12,
            timeout_secs=60.0,
        )
    assert time.monotonic() - start < 20
    assert (
        play(ScriptedEngine(renderer, [[(1, answer())]]), renderer, db_path, 1)[0].outcome
        is Outcome.ANSWERED
    )


class Scripted(SqlEnv):
    """Acts by a script instead of the text of a random model, and may be slow."""

    is_slow = False

    def step(self, text, meter=None):
        rng = random.Random(f"{self.turn.turn_id}/{text}/{len(self.records)}")
        sql = rng.choice(
            [
                GOLD,
                "SELECT age FROM singer LIMIT 3",
                RUNAWAY.format(rng.randrange(3)),
                "SELECT nothing",
            ]
        )
        if self.is_slow:
            time.sleep(random.random() * 0.08)
        done = super().step(answer(sql) if len(self.records) == 3 else call(sql), meter)
        if self.is_slow:
            time.sleep(random.random() * 0.05)
        return done


def test_a_machine_ten_times_slower_gives_the_same_episodes(renderer, db_path, monkeypatch):
    """Tokens, log-probs and rewards bit for bit. A slower machine is one with deadlines a tenth as
    long, slow environments, one SQL worker instead of several, and a busy loop beside each.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(renderer.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = from_transformers(Qwen3ForCausalLM(config)).eval()

    class Short(Engine):
        def _stop_reason(self, row):
            return StopReason.STOP_ID if len(row.logprobs) == 5 + row.handle % 7 else None

    def run(timeout_secs):
        with torch.inference_mode():
            engine = Short(
                model, renderer.stop_ids, SamplingConfig(), EngineConfig(16, 16, 8 << 20, 256)
            )
            return play(
                engine,
                renderer,
                db_path,
                24,
                Scripted,
                lambda t: (
                    t,
                    reward_components(t, RewardConfig(process_after="any", proposals="all")),
                ),
                max_vm_steps=2_000_000,
                timeout_secs=timeout_secs,
            )

    clear_result_cache()
    quick = run(30.0)
    clear_result_cache()
    monkeypatch.setattr(Scripted, "is_slow", True)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        set_num_workers(1)
        slow = run(3.0)
    finally:
        set_num_workers(0)
        for loop in loops:
            loop.kill()
            loop.wait()
    statuses = {step.status for t, _ in quick for step in t.env.records}
    assert {QueryStatus.OK, QueryStatus.ERROR, QueryStatus.TIMEOUT} <= statuses
    assert (
        len({len(t.ids) for t, _ in quick}) > 3
        and len({parts["propose"] for _, parts in quick}) > 3
    )
    for (one, parts), (other, other_parts) in zip(quick, slow, strict=True):
        assert one.ids == other.ids and one.logprobs == other.logprobs and parts == other_parts
