"""Measure what SQL costs: small queries from one and many threads, rollouts with runaway queries.

    python benchmarks/sql.py                              # small queries
    python benchmarks/sql.py --rollouts_too true          # and rollouts, SmolLM2-135M's shape
    python benchmarks/sql.py --rollouts_too true --num_layers 4 --width 192 --vocab 2048

Prints JSON. Small queries are all different, so that no result is cached. Then a single query is
repeated, whose result is cached.

Rollouts play turns of the embedded world with replies of forced lengths (weights and text do not
matter for speed). What a reply does is scripted: three calls of the gold query, each with a remark
of its own so that no result is cached, then the answer. In every other rollout, `runaway_frac` of
the calls are joins of eight tables instead. Rewards are those of training, guard included. Both
kinds of rollout are played in turn, `num_pairs` times, and their medians are compared.
"""

import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
import torch
from common import make_model
from flags import ModelFlags, print_json, run_benchmark

from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict, format_reply
from mtsql.engine.completions import StopReason
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.engine.scheduler import Row
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.rollout import rollout
from mtsql.run.launch import keep_freed_memory
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryConfig, clear_result_cache, run_query, sandbox_counts
from mtsql.sql.worker_pool import set_num_workers, the_pool

NUM_CALLS = 3


@dataclass(frozen=True)
class Flags(ModelFlags):
    """Flags of benchmarks/sql.py."""

    num_queries: int = 10_000
    """Number of small queries, for each number of threads."""
    rollouts_too: bool = False
    """Play rollouts too, on a random model of the given shape."""
    num_turns: int = 8
    """Number of turns of a rollout."""
    num_samples: int = 4
    """Number of trajectories of each turn."""
    num_pairs: int = 1
    """Number of rollouts without runaway queries, and also of rollouts with them."""
    runaway_frac: float = 0.02
    """Fraction of the calls that are joins of eight tables."""
    max_vm_steps: int = QueryConfig().max_vm_steps
    """Steps of SQLite's virtual machine after which a query ends."""
    num_sql_workers: int = 0
    """Number of processes that run queries (0: as many as there are processors)."""
    toy_folder: str = "data/toyworld"
    """Folder of the embedded world."""


def small_queries(num_queries: int, folder: Path) -> dict[str, float]:
    """Measure the microseconds of a query."""
    path = folder / "small.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL)")
        rows = [(i, f"name {i}", i / 2) for i in range(100)]
        connection.executemany("INSERT INTO item VALUES (?, ?, ?)", rows)
    result = {}
    for num_threads in (1, 16):
        select = "SELECT name, price FROM item WHERE id ="
        texts = [f"{select} {i % 100} -- {num_threads}/{i}" for i in range(num_queries)]
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(lambda i: run_query(path, f"SELECT {i}"), range(50)))  # workers start
            each = map if num_threads == 1 else threads.map
            start = time.perf_counter()
            results = list(each(run_query, [path] * num_queries, texts))
            secs = time.perf_counter() - start
        assert all(found.is_ok for found in results)
        result[f"from_{num_threads}_threads_us"] = 1e6 * secs / num_queries
    start = time.perf_counter()
    for _ in range(num_queries):
        run_query(path, texts[-1])
    result["cached_us"] = 1e6 * (time.perf_counter() - start) / num_queries
    return result


class RandomLengths(Engine):
    """An engine that ends replies by a stop id, at lengths that depend on the row and the reply
    only."""

    def _stop_reason(self, row: Row) -> StopReason | None:
        self.lengths = getattr(self, "lengths", None) or {}
        key = row.handle, row.reply_start
        if key not in self.lengths:
            rng = np.random.default_rng(key)
            self.lengths[key] = int(np.clip(rng.exponential(45) + 20, 20, 120))
        return StopReason.STOP_ID if len(row.logprobs) == self.lengths[key] else None


class Scripted(SqlEnv):
    """An environment that acts as the benchmark says, whatever was sampled."""

    def __init__(self, *arguments: object, sample: str, runaways: set[int]) -> None:
        """`runaways` are the numbers of the calls that are joins of eight tables."""
        super().__init__(*arguments)
        self.sample = sample
        self.runaways = runaways

    def step(self, reply_text: str, meter: WorkMeter | None = None) -> str | Outcome:
        number = len(self.records)
        remark = f" -- {self.sample}/{number}"
        if number == NUM_CALLS:
            reply = Reply(Answer(self.turn.sql + remark), exec_verdict=Verdict.PASS)
        elif number in self.runaways:
            table = f'"{self.database.schema.tables[0].name}"'
            names = ", ".join(f"{table} t{i}" for i in range(8))
            sql = f"SELECT count(*) FROM {names}{remark}"
            reply = Reply(ToolCall("exec_sql", {"code": sql}))
        else:
            reply = Reply(ToolCall("exec_sql", {"code": self.turn.sql + remark}))
        return super().step(format_reply(reply), meter)


