"""A whole RL update (rollout, advantages, learning): ours against TRL's GRPOTrainer. Prints JSON.

    python benchmarks/step.py                                  # ours, SmolLM2-135M's shape
    python benchmarks/step.py --with_trl true --trl_python /path/to/python
    python benchmarks/step.py --num_layers 6 --with_trl true   # a fifth of the depth
    python benchmarks/step.py --dtype bfloat16                 # fast on a CPU with AMX
    python benchmarks/step.py --who trl                        # one contestant, in this process

The workload is that of workload.py. Ours runs what train_rl.py runs: `generation_weights`, an
Engine, `rollout` with its threads and delayed observations, `batch_advantages` and
`Learner.optimizer_step`. Only the environment and the renderer are stand-ins, and a subclass of the
engine ends replies where the workload says. Ours learns from 4,096 tokens at a time, as
configs/rl_sparc_smollm2.yaml does. The reward of a sample is its number, so no group has zero
variance.

TRL runs `trainer.train()`; trl_peer.py says how, and with which settings. `trl` has its defaults;
`trl_tuned` has no gradient checkpointing and projects completions only. Both learn from `trl_batch`
rows at a time and generate for all rows at once.

Each contestant has a process of its own. A small update warms it up, a whole one shows its memory,
and `num_updates` further ones are timed and averaged. These use memory that the process already
has, as in a long run. `cpu_secs` is processor time: if it is far below `secs` times the number of
threads, other programs were using the machine. `*_tokens` count token slots that ran through the
model, padding included.

Sampled ids differ because the generators differ, so losses are not compared. Both sample from the
unmodified distribution.
"""

import sys
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Literal

import torch
from accelerate import Accelerator
from common import DTYPES, Stopwatch, make_model, reset_peak, resident, vocab_of
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
from workload import StopsAsPolicy, Workload, WorkloadFlags, make_workload

from mtsql.agent.env import Outcome
from mtsql.choices import NumBytes
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.step import Learner
from mtsql.model.policy import generation_weights
from mtsql.rl.advantages import batch_advantages
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.run.launch import keep_freed_memory
from mtsql.sql.dialogues import Turn

LOSS = LossConfig(kl_coef=0.0)
OPTIM = OptimConfig(lr=1e-6)


@dataclass(frozen=True)
class Flags(PeerFlags, WorkloadFlags, FolderFlags):
    """Flags of benchmarks/step.py."""

    who: Literal["ours", "trl", "trl_tuned"] | None = None
    """Measure only this contestant, in this process. null: all of them."""
    num_updates: int = 1
    """Number of updates that are timed."""
    max_batch_tokens: int = 4096
    """Number of tokens of one of our micro-batches."""
    trl_batch: int = 8
    """Number of rows that TRL learns from at a time."""
    cache_bytes: NumBytes = 1536 << 20
    """Bytes for our keys and values."""

    @property
    def num_rows(self) -> int:
        """Trajectories of an update."""
        return self.num_prompts * self.num_samples


