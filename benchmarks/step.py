"""A whole RL update (rollout, advantages, learning) of ours against TRL's GRPOTrainer. Prints JSON.

    python benchmarks/step.py --trl_python /path/to/python                 # SmolLM2-135M's shape, 8 prompts x 4 samples
    python benchmarks/step.py --num_layers 6 --trl_python /path/to/python  # the same workload, a fifth of the depth
    python benchmarks/step.py --dtype bfloat16 --trl_python /path/to/python  # worth it on a CPU with AMX
    python benchmarks/step.py --who ours                                   # one contestant, in this process

The workload is that of benchmarks/rollout.py: prompts of about 600 tokens, replies of forced lengths, observations of
about 80 tokens between them, no SQL. Ours runs what train_rl.py runs: `generation_weights`, an Engine, `rollout` with
its threads and delayed observations, `batch_advantages`, `Learner.optimizer_step`; only the environment and the
renderer are doubles, and a subclass of the engine ends replies where the workload says. TRL runs `trainer.train()`:
benchmarks/trl_peer.py says how and with which settings. `trl` has its defaults, `trl_tuned` no gradient
checkpointing and completions projected only; `trl_batch` rows learn at a time, its generation takes all rows at once.
Rewards are the sample's number, so no group is dropped. On the CPU, all in `dtype`. Ours learns from 4,096 tokens at a
time, as configs/rl_sparc_smollm2.yaml does.

Each contestant has a process of its own: one small update to warm up, a whole one that shows its memory, then
`num_updates` that are timed and averaged, in memory the process already has, as the updates of a long run are.
`cpu_secs` is processor time: where it is far below `secs` times the threads, others were using the machine.
`*_tokens` count token slots run through the model, padding included.

Not compared: sampled ids (different generators) and hence losses; both sample from the plain distribution.
"""

import argparse
import sys
from dataclasses import dataclass
from statistics import mean

import common
import torch
from accelerate import Accelerator
from common import (
    DTYPES,
    Stopwatch,
    make_model,
    reset_peak,
    resident,
    run_contestant,
    trl_version,
    vocab_of,
)
from rollout import ForcedLengths, Workload, make_workload
from trl_rollout import longest, warm

from mtsql.agent.env import Outcome
from mtsql.engine.engine import EngineConfig, SamplingConfig, StopReason
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.step import Learner
from mtsql.model.attention import ATTENTION_NAME
from mtsql.model.policy import generation_weights
from mtsql.rl.advantages import batch_advantages
from mtsql.rl.rollout import rollout
from mtsql.run.launch import keep_freed_memory
from mtsql.sql.dialogues import Turn

CONTESTANTS = ("ours", "trl", "trl_tuned")
LOSS = LossConfig(kl_coef=0.0)
OPTIM = OptimConfig(lr=1e-6)


class Ended(ForcedLengths):
    """Replies end by a stop id, as `rollout` expects of replies worth answering, at the workload's
    lengths."""

    def _stop_reason(self, row):
        if super()._stop_reason(row) is None:
            return None
        self.done[row.handle] += 1
        return StopReason.STOP_ID


