"""The rollout of TRL's GRPOTrainer on the workload of benchmarks/rollout.py. Prints JSON.

    python benchmarks/trl_rollout.py --num_layers 6
    python benchmarks/rollout.py --num_layers 6 --with_trl true     # beside our engine

What is timed is TRL's `_generate` inside `trainer.train()`. It renders the prompts, calls
transformers' `generate` for a reply of all rows, reads the replies, runs the tool and calls
`generate` again on the longer prompts, until no row calls a tool. A small optimizer step before it
is the warm-up. The rest of the timed optimizer step is left out. trl_peer.py describes how TRL is
driven.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass

import torch
import trl_peer
from common import make_model, vocab_of
from flags import FolderFlags, print_json, run_benchmark, trl_version
from workload import WorkloadFlags, make_workload

from mtsql.run.launch import keep_freed_memory


@dataclass(frozen=True)
class Flags(WorkloadFlags, FolderFlags):
    """Flags of benchmarks/trl_rollout.py."""


class RolloutDone(Exception):
    """The timed rollout is done."""


def main(flags: Flags) -> None:
    """Measure one rollout."""
    version = trl_version(sys.executable)
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    vocab = vocab_of(flags.model, flags.vocab)
    work = make_workload(flags.num_prompts, flags.num_samples, flags.num_replies, vocab)
    works = [work.shortened(), work]
    num_rows = flags.num_prompts * flags.num_samples

    def begin(step: int) -> None:
        peer.script.begin(works[step].lengths, works[step].observations)

    peer = trl_peer.make_peer(
        make_model(flags.model, flags.num_layers, flags.width, vocab, "sdpa"),
        works[0].prompts + work.prompts,
        num_samples=flags.num_samples,
        batch=num_rows,
        max_completion=work.budget,
        num_steps=2,
        rewards=[float(row % flags.num_samples) for row in range(num_rows)],
        prompts_per_step=flags.num_prompts,
        tuned=False,
        dtype=flags.dtype,
        callbacks=[trl_peer.Steps(begin, lambda step: None)],
    )
    calculate_rewards = peer.trainer._calculate_rewards  # what comes first after a rollout

    def stop_after_rollout(*args: object) -> object:
        if peer.trainer.state.global_step == 1:
            raise RolloutDone
        return calculate_rewards(*args)

    peer.trainer._calculate_rewards = stop_after_rollout
    with suppress(RolloutDone):
        peer.trainer.train()
    secs = peer.rollout["secs"]
    token_slots = peer.rollout["token_slots"]
    num_distinct = work.num_tokens - num_rows  # a row's last token is sampled, not computed
    result = {
        "trl": version,
        "dtype": flags.dtype,
        "secs": secs,
        "cpu_secs": peer.rollout["cpu_secs"],
        "useful_tokens": work.num_sampled,
        "useful_tokens_per_sec": work.num_sampled / secs,
        "token_slots": token_slots,
        "computed_over_distinct": token_slots / num_distinct,
        "model_calls": peer.rollout["model_calls"],
    }
    print_json(result, is_one_line=True)


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
