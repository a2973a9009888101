"""Memory of a rank beside what `mtsql plan` counts, on CPU ranks.

    python benchmarks/memory.py
    accelerate launch --cpu --num_processes 2 benchmarks/memory.py
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 benchmarks/memory.py

A model of SmolLM2's kind with random weights takes two optimizer steps of GRPO with a reference
policy, in float32. What is resident at the peak of the second step, less what was resident before
the model was made, is compared with the plan of the phase. Micro-batches are small, because
attention keeps other tensors on a CPU than on a GPU; so this checks weights, gradients, Adam's
averages, DDP's buckets, the reference and what FSDP2 gathers.
"""

import ctypes
import gc
from dataclasses import dataclass

import torch
from common import make_model, reset_peak, resident
from flags import print_json, run_benchmark

from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner
from mtsql.plan.memory import peak_bytes, plan
from mtsql.run.launch import leave_group, make_accelerator, start_missing_ranks

TOKENS = 64
"""Tokens of a prompt and of a trajectory. Each sample is a micro-batch, and the gradients of the
first ones are there while the next one keeps its activations."""


@dataclass(frozen=True)
class Flags:
    """The model. The defaults need about 3 GB a rank."""

    num_layers: int = 12
    """Decoder layers."""
    width: int = 1024
    """Width of the residual stream, a multiple of 64."""
    vocab: int = 4096
    """Size of the vocabulary."""
    threads: int = 1
    """Threads of each rank."""


def main(flags: Flags) -> None:
    """Measure on every rank; the main rank prints the largest."""
    start_missing_ranks()
    torch.set_num_threads(flags.threads)
    accelerator = make_accelerator("no")
    return_freed_memory()
    is_sharded = accelerator.is_fsdp2
    reset_peak()
    before = resident("VmRSS")
    model = make_model(None, flags.num_layers, flags.width, flags.vocab, "ours")
    shape = model.config
    learner = Learner(
        model,
        accelerator,
        OptimConfig(),
        max_batch_tokens=2 * TOKENS,
        loss=LossConfig(kl_coef=0.001),
        has_reference=True,
    )
    del model
    prompts = [[(step * place) % flags.vocab for place in range(TOKENS)] for step in (7, 11, 13)]
    samples = [Sample(ids, ids, [1] * TOKENS, [1.0] * TOKENS, [-8.0] * TOKENS) for ids in prompts]
    for _ in range(2):
        scored = learner.with_reference(samples)
        gc.collect()
        reset_peak()
        learner.optimizer_step(scored, 1e-6)
    measured = max(learner.ranks.gather([resident("VmHWM") - before]))
    parts = plan(
        shape,
        num_ranks=accelerator.num_processes,
        is_sharded=is_sharded,
        dtype=torch.float32,
        lora_rank=0,
        checkpointing=False,
        max_batch_tokens=2 * TOKENS,
        cache_bytes=0,
        reference="device",
        offload=False,
    )
    parts["head"] = 4 * flags.width * flags.vocab + 8 * TOKENS * flags.vocab
    planned = peak_bytes(parts, "learning")
    if learner.ranks.index == 0:
        print_json(
            {
                "ranks": accelerator.num_processes,
                "sharded": is_sharded,
                "measured_gb": round(measured / 1e9, 3),
                "planned_gb": round(planned / 1e9, 3),
                "planned_per_measured": round(planned / measured, 3),
                "parts_gb": {name: round(value / 1e9, 3) for name, value in parts.items()},
            }
        )
    accelerator.free_memory()
    leave_group()


def return_freed_memory() -> None:
    """Have malloc return large freed pieces to the system at once (glibc), contrary to what a run
    asks it for, so that only what is in use is resident."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 65536)  # M_MMAP_MAX
    mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    mallopt(-1, 65536)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
