"""One learner update (log-probs, loss, backward, optimizer step) against padded learners. Prints JSON.

    python benchmarks/update.py                       # a model of SmolLM2-135M's shape with random weights
    python benchmarks/update.py --layers 4 --groups 1 # a quick look
    python benchmarks/update.py --layers 4 --with_trl # TRL's GRPOTrainer too, with its defaults and tuned
    python benchmarks/update.py --layers 2 --vocab 151936 --allocations  # is a tensor ever as large as P x V?

All contestants get the same weights, trajectories and loss (GRPO on fresh samples: the ratio is 1, k3 KL off) and each
runs in a process of its own: one small update that allocates optimizer state, a whole one that shows its memory, then
three that are timed, of which the middle one counts. Their `loss` and `grad_norm` have to agree (TRL's in four digits:
its warm-up moves the weights by a rate of 1e-6). `padded` is what small trainers do: every sample repeats its prompt,
rows are padded to the longest, logits exist at every position. `trl` is GRPOTrainer
from the given trajectories to the end of its optimizer step (padding, rewards, advantages, `_compute_loss`, backward,
clipping, AdamW), 8 rows at a time as by its default; `trl_tuned` is the same without what slows it down
(benchmarks/trl_peer.py), with the fastest of `trl_batches` rows at a time. On fresh samples TRL computes no old
log-probs, and neither does anybody else here.

Memory is the peak resident size during the update above what is resident before it, gradients left out for all: ours
and padded hold theirs already, and TRL's, freed between steps, are subtracted. `cpu_secs` is processor time: where it
is far below `secs` times the threads, others were using the machine. `matmul_frac` is the speed at which the counted
multiplications are done, as a share of a large matrix product's: the median of those computed for a second and a half
before and after each timed update (`matmul_best_gflops` is the fastest of them). `--allocations` repeats the update,
untimed, and reports the largest tensors made; `largest_activation_elements` leaves out tensors of a weight's shape
(gradients).
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, median, stdev

import common
import torch
from common import (
    LargestTensor,
    Stopwatch,
    autocast,
    make_model,
    matmul_speeds,
    reset_peak,
    resident,
    run_contestant,
    trl_version,
    vocab_of,
)

from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import LossConfig, denominator, policy_loss
from mtsql.learner.packing import Sample, pack
from mtsql.run.launch import keep_freed_memory

LOSS = LossConfig(kl_coef=0.0)
CONTESTANTS = ("ours", "padded", "trl", "trl_tuned")
MAX_GRAD_NORM = 1.0
TIMED = 3
"""Updates that are timed."""


def make_samples(groups: int, group_size: int, prompt: int, vocab: int) -> list[Sample]:
    """Replies of 30 to 90 tokens with observations between them: about 480 tokens after the prompt,
    half trained."""
    r, samples = random.Random(0), []
    for _ in range(groups):
        prompt_ids = [r.randrange(vocab) for _ in range(prompt)]
        rewards = rewards_of(group_size)
        for reward in rewards:
            mask = []
            for reply in range(4):
                mask += [1] * r.randint(30, 90) + [0] * (r.randint(60, 100) if reply < 3 else 0)
            n, advantage = (
                len(mask),
                (reward - mean(rewards)) / (stdev(rewards) + 1e-4),
            )  # as TRL scales it
            ids = [r.randrange(vocab) for _ in range(n)]
            samples.append(Sample(prompt_ids, ids, mask, [advantage] * n, [0.0] * n))
    return samples


def rewards_of(group_size: int) -> list[float]:
    """Rewards of one group."""
    return [float(i % 3) for i in range(group_size)]


def ours(model, samples: list[Sample], max_tokens: int, dtype: str) -> float:
    """Forward and backward of this repository; the loss."""
    module, total = PolicyModule(model), denominator(samples, LOSS)
    loss = 0.0
    for batch in pack(samples, max_tokens):
        with autocast(dtype):
            logprobs, entropy = module(batch)
        batch = replace(batch, old_logprobs=logprobs.detach())  # sampled just now
        part, _ = policy_loss(logprobs, entropy, batch, LOSS)
        (part / total).backward()
        loss += part.item() / total
    return loss


def padded(model, samples: list[Sample], max_tokens: int, dtype: str) -> float:
    """The same loss with right padding, prompts repeated, full logits and entropy; as many rows at
    a time as fit."""
    total, loss = denominator(samples, LOSS), 0.0
    rows = [s.prompt_ids + s.ids for s in samples]
    num_rows = max(1, max_tokens // max(map(len, rows)))
    for start in range(0, len(rows), num_rows):
        chosen = range(start, min(start + num_rows, len(rows)))
        width = max(len(rows[i]) for i in chosen)
        ids, seen, mask, advantages = (torch.zeros(len(chosen), width) for _ in range(4))
        for row, i in enumerate(chosen):
            own = slice(len(samples[i].prompt_ids), len(rows[i]))
            ids[row, : len(rows[i])], seen[row, : len(rows[i])] = torch.tensor(rows[i]).float(), 1
            mask[row, own] = torch.tensor(samples[i].loss_mask).float()
            advantages[row, own] = torch.tensor(samples[i].advantages)
        ids = ids.long()
        with autocast(dtype):
            logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[
                :, :-1
            ]
        logp = logits.float().log_softmax(-1)
        logprobs = logp.gather(2, ids[:, 1:, None])[..., 0]
        with torch.no_grad():
            -(logp.exp() * logp).sum(-1)  # entropy, logged by both
        ratio, a = (logprobs - logprobs.detach()).exp(), advantages[:, 1:]
        objective = torch.maximum(
            -a * ratio, -a * ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
        )
        objective = torch.where(a < 0, torch.minimum(objective, -a * LOSS.dual_clip), objective)
        part = (objective * mask[:, 1:]).sum() / total
        part.backward()
        loss += part.item()
    return loss


def multiplications(model, samples: list[Sample], max_tokens: int) -> float:
    """Floating-point operations `ours` cannot do without: 6 a weight and token in the layers (a
    trained position in the last MLP), 8 a head weight and trained position (logits are computed
    twice), 14 a head dimension and (query, key) pair that may be seen."""
    c, layers = model.config, model.model.layers
    last, every = (
        sum(p.numel() for p in part.parameters() if p.dim() == 2)
        for part in (layers[-1].mlp, layers)
    )
    batches = pack(samples, max_tokens)
    tokens, trained = sum(b.num_computed for b in batches), sum(len(b.targets) for b in batches)
    pairs = 0
    for batch in batches:
        for a, b in {span[:2] for span in batch.spans}:
            pairs += (b - a) * (b - a + 1) // 2
        for a, b, start, end in batch.spans:
            n = end - start
            pairs += n * (b - a) + n * (n + 1) // 2
    attention = 14 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return (
        6 * ((every - last) * tokens + last * trained)
        + 8 * c.vocab_size * c.hidden_size * trained
        + attention
    )


def learn_here(args: argparse.Namespace, vocab: int) -> dict:
    """The update of `ours` or `padded`, in this process."""
    learn = {"ours": ours, "padded": padded}[args.who]
    attention = "ours" if args.who == "ours" else "sdpa"
    model = make_model(args.model, args.layers, args.width, vocab, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    samples = make_samples(args.groups, args.group_size, args.prompt, vocab)

    def update(samples: list[Sample]) -> tuple[float, float]:
        loss = learn(model, samples, args.max_tokens, args.dtype)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad(
            set_to_none=False
        )  # they stay where they are: their memory is not the update's
        return loss, norm

    update([Sample([1, 2], [3, 4], [1, 1], [1.0, 1.0], [0.0, 0.0])])
    reset_peak()
    before = resident("VmRSS")
    update(samples)
    peak, timed, speeds = resident("VmHWM") - before, [], matmul_speeds()
    for _ in range(TIMED):
        watch = Stopwatch()
        loss, norm = update(samples)
        timed.append(watch.read())
        speeds += matmul_speeds()
    times, speed = middle(timed), median(speeds)
    result = {
        **times,
        "peak_extra_mb": peak / 2**20,
        "loss": loss,
        "grad_norm": norm,
        "matmul_gflops": speed / 1e9,
        "matmul_best_gflops": max(speeds) / 1e9,
        **slots(args, samples, model, times["secs"], speed),
    }
    if args.allocations:
        with LargestTensor(model) as largest:
            update(samples)
        result |= found(largest)
    return result


def slots(
    args: argparse.Namespace, samples: list[Sample], model, secs: float, speed: float
) -> dict:
    """Tokens `ours` or `padded` computes, and how fast ours counts its multiplications."""
    if args.who == "padded":
        rows = [len(s.prompt_ids) + len(s.ids) for s in samples]
        at_once = max(1, args.max_tokens // max(rows))
        parts = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        return {"tokens_computed": sum(len(part) * max(part) for part in parts)}
    computed = sum(b.num_computed for b in pack(samples, args.max_tokens))
    count = multiplications(model, samples, args.max_tokens)
    return {
        "gflop_counted": count / 1e9,
        "matmul_frac": count / secs / speed,
        "tokens_computed": computed,
        "tokens_per_sec": computed / secs,
    }


def middle(timed: list[dict[str, float]]) -> dict:
    """Of the updates that were timed the middle one, and the seconds of all."""
    middle = sorted(timed, key=lambda times: times["secs"])[len(timed) // 2]
    return {**middle, "all_secs": [times["secs"] for times in timed]}


def found(largest: LargestTensor) -> dict:
    """What `--allocations` reports."""
    return {
        "largest_tensor_elements": largest.elements,
        "largest_activation_elements": largest.activation,
    }


def learn_with_trl(args: argparse.Namespace, vocab: int) -> dict:
    """TRL's update in this process: optimizer step 0 warms up on two tokens a row, 1 shows its
    memory, TIMED are timed, one more is looked at."""
    import trl_peer

    model = make_model(args.model, args.layers, args.width, vocab, "sdpa")
    samples = make_samples(args.groups, args.group_size, args.prompt, vocab)
    tiny = [Sample([1, 2], [3, 4], [1, 1]) for _ in samples]
    gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    result: dict = {}
    step, watch, resident_before, looking = 0, Stopwatch(), 0, LargestTensor(model)
    timed, last = [], 1 + TIMED

    def given() -> dict:
        rows = samples if step else tiny
        return {
            "prompt_ids": [s.prompt_ids for s in rows],
            "completion_ids": [s.ids for s in rows],
            "logprobs": None,
            "env_mask": [s.loss_mask for s in rows],
        }

    def before(n: int) -> None:
        nonlocal step, watch, resident_before
        step = n
        if n == 1:
            result["matmul_gflops"] = median(matmul_speeds()) / 1e9
            reset_peak()
            resident_before = resident("VmRSS")
        if n > last:
            looking.__enter__()
        watch = Stopwatch()

    def after(n: int) -> None:
        if n == 1:
            peak = resident("VmHWM") - resident_before - gradient_bytes
            result.update(
                peak_extra_mb=peak / 2**20,
                tokens_computed=peer.slots.count,
                model_calls=peer.slots.calls,
            )
        if 1 < n <= last:
            timed.append(watch.read())
        if n > last:
            looking.__exit__(None, None, None)
            result.update(found(looking))

    peer = trl_peer.make_peer(
        model,
        [s.prompt_ids for s in samples[:: args.group_size]] * (last + 2),
        num_samples=args.group_size,
        batch=args.trl_batches[0],
        max_completion=max(len(s.ids) for s in samples),
        num_steps=last + 1 + args.allocations,
        prompts_per_step=args.groups,
        rewards=rewards_of(args.group_size) * args.groups,
        tuned=args.who == "trl_tuned",
        dtype=args.dtype,
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
        "batch": args.trl_batches[0],
        "trl": trl_version(sys.executable),
    }


def contest(args: argparse.Namespace) -> dict:
    """One contestant's update, in this process."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    vocab = vocab_of(args.model, args.vocab)
    run: Callable = learn_with_trl if args.who.startswith("trl") else learn_here
    result = run(args, vocab)
    samples = make_samples(args.groups, args.group_size, args.prompt, vocab)
    distinct = sum(b.num_distinct for b in pack(samples, args.max_tokens))
    result["computed_per_distinct"] = result["tokens_computed"] / distinct
    if args.allocations:
        result["positions_times_vocab"] = sum(s.num_trained for s in samples) * vocab
    return result


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    sizes = {
        "layers": 30,
        "width": 576,
        "vocab": 49152,
        "groups": 1,
        "group_size": 8,
        "prompt": 600,
        "max_tokens": 8192,
    }
    parser = common.make_parser(__doc__, sizes, CONTESTANTS)
    parser.add_argument("--with_trl", action="store_true", help="TRL's GRPOTrainer too")
    parser.add_argument(
        "--trl_batches", type=int, nargs="+", default=[8, 2], help="rows TRL learns from at a time"
    )
    parser.add_argument(
        "--allocations", action="store_true", help="also report the largest tensors made"
    )
    return parser