@dataclass
class StandIn:
    """An environment and a renderer whose texts are the workload's token ids."""

    work: Workload
    row: int = 0
    reply: int = 0
    outcome: Outcome | None = None

    def reset(self) -> tuple[list, list]:
        samples_per_prompt = len(self.work.lengths) // len(self.work.prompts)
        return self.work.prompts[self.row // samples_per_prompt], []

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


def play(
    flags: Flags, policy: torch.nn.Module, work: Workload, update: int
) -> tuple[list[Trajectory], int]:
    """Roll out the workload. Returns the trajectories and the tokens that the engine computed."""
    max_scheduled_tokens = max(1024, 4 * flags.num_rows)
    config = EngineConfig(flags.num_rows, 32, flags.cache_bytes, max_scheduled_tokens)
    budgets = SamplingConfig(max_reply_tokens=1 << 10, max_trajectory_tokens=work.budget + 8)
    turns = [Turn(str(i), 0, "", "", "") for i in range(flags.num_prompts)]
    rows = iter(range(flags.num_rows))  # environments are made in the order of the rows
    with generation_weights(policy, getattr(torch, flags.dtype)) as model:
        engine = StopsAsPolicy(model, (), budgets, config)
        engine.force(work.lengths)
        trajectories = rollout(
            engine,
            StandIn(work),
            turns,
            lambda turn: StandIn(work, next(rows)),
            num_samples=flags.num_samples,
            seed=0,
            update=update,
            max_prompt_tokens=1 << 20,
            judge=lambda trajectory: trajectory,
        )
    row_tokens = [(len(t.ids), t.num_sampled) for t in trajectories]
    if row_tokens != work.row_tokens:
        raise RuntimeError(
            f"trajectories have {row_tokens} (tokens, sampled); the workload says {work.row_tokens}"
        )
    return trajectories, engine.counts.computed


def run_ours(flags: Flags, works: list[Workload]) -> list[dict]:
    """Run an update on each workload. Returns the figures of each."""
    accelerator = Accelerator(cpu=True, mixed_precision=DTYPES[flags.dtype])
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    policy = make_model(flags.model, flags.num_layers, flags.width, flags.vocab, "ours")
    learner = Learner(
        policy, accelerator, OPTIM, max_batch_tokens=flags.max_batch_tokens, loss=LOSS
    )
    updates = []
    for update, work in enumerate(works):
        watch = start(update)
        trajectories, num_computed = play(flags, policy, work, update)
        rollout_secs = watch.read()["secs"]

        groups = batch_advantages([rewards_of(flags.num_samples)] * flags.num_prompts)
        advantages = [advantage for group in groups for advantage in group]
        samples = []
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            samples.append(trajectory.to_sample([advantage] * len(trajectory.ids)))
        stats = learner.optimizer_step(samples, OPTIM.lr)
        measured = figures(watch, rollout_secs)
        measured["rollout_tokens"] = num_computed
        measured["learn_tokens"] = int(stats["num_computed"])
        updates.append(measured)
    return updates


def run_trl(flags: Flags, works: list[Workload]) -> list[dict]:
    """Do the same with `trainer.train()`. The time of `_generate` counts as rollout, and the rest
    of an optimizer step as learning."""
    import trl_peer

    policy = make_model(flags.model, flags.num_layers, flags.width, flags.vocab, "sdpa")
    watches: list[Stopwatch] = []
    updates: list[dict] = []

    def before(step: int) -> None:
        peer.script.begin(works[step].lengths, works[step].observations)
        watches.append(start(step))

    def after(step: int) -> None:
        measured = figures(watches[-1], peer.rollout["secs"])
        measured["rollout_tokens"] = peer.rollout["token_slots"]
        measured["learn_tokens"] = peer.slots.count
        updates.append(measured)

    peer = trl_peer.make_peer(
        policy,
        [prompt for work in works for prompt in work.prompts],
        num_samples=flags.num_samples,
        batch=flags.trl_batch,
        max_completion=max(work.budget for work in works),
        num_steps=len(works),
        rewards=rewards_of(flags.num_samples) * flags.num_prompts,
        prompts_per_step=flags.num_prompts,
        tuned=flags.who == "trl_tuned",
        dtype=flags.dtype,
        callbacks=[trl_peer.Steps(before, after)],
    )
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    peer.trainer.train()
    return updates


def start(update: int) -> Stopwatch:
    """Start the stopwatch of an update. Update 1 also resets the peak of memory."""
    if update == 1:
        reset_peak()
    return Stopwatch()


def figures(watch: Stopwatch, rollout_secs: float) -> dict[str, float]:
    """Times and memory of an update that began with the watch and ends now."""
    times = watch.read()
    return {
        "rollout_secs": rollout_secs,
        "learn_secs": times["secs"] - rollout_secs,
        **times,
        "peak_mb": resident("VmHWM") / 2**20,
    }


def contest(flags: Flags) -> dict:
    """Measure the contestant `flags.who`, in this process: the mean of its timed updates."""
    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    flags = replace(flags, vocab=vocab_of(flags.model, flags.vocab))
    work = make_workload(flags.num_prompts, flags.num_samples, flags.num_replies, flags.vocab)
    works = [work.shortened(), work] + [work] * flags.num_updates
    run = run_ours if flags.who == "ours" else run_trl
    _, first, *timed = run(flags, works)
    result = {name: mean(update[name] for update in timed) for name in first}
    return {
        **result,
        "peak_mb": first["peak_mb"],
        "all_secs": [update["secs"] for update in timed],
        "threads": torch.get_num_threads(),
        "useful_tokens": work.num_sampled,
    }


def compare(flags: Flags) -> dict:
    """Measure all contestants, each in a process of its own. Times of the others are also given as
    multiples of ours."""
    results: dict = {}
    words = as_words(asdict(flags))
    if flags.with_trl:
        results["trl_version"] = trl_version(flags.trl_python)
    results["ours"] = run_contestant(sys.executable, __file__, [*words, "--who=ours"])
    if flags.with_trl:
        times_ours = {}
        for who in ("trl", "trl_tuned"):
            results[who] = run_contestant(flags.trl_python, __file__, [*words, f"--who={who}"])
            times_ours[who] = {
                part: results[who][part] / results["ours"][part]
                for part in ("rollout_secs", "learn_secs", "secs")
            }
        results["times_ours"] = times_ours
    results["setting"] = settings(flags)
    return results


def main(flags: Flags) -> None:
    """Measure one contestant, or all."""
    if flags.who:
        print_json(contest(flags), is_one_line=True)
    else:
        print_json(compare(flags))


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
