"""Compare an update (log-probs, loss, backward, optimizer step) of our learner and of padded ones.

    python benchmarks/update.py                             # a model of SmolLM2-135M's shape
    python benchmarks/update.py --num_layers 4              # a quick look
    python benchmarks/update.py --num_layers 4 --with_trl true
    python benchmarks/update.py --dtype bfloat16            # fast on a CPU with AMX
    python benchmarks/update.py --num_layers 2 --vocab 151936 --allocations true

Prints JSON. All contestants get the same weights, trajectories and loss: GRPO on fresh samples, so
the ratio is 1, without a KL penalty. Each runs in a process of its own. A small update allocates
the optimizer state, a whole one shows the memory, and three are timed, of which the median counts.
Their `loss` and `grad_norm` must agree (TRL's in four digits only, because its warm-up changes the
weights at a learning rate of 1e-6).

- `padded` is what small trainers do: every sample repeats its prompt, rows are padded to the
  longest, and logits exist at every position.
- `trl` is GRPOTrainer from the given trajectories to the end of its optimizer step (padding,
  rewards, advantages, `_compute_loss`, backward, clipping, AdamW), 8 rows at a time, its default.
- `trl_tuned` is the same without what slows it down (trl_peer.py), with the fastest of
  `trl_batches` rows at a time.

On fresh samples TRL computes no old log-probs, and neither do the others.

- Memory is the peak resident size during the update minus the resident size before it. Gradients do
  not count: ours and padded have allocated them before, and TRL's, which are freed between
  optimizer steps, are subtracted.
- `cpu_secs` is processor time. If it is far below `secs` times the number of threads, other
  programs were using the machine.
- `matmul_frac` is the speed of the counted operations as a share of the speed of a large matmul in
  `--dtype`. The latter is the median of the matmuls that are computed for a second and a half
  before and after each timed update (`matmul_best_gflops` is the fastest of them).
- `--allocations true` repeats the update, untimed, and reports the largest tensors. They show
  whether one is as large as positions times vocabulary. `largest_activation_elements` leaves out
  tensors that have the shape of a weight.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

import learners
import torch
from common import (
    LargestTensor,
    Stopwatch,
    make_model,
    matmul_speeds,
    reset_peak,
    resident,
    vocab_of,
)
from flags import (
    FolderFlags,
    PeerFlags,
    as_words,
    print_json,
    run_benchmark,
    run_contestant,
    settings,
    trl_version,
)
from learners import make_samples, rewards_of
from torch import nn

from mtsql.learner.packing import Sample, pack
from mtsql.run.launch import keep_freed_memory

LEARNERS: dict[str, Callable[[nn.Module, list[Sample], int, str], float]] = {
    "ours": learners.learn_ours,
    "padded": learners.learn_padded,
}
MAX_GRAD_NORM = 1.0
NUM_TIMED = 3


@dataclass(frozen=True)
class Flags(PeerFlags, FolderFlags):
    """Flags of benchmarks/update.py."""

    num_prompts: int = 1
    """Number of groups of an update."""
    num_samples: int = 8
    """Number of trajectories of a group."""
    prompt_tokens: int = 600
    """Number of tokens of a prompt."""
    max_batch_tokens: int = 8192
    """Number of tokens of a micro-batch."""
    who: Literal["ours", "padded", "trl", "trl_tuned"] | None = None
    """Measure only this contestant, in this process. null: all of them."""
    trl_batches: list[int] = field(default_factory=lambda: [8, 2])
    """Rows that TRL learns from at a time: trl takes the first number, trl_tuned tries all."""
    allocations: bool = False
    """Also report the largest tensors."""

    def samples(self, vocab: int) -> list[Sample]:
        """The trajectories of the update."""
        return make_samples(self.num_prompts, self.num_samples, self.prompt_tokens, vocab)


def middle(timed: list[dict[str, float]]) -> dict:
    """The times of the update with the median seconds, and the seconds of all timed updates."""
    by_secs = sorted(timed, key=lambda times: times["secs"])
    return {**by_secs[len(timed) // 2], "all_secs": [times["secs"] for times in timed]}


def largest_tensors(largest: LargestTensor) -> dict[str, int]:
    """The sizes that `--allocations true` reports."""
    return {
        "largest_tensor_elements": largest.elements,
        "largest_activation_elements": largest.activation,
    }


def learn_here(flags: Flags, vocab: int) -> dict:
    """Measure the update of `ours` or `padded`, in this process."""
    learn = LEARNERS[flags.who]
    attention = "ours" if flags.who == "ours" else "sdpa"
    model = make_model(flags.model, flags.num_layers, flags.width, vocab, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    samples = flags.samples(vocab)

    def update(samples: list[Sample]) -> tuple[float, float]:
        loss = learn(model, samples, flags.max_batch_tokens, flags.dtype)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
        optimizer.step()
        # Gradients stay allocated, so that their memory does not count as the update's.
        optimizer.zero_grad(set_to_none=False)
        return loss, norm

    update([Sample([1, 2], [3, 4], [1, 1], [1.0, 1.0], [0.0, 0.0])])
    reset_peak()
    resident_before = resident("VmRSS")
    update(samples)
    peak = resident("VmHWM") - resident_before
    timed = []
    speeds = matmul_speeds(flags.dtype)
    for _ in range(NUM_TIMED):
        watch = Stopwatch()
        loss, norm = update(samples)
        timed.append(watch.read())
        speeds += matmul_speeds(flags.dtype)
    times = middle(timed)
    result = {
        **times,
        "peak_extra_mb": peak / 2**20,
        "loss": loss,
        "grad_norm": norm,
        "matmul_gflops": median(speeds) / 1e9,
        "matmul_best_gflops": max(speeds) / 1e9,
    }
    if flags.who == "padded":
        result["tokens_computed"] = learners.tokens_of_padded(samples, flags.max_batch_tokens)
    else:
        result |= our_throughput(flags, model, samples, times["secs"], median(speeds))
    if flags.allocations:
        with LargestTensor(model) as largest:
            update(samples)
        result |= largest_tensors(largest)
    return result


def our_throughput(
    flags: Flags, model: nn.Module, samples: list[Sample], secs: float, matmul_speed: float
) -> dict[str, float]:
    """The tokens that our learner computes, and the speed of its operations."""
    num_tokens = sum(batch.num_computed for batch in pack(samples, flags.max_batch_tokens))
    num_operations = learners.num_operations(model, samples, flags.max_batch_tokens)
    return {
        "gflop_counted": num_operations / 1e9,
        "matmul_frac": num_operations / secs / matmul_speed,
        "tokens_computed": num_tokens,
        "tokens_per_sec": num_tokens / secs,
    }


def learn_with_trl(flags: Flags, vocab: int) -> dict:
    """Measure TRL's update, in this process.

    Optimizer step 0 warms up on two tokens a row, step 1 shows the memory, and the next NUM_TIMED
    are timed. With `--allocations true`, one more step follows, whose tensors are measured.
    """
    import trl_peer

    model = make_model(flags.model, flags.num_layers, flags.width, vocab, "sdpa")
    samples = flags.samples(vocab)
    tiny_samples = [Sample([1, 2], [3, 4], [1, 1]) for _ in samples]
    gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    last_timed = 1 + NUM_TIMED
    largest = LargestTensor(model)
    timed: list[dict[str, float]] = []
    result: dict = {}
    current = 0
    watch = Stopwatch()
    resident_before = 0

    def given() -> dict:
        rows = samples if current else tiny_samples
        return {
            "prompt_ids": [sample.prompt_ids for sample in rows],
            "completion_ids": [sample.ids for sample in rows],
            "logprobs": None,
            "env_mask": [sample.loss_mask for sample in rows],
        }

    def before(step: int) -> None:
        nonlocal current, watch, resident_before
        current = step
        if step == 1:
            result["matmul_gflops"] = median(matmul_speeds(flags.dtype)) / 1e9
            reset_peak()
            resident_before = resident("VmRSS")
        if step > last_timed:
            largest.__enter__()
        watch = Stopwatch()

    def after(step: int) -> None:
        if step == 1:
            peak = resident("VmHWM") - resident_before - gradient_bytes
            result["peak_extra_mb"] = peak / 2**20
            result["tokens_computed"] = peer.slots.count
            result["model_calls"] = peer.slots.calls
        if 1 < step <= last_timed:
            timed.append(watch.read())
        if step > last_timed:
            largest.__exit__(None, None, None)
            result.update(largest_tensors(largest))

    peer = trl_peer.make_peer(
        model,
        [sample.prompt_ids for sample in samples[:: flags.num_samples]] * (last_timed + 2),
        num_samples=flags.num_samples,
        batch=flags.trl_batches[0],
        max_completion=max(len(sample.ids) for sample in samples),
        num_steps=last_timed + 1 + flags.allocations,
        prompts_per_step=flags.num_prompts,
        rewards=rewards_of(flags.num_samples) * flags.num_prompts,
        tuned=flags.who == "trl_tuned",
        dtype=flags.dtype,
        given=given,
        callbacks=[trl_peer.Steps(before, after)],
    )
    peer.trainer.train()
    logged = peer.trainer.state.log_history[1]
    return {
        **result,
        **middle(timed),
        "loss": logged["loss"],
        "grad_norm": logged["grad_norm"],
        "batch": flags.trl_batches[0],
        "trl": trl_version(sys.executable),
    }


def contest(flags: Flags) -> dict:
    """Measure the contestant `flags.who`, in this process."""
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    vocab = vocab_of(flags.model, flags.vocab)
    learn = learn_here if flags.who in LEARNERS else learn_with_trl
    result = learn(flags, vocab)
    samples = flags.samples(vocab)
    num_distinct = sum(batch.num_distinct for batch in pack(samples, flags.max_batch_tokens))
    result["computed_per_distinct"] = result["tokens_computed"] / num_distinct
    if flags.allocations:
        num_trained = sum(sample.num_trained for sample in samples)
        result["positions_times_vocab"] = num_trained * vocab
    return result


def compare(flags: Flags) -> dict:
    """Measure all contestants, each in a process of its own, and compare them with ours."""
    results = {}
    if flags.with_trl:
        trl_version(flags.trl_python)
    for who in LEARNERS:
        results[who] = run_contestant(sys.executable, __file__, words_for(flags, who))
    if flags.with_trl:
        results["trl"] = run_contestant(flags.trl_python, __file__, words_for(flags, "trl"))
        results["trl_tuned"] = fastest_tuned(flags)
    mine = results["ours"]
    speed_up = {}
    memory_share = {}
    for who, result in results.items():
        if who != "ours":
            speed_up[who] = result["secs"] / mine["secs"]
            memory_share[who] = mine["peak_extra_mb"] / result["peak_extra_mb"]
    return {
        **results,
        "speed_up": speed_up,
        "memory_share": memory_share,
        "setting": settings(flags),
    }


def words_for(flags: Flags, who: str, **changes: object) -> list[str]:
    """The command line of one contestant."""
    return as_words({**asdict(flags), "who": who, **changes})


def fastest_tuned(flags: Flags) -> dict:
    """The figures of `trl_tuned` with the fastest of `trl_batches`."""
    runs = []
    for batch in flags.trl_batches:
        words = words_for(flags, "trl_tuned", trl_batches=[batch])
        runs.append(run_contestant(flags.trl_python, __file__, words))
    fastest = min(runs, key=lambda run: run["secs"])
    return {**fastest, "secs_by_batch": {run["batch"]: run["secs"] for run in runs}}


def main(flags: Flags) -> None:
    """Measure one contestant, or all."""
    if flags.who:
        print_json(contest(flags), is_one_line=True)
    else:
        print_json(compare(flags))


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