def compared(args: argparse.Namespace) -> dict:
    """All contestants, and how ours stands to the others."""
    results = {}
    if args.with_trl:
        trl_version(args.trl_python)
    for who in CONTESTANTS if args.with_trl else CONTESTANTS[:2]:
        flags = [*sys.argv[1:], "--who", who]
        if who == "trl_tuned":
            tries = [[*flags, "--trl_batches", str(batch)] for batch in args.trl_batches]
            runs = [run_contestant(args.trl_python, __file__, flags) for flags in tries]
            by_batch = {run["batch"]: run["secs"] for run in runs}
            results[who] = {**min(runs, key=lambda run: run["secs"]), "secs_by_batch": by_batch}
        else:
            results[who] = run_contestant(
                args.trl_python if who == "trl" else sys.executable, __file__, flags
            )
    mine = results["ours"]
    others = {who: result for who, result in results.items() if who != "ours"}
    results["speed_up"] = {who: r["secs"] / mine["secs"] for who, r in others.items()}
    results["memory_share"] = {
        who: mine["peak_extra_mb"] / r["peak_extra_mb"] for who, r in others.items()
    }
    results["setting"] = common.used_settings(args, ("layers", "width", "vocab"))
    return results


if __name__ == "__main__":
    common.print_result(make_parser(), contest, compared)