class Player:
    """Plays scripted rollouts on a random model and counts their queries."""

    def __init__(self, flags: Flags) -> None:
        corpus = load_split(DataConfig(toy_folder=flags.toy_folder), "train")
        step = max(1, len(corpus.turns) // flags.num_turns)
        self.turns = corpus.turns[::step][: flags.num_turns]
        self.databases = corpus.databases
        self.num_samples = flags.num_samples
        self.num_rows = flags.num_turns * flags.num_samples
        texts = [turn.sql + " " + turn.question for turn in self.turns] * 5
        self.renderer = Renderer(train_tokenizer(texts, 600, TAGS))
        self.model = make_model(None, flags.num_layers, flags.width, flags.vocab, "ours").eval()
        query = QueryConfig(max_vm_steps=flags.max_vm_steps)
        self.env_config = EnvConfig(max_replies=NUM_CALLS + 1, query=query)
        self.num_queries = 0
        self.num_runaways = 0

    def play(self, number: int, runaway_frac: float) -> float:
        """Play rollout `number`, which decides where the runaway queries are. Returns seconds,
        scoring included."""
        calls = [(row, call) for row in range(self.num_rows) for call in range(NUM_CALLS)]
        chosen = Random(number).sample(calls, round(runaway_frac * len(calls)))
        rows = iter(range(self.num_rows))  # environments are made in the order of the rows
        clear_result_cache()
        engine = RandomLengths(
            self.model,
            self.renderer.stop_ids,
            SamplingConfig(max_reply_tokens=256, max_trajectory_tokens=2048),
            EngineConfig(self.num_rows, 32, 1536 << 20, max(1024, 4 * self.num_rows)),
        )

        def make_env(turn: Turn) -> Scripted:
            row = next(rows)
            return Scripted(
                turn,
                self.databases[turn.db_id],
                self.env_config,
                "brief",
                sample=f"{number}/{row}",
                runaways={call for chosen_row, call in chosen if chosen_row == row},
            )

        start = time.perf_counter()
        scored = rollout(
            engine,
            self.renderer,
            self.turns,
            make_env,
            num_samples=self.num_samples,
            seed=0,
            update=0,
            max_prompt_tokens=4000,
            judge=lambda t: (t, reward_components(t, RewardConfig())),
        )
        secs = time.perf_counter() - start
        for trajectory, components in scored:
            assert trajectory.outcome is Outcome.ANSWERED and components["ex"] == 1
            records = trajectory.env.records
            self.num_queries += len(records)
            self.num_runaways += sum(
                record.status is not None and not record.is_ok for record in records
            )
        return secs


def measure_rollouts(flags: Flags) -> dict:
    """Seconds of rollouts without and with runaway queries, scoring included."""
    player = Player(flags)
    num_deadlines = sandbox_counts()["deadline"]
    with torch.inference_mode():
        player.play(-1, 0.0)  # warm up
        player.num_queries = 0
        player.num_runaways = 0
        pairs = []
        for pair in range(flags.num_pairs):
            plain_secs = player.play(2 * pair, 0.0)
            pairs.append((plain_secs, player.play(2 * pair + 1, flags.runaway_frac)))
    plain = median(pair[0] for pair in pairs)
    runaway = median(pair[1] for pair in pairs)
    return {
        "secs": plain,
        "secs_with_runaways": runaway,
        "ratio": runaway / plain,
        "pairs": pairs,
        "queries": player.num_queries,
        "runaways": player.num_runaways,
        "rows": player.num_rows,
        "deadlines_met": sandbox_counts()["deadline"] - num_deadlines,
    }


def main(flags: Flags) -> None:
    """Measure small queries and, with `rollouts_too`, rollouts."""
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    set_num_workers(flags.num_sql_workers)
    with tempfile.TemporaryDirectory() as folder:
        result = {"small_query": small_queries(flags.num_queries, Path(folder))}
    result["workers"] = the_pool().size
    if flags.rollouts_too:
        result["rollouts"] = measure_rollouts(flags)
    result["setting"] = asdict(flags)
    print_json(result)


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
