"""The rollout part of a step of TRL's GRPOTrainer on the workload of benchmarks/rollout.py. Prints JSON.

    python benchmarks/trl_rollout.py --num_layers 6
    python benchmarks/rollout.py --num_layers 6 --with_trl true     # beside our engine and a loop around `generate`

Counted: TRL's `_generate` inside `trainer.train()`, which renders the prompts, calls transformers' `generate` for a
reply of all rows, reads the replies, runs the tool and calls `generate` again on the longer prompts, until no row calls
a tool. The step before it is a small one, the rest of its own step is left out. How it is driven stands in
benchmarks/trl_peer.py.
"""

import json
import sys
from typing import Literal

import rollout
import torch
import trl_peer
from common import make_model, trl_version, vocab_of
from jsonargparse import auto_cli

from mtsql.run.launch import keep_freed_memory


def main(
    num_prompts: int = 8,
    num_samples: int = 4,
    num_replies: int = 4,
    num_layers: int = 30,
    width: int = 576,
    vocab: int = 49152,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 2,
) -> None:
    """Measure one rollout; `model` is a Hugging Face folder instead of random weights."""
    version = trl_version(sys.executable)
    torch.set_num_threads(threads)
    keep_freed_memory()
    vocab = vocab_of(model, vocab)
    work = rollout.make_workload(num_prompts, num_samples, num_replies, vocab)
    policy = make_model(model, num_layers, width, vocab, "sdpa")
    rows, works = num_prompts * num_samples, [warm(work), work]

    def before(n: int) -> None:
        peer.script.begin(works[n].lengths, works[n].observations)

    peer = trl_peer.make_peer(
        policy,
        works[0].prompts + work.prompts,
        num_samples=num_samples,
        batch=rows,
        max_completion=longest(work),
        num_steps=2,
        rewards=[float(i % num_samples) for i in range(rows)],
        prompts_per_step=num_prompts,
        tuned=False,
        dtype=dtype,
        callbacks=[trl_peer.Steps(before, lambda n: None)],
    )
    rewards = peer.trainer._calculate_rewards

    def stop(*args):
        if peer.trainer.state.global_step == 1:
            raise Rolled
        return rewards(*args)

    peer.trainer._calculate_rewards = stop  # what comes first after a rollout
    try:
        peer.trainer.train()
    except Rolled:
        pass
    secs, slots = peer.rollout["secs"], peer.rollout["token_slots"]
    distinct = (
        sum(map(len, work.prompts))
        + work.useful
        + sum(len(o) for row in work.observations for o in row)
        - rows
    )
    print(
        json.dumps(
            {
                "trl": version,
                "dtype": dtype,
                "secs": secs,
                "cpu_secs": peer.rollout["cpu_secs"],
                "useful_tokens": work.useful,
                "useful_tokens_per_sec": work.useful / secs,
                "token_slots": slots,
                "computed_over_distinct": slots / distinct,
                "model_calls": peer.rollout["model_calls"],
            }
        )
    )


def longest(work: rollout.Workload) -> int:
    """Tokens after the prompt that no row exceeds."""
    return (
        max(
            int(n.sum()) + sum(map(len, o))
            for n, o in zip(work.lengths, work.observations, strict=True)
        )
        + 1
    )


def warm(work: rollout.Workload) -> rollout.Workload:
    """The same shape, short."""
    short = [[o[:4] for o in row] for row in work.observations]
    return rollout.Workload([p[:8] for p in work.prompts], work.lengths * 0 + 4, short)


class Rolled(Exception):
    """The timed rollout is done."""


if __name__ == "__main__":
    auto_cli(main)
