"""The rollout part of a step of TRL's GRPOTrainer on the workload of benchmarks/rollout.py. Prints JSON.

    python benchmarks/trl_rollout.py --num_layers 6
    python benchmarks/rollout.py --num_layers 6 --with_trl true     # beside our engine and a loop around `generate`

Counted: TRL's `_generate`, which renders the prompts, calls transformers' `generate` for a reply of all rows, reads the
replies, runs the tool and calls `generate` again on the longer prompts, until no row calls a tool. After a warm-up
on short prompts. Not counted: its rewards and padding, which follow. How it is driven stands in benchmarks/trl_peer.py.
"""

import json
import sys

import torch
from jsonargparse import auto_cli

import rollout
import trl_peer
from common import make_model, trl_version, vocab_of


def main(
    num_prompts: int = 8,
    num_samples: int = 4,
    num_replies: int = 4,
    num_layers: int = 30,
    width: int = 576,
    vocab: int = 49152,
    model: str | None = None,
    threads: int = 2,
) -> None:
    """Measure one rollout; `model` is a Hugging Face folder instead of random weights."""
    version = trl_version(sys.executable)
    torch.set_num_threads(threads)
    vocab = vocab_of(model, vocab)
    work = rollout.make_workload(num_prompts, num_samples, num_replies, vocab)
    policy = make_model(model, num_layers, width, vocab, "sdpa")
    rows = num_prompts * num_samples
    peer = trl_peer.make_peer(
        policy, work.prompts, num_samples=num_samples, batch=rows, max_completion=longest(work), num_steps=1,
        rewards=[float(i % num_samples) for i in range(rows)], prompts_per_step=num_prompts, tuned=False,
    )  # fmt: skip
    policy.train()
    play(peer, [prompt[:8] for prompt in work.prompts], num_samples, work.lengths[:, -1:] * 0 + 8, [[]] * rows)
    play(peer, work.prompts, num_samples, work.lengths, work.observations)
    secs, slots = peer.rollout["secs"], peer.rollout["token_slots"]
    distinct = sum(map(len, work.prompts)) + work.useful + sum(len(o) for row in work.observations for o in row) - rows
    print(json.dumps({
        "trl": version, "secs": secs, "cpu_secs": peer.rollout["cpu_secs"], "useful_tokens": work.useful,
        "useful_tokens_per_sec": work.useful / secs, "token_slots": slots, "computed_over_distinct": slots / distinct,
        "model_calls": peer.rollout["model_calls"],
    }))  # fmt: skip


def longest(work: rollout.Workload) -> int:
    """Tokens after the prompt that no row exceeds."""
    return max(int(n.sum()) + sum(map(len, o)) for n, o in zip(work.lengths, work.observations, strict=True)) + 1


def play(peer: trl_peer.Peer, prompts: list[list[int]], num_samples: int, lengths, observations) -> None:
    """One rollout through the trainer's own method, as its training loop would call it."""
    peer.script.begin(lengths, observations)
    rows = [{"prompt": [{"role": "user", "content": trl_peer.to_text(p)}]} for p in prompts for _ in range(num_samples)]
    peer.trainer._generate_and_score_completions(rows)


if __name__ == "__main__":
    auto_cli(main)
