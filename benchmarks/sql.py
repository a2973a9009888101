"""What SQL costs: small queries from one thread and from many, and rollouts in which some queries run away. Prints JSON.

    python benchmarks/sql.py                              # a small query
    python benchmarks/sql.py --rollouts_too true              # SmolLM2-135M's shape, 8 turns x 4 samples x 4 replies
    python benchmarks/sql.py --rollouts_too true --num_layers 4 --width 192 --vocab 2048 --num_turns 16 --num_samples 8

Small queries are all different, so none is kept; then the same one again and again. Rollouts play turns of the embedded
world with replies of forced lengths (weights and text do not matter for speed). What a reply does is scripted: three
calls of the gold with a remark of its own (so none is kept), then the answer. In every other rollout `runaway_frac` of
the calls are joins of eight tables instead. Rewards are those of training, guard included. Both kinds are played in
turn, `num_pairs` times, and their medians compared.
"""

import json
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
import torch
from common import make_model
from jsonargparse import auto_cli

from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig, StopReason
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.rollout import rollout
from mtsql.run.launch import keep_freed_memory
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.sandbox import QueryConfig, clear_result_cache, run_query, sandbox_counts
from mtsql.sql.worker_pool import set_num_workers, the_pool

NUM_CALLS = 3


def small_queries(num_queries: int, folder: Path) -> dict[str, float]:
    """Microseconds each."""
    path = folder / "small.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL)")
        connection.executemany(
            "INSERT INTO item VALUES (?, ?, ?)", [(i, f"name {i}", i / 2) for i in range(100)]
        )
    out = {}
    for num_threads in (1, 16):
        texts = [
            f"SELECT name, price FROM item WHERE id = {i % 100} -- {num_threads}/{i}"
            for i in range(num_queries)
        ]
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(lambda i: run_query(path, f"SELECT {i}"), range(50)))  # workers start
            start = time.perf_counter()
            each = map if num_threads == 1 else threads.map
            assert all(result.is_ok for result in each(run_query, [path] * num_queries, texts))
            out[f"from_{num_threads}_threads_us"] = (
                1e6 * (time.perf_counter() - start) / num_queries
            )
    start = time.perf_counter()
    for _ in range(num_queries):
        run_query(path, texts[-1])
    out["kept_us"] = 1e6 * (time.perf_counter() - start) / num_queries
    return out


class ForcedLengths(Engine):
    """Replies end by a stop id at lengths drawn from the row's number."""

    def _stop_reason(self, row):
        self.lengths = getattr(self, "lengths", None) or {}
        key = row.handle, row.reply_start
        if key not in self.lengths:
            rng = np.random.default_rng(key)
            self.lengths[key] = int(np.clip(rng.exponential(45) + 20, 20, 120))
        return StopReason.STOP_ID if len(row.logprobs) == self.lengths[key] else None


class Scripted(SqlEnv):
    """Acts as the benchmark says, whatever was sampled."""

    def __init__(self, *arguments, sample: str, runaways: set[int]):
        """`runaways`: which of its calls are joins of eight tables."""
        super().__init__(*arguments)
        self.sample, self.runaways = sample, runaways

    def step(self, reply_text, meter=None):
        number = len(self.records)
        remark = f" -- {self.sample}/{number}"
        if number == NUM_CALLS:
            reply = Reply(exec_verdict=Verdict.PASS, answer=self.turn.sql + remark)
        elif number in self.runaways:
            table = f'"{self.schema.tables[0].name}"'
            names = ", ".join(f"{table} t{i}" for i in range(8))
            reply = Reply(tool_call=ToolCall("exec_sql", f"SELECT count(*) FROM {names}{remark}"))
        else:
            reply = Reply(tool_call=ToolCall("exec_sql", self.turn.sql + remark))
        return super().step(format_reply(reply), meter)