@dataclass
class Double:
    """An environment and a renderer whose texts are the workload's token ids."""

    work: Workload
    row: int = 0
    reply: int = 0
    outcome: Outcome | None = None

    def reset(self) -> tuple[list, list]:
        return self.work.prompts[self.row * len(self.work.prompts) // len(self.work.lengths)], []

    def step(self, reply: str, meter: object = None) -> str | Outcome:
        self.reply += 1
        if self.reply == self.work.lengths.shape[1]:
            self.outcome = Outcome.ANSWERED
            return self.outcome
        return " ".join(map(str, self.work.observations[self.row][self.reply - 1]))

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def render_prompt(self, messages: list, tools: list) -> list[int]:
        return list(messages)

    def render_observation(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def rewards_of(num_samples: int) -> list[float]:
    """The rewards of a group."""
    return [float(i) for i in range(num_samples)]


def ours(args: argparse.Namespace, works: list[Workload]) -> list[dict]:
    """Every workload is an update; their seconds."""
    accelerator = Accelerator(cpu=True, mixed_precision=DTYPES[args.dtype])
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    policy = make_model(args.model, args.num_layers, args.width, args.vocab, ATTENTION_NAME)
    learner = Learner(policy, accelerator, OPTIM, max_batch_tokens=args.max_batch_tokens, loss=LOSS)
    rows = args.num_prompts * args.num_samples
    limits = EngineConfig(rows, 32, args.cache_bytes, max(1024, 4 * rows))
    updates = []
    for update, work in enumerate(works):
        watch = start(update)
        budget = SamplingConfig(max_reply_tokens=1 << 10, max_trajectory_tokens=longest(work) + 8)
        turns = [Turn(str(i), 0, "", "", "") for i in range(args.num_prompts)]
        numbers = iter(range(rows))  # environments are made in the order of the rows
        with generation_weights(policy, getattr(torch, args.dtype)) as model:
            engine = Ended(model, (), budget, limits)
            engine.lengths, engine.done = work.lengths, work.lengths[:, 0] * 0
            trajectories = rollout(
                engine,
                Double(work),
                turns,
                lambda turn, n=numbers, w=work: Double(w, next(n)),
                num_samples=args.num_samples,
                seed=0,
                update=update,
                max_prompt_tokens=1 << 20,
            )
        computed = engine.tokens_computed
        del engine
        rollout_secs = watch.read()["secs"]
        check(work, [(len(t.ids), t.num_sampled) for t in trajectories])
        advantages = batch_advantages([rewards_of(args.num_samples)] * args.num_prompts)
        flat = [a for group in advantages for a in group]
        samples = [t.to_sample([a] * len(t.ids)) for t, a in zip(trajectories, flat, strict=True)]
        stats = learner.optimizer_step(samples, OPTIM.lr)
        learned = int(stats["num_computed"])
        updates.append(
            {**meters(watch, rollout_secs), "rollout_tokens": computed, "learn_tokens": learned}
        )
    return updates


def with_trl(args: argparse.Namespace, works: list[Workload]) -> list[dict]:
    """The same in `trainer.train()`; its rollout is what `_generate` takes, learning all the rest
    of the step."""
    import trl_peer

    policy = make_model(args.model, args.num_layers, args.width, args.vocab, "sdpa")
    watches, updates = [], []

    def before(n: int) -> None:
        peer.script.begin(works[n].lengths, works[n].observations)
        watches.append(start(n))

    def after(n: int) -> None:
        measured = meters(watches[-1], peer.rollout["secs"])
        updates.append(
            {
                **measured,
                "rollout_tokens": peer.rollout["token_slots"],
                "learn_tokens": peer.slots.count,
            }
        )

    peer = trl_peer.make_peer(
        policy,
        [p for work in works for p in work.prompts],
        num_samples=args.num_samples,
        batch=args.trl_batch,
        max_completion=max(map(longest, works)),
        num_steps=len(works),
        rewards=rewards_of(args.num_samples) * args.num_prompts,
        prompts_per_step=args.num_prompts,
        tuned=args.who == "trl_tuned",
        dtype=args.dtype,
        callbacks=[trl_peer.Steps(before, after)],
    )
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    peer.trainer.train()
    return updates


def start(update: int) -> Stopwatch:
    """Start an update's time; update 1 starts the peak of memory anew, from what is in use."""
    if update == 1:
        reset_peak()
    return Stopwatch()


def meters(watch: Stopwatch, rollout_secs: float) -> dict[str, float]:
    """Of an update that began with the watch and ends now."""
    times, peak = watch.read(), resident("VmHWM") / 2**20
    return {
        "rollout_secs": rollout_secs,
        "learn_secs": times["secs"] - rollout_secs,
        **times,
        "peak_mb": peak,
    }


def check(work: Workload, lengths: list[tuple[int, int]]) -> None:
    """RuntimeError unless every trajectory has the workload's tokens."""
    rows = zip(work.lengths, work.observations, strict=True)
    expected = [(int(n.sum()) + sum(map(len, o)), int(n.sum())) for n, o in rows]
    if lengths != expected:
        raise RuntimeError(
            f"trajectories have {lengths} (tokens, sampled); the workload says {expected}"
        )


def contest(args: argparse.Namespace) -> dict:
    """One contestant, in this process: the mean of its timed updates, and each of them."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.vocab = vocab_of(args.model, args.vocab)
    work = make_workload(args.num_prompts, args.num_samples, args.num_replies, args.vocab)
    works = [warm(work)] + [work] * (1 + args.num_updates)
    run = ours if args.who == "ours" else with_trl
    _, first, *updates = run(args, works)
    result = {name: mean(u[name] for u in updates) for name in first}
    return {
        **result,
        "peak_mb": first["peak_mb"],
        "all_secs": [u["secs"] for u in updates],
        "threads": torch.get_num_threads(),
        "useful_tokens": work.useful,
    }


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    sizes = {
        "num_prompts": 8,
        "num_samples": 4,
        "num_replies": 4,
        "num_layers": 30,
        "width": 576,
        "vocab": 49152,
        "num_updates": 1,
        "max_batch_tokens": 4096,
        "trl_batch": 8,
        "cache_bytes": 1536 << 20,
    }
    parser = common.make_parser(__doc__, sizes, CONTESTANTS)
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=["ours", "trl_tuned"]
    )
    return parser


def compared(args: argparse.Namespace) -> dict:
    """All contestants and their times as multiples of ours."""
    results: dict = {}
    if {"trl", "trl_tuned"} & set(args.contestants):
        results["trl_version"] = trl_version(args.trl_python)
    for who in args.contestants:
        python = args.trl_python if who.startswith("trl") else sys.executable
        results[who] = run_contestant(python, __file__, [*sys.argv[1:], "--who", who])
    if "ours" in results:
        mine, parts = results["ours"], ("rollout_secs", "learn_secs", "secs")
        others = [who for who in args.contestants if who != "ours"]
        results["times_ours"] = {
            who: {part: results[who][part] / mine[part] for part in parts} for who in others
        }
    results["setting"] = common.used_settings(args, ("num_layers", "width", "vocab"))
    return results


if __name__ == "__main__":
    common.print_result(make_parser(), contest, compared)