def rollouts(
    folder: str,
    *,
    num_layers: int,
    width: int,
    vocab: int,
    num_turns: int,
    num_samples: int,
    runaway_frac: float,
    max_vm_steps: int,
    num_pairs: int,
) -> dict:
    """Seconds of rollouts with and without runaway queries, scoring included."""
    corpus = load_split(DataConfig(toy_folder=folder), "train")
    turns = corpus.turns[:: max(1, len(corpus.turns) // num_turns)][:num_turns]
    renderer = Renderer(
        train_tokenizer([turn.sql + " " + turn.question for turn in turns] * 5, 600)
    )
    model = make_model(None, num_layers, width, vocab, "ours").eval()
    limits = EnvConfig(max_replies=NUM_CALLS + 1, query=QueryConfig(max_vm_steps=max_vm_steps))
    rows, counts = num_turns * num_samples, {"runaway": 0, "sql": 0}

    def play(number: int, frac: float) -> float:
        calls = [(row, call) for row in range(rows) for call in range(NUM_CALLS)]
        chosen = Random(number).sample(calls, round(frac * len(calls)))
        made = iter(range(rows))
        clear_result_cache()
        engine = ForcedLengths(
            model,
            renderer.stop_ids,
            SamplingConfig(max_reply_tokens=256, max_trajectory_tokens=2048),
            EngineConfig(rows, 32, 1536 << 20, max(1024, 4 * rows)),
        )

        def make_env(turn):
            row = next(made)
            return Scripted(
                turn,
                corpus.databases[turn.db_id],
                limits,
                PromptStyle.BRIEF,
                sample=f"{number}/{row}",
                runaways={call for at, call in chosen if at == row},
            )

        start = time.perf_counter()
        scored = rollout(
            engine,
            renderer,
            turns,
            make_env,
            num_samples=num_samples,
            seed=0,
            update=0,
            max_prompt_tokens=4000,
            judge=lambda t: (t, reward_components(t.env, RewardConfig())),
        )
        secs = time.perf_counter() - start
        assert all(t.outcome is Outcome.ANSWERED and parts["ex"] == 1 for t, parts in scored)
        counts["sql"] += sum(len(t.env.records) for t, _ in scored)
        counts["runaway"] += sum(
            step.status is not None and not step.is_ok for t, _ in scored for step in t.env.records
        )
        return secs

    num_deadlines = sandbox_counts()["deadline"]
    with torch.inference_mode():
        play(-1, 0.0)  # warm up
        counts.update(runaway=0, sql=0)
        pairs = [(play(2 * i, 0.0), play(2 * i + 1, runaway_frac)) for i in range(num_pairs)]
    plain, runaway = (median(side) for side in zip(*pairs, strict=True))
    return {
        "secs": plain,
        "secs_with_runaways": runaway,
        "ratio": runaway / plain,
        "pairs": pairs,
        "queries": counts["sql"],
        "runaways": counts["runaway"],
        "rows": rows,
        "max_vm_steps": max_vm_steps,
        "deadlines_met": sandbox_counts()["deadline"] - num_deadlines,
    }


def main(
    num_queries: int = 10_000,
    rollouts_too: bool = False,
    num_layers: int = 30,
    width: int = 576,
    vocab: int = 49152,
    num_turns: int = 8,
    num_samples: int = 4,
    runaway_frac: float = 0.02,
    max_vm_steps: int = QueryConfig().max_vm_steps,
    num_pairs: int = 1,
    num_workers: int = 0,
    threads: int = 2,
    toy_folder: str = "data/toyworld",
) -> None:
    """Measure small queries and, with `rollouts_too`, rollouts on a random model of the given
    shape."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    set_num_workers(num_workers)
    with tempfile.TemporaryDirectory() as folder:
        out = {"small_query": small_queries(num_queries, Path(folder))}
    out["workers"] = the_pool().size
    if rollouts_too:
        out["rollouts"] = rollouts(
            toy_folder,
            num_layers=num_layers,
            width=width,
            vocab=vocab,
            num_turns=num_turns,
            num_samples=num_samples,
            runaway_frac=runaway_frac,
            max_vm_steps=max_vm_steps,
            num_pairs=num_pairs,
        )
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    auto_cli(main)
