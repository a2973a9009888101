"""Play episodes and score them, compare siblings, describe both: what train_rl.py does besides learning."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator

from mtsql.agent.env import Outcome
from mtsql.agent.reply import ParseError
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.learner.packing import Sample
from mtsql.learner.step import gather_list, sum_over_ranks
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.rl.advantages import (
    AdvantageConfig,
    batch_advantages,
    kl_penalty,
    treatment,
)
from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtsql.rl.evaluate import evaluate, scores_as_rows, summarize
from mtsql.rl.rewards import RewardConfig, group_components, reward_components, total_reward
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.run.runlog import RunLog
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import sandbox_counts
from mtsql.workbench import Workbench

BUDGETS = (
    Outcome.MAX_REPLIES,
    Outcome.REPLY_TOKENS,
    Outcome.TRAJECTORY_TOKENS,
    Outcome.OBSERVATION_TOKENS,
    Outcome.PROMPT_TOKENS,
)
"""Endings on a budget instead of an answer: the trajectories `advantage.on_truncated` speaks of."""


@dataclass
class Scored:
    """A finished trajectory and what it earned."""

    trajectory: Trajectory
    components: dict[str, float]
    reward: float
    kl: float = 0.0
    """KL to the reference as sampled, where `advantage.kl_coef` charges for it."""

    @property
    def is_truncated(self) -> bool:
        """Ended on a budget instead of an answer."""
        return self.trajectory.outcome in BUDGETS

    @property
    def is_malformed(self) -> bool:
        """Never a well-formed tool call or answer."""
        return all(
            isinstance(record.reply.action, ParseError) for record in self.trajectory.env.records
        )

    @property
    def is_right(self) -> bool:
        """Right in execution and in structure."""
        return bool(self.components["ex"] and self.components["em"])

    def readable(self) -> dict:
        """As text, for the run folder's best and worst."""
        turn, env = self.trajectory.turn, self.trajectory.env
        return {
            "turn_id": turn.turn_id,
            "question": turn.question,
            "gold_sql": turn.sql,
            "reward": self.reward,
            "components": self.components,
            "outcome": env.outcome.value,
            "final_sql": env.final_sql,
            "transcript": env.transcript(),
        }


@dataclass(frozen=True)
class Player:
    """Everything that stays the same between two rollouts of a run."""

    bench: Workbench
    model: ModelConfig
    engine: EngineConfig
    sampling: SamplingConfig
    reward: RewardConfig
    max_prompt_tokens: int
    seed: int

    def play(
        self, turns: list[Turn], split: str, *, num_samples: int, update: int
    ) -> tuple[list[list[Scored]], Engine]:
        """Roll out a group of `num_samples` episodes for each turn with the current policy and
        score every one. No collective inside, but with sharded weights every rank must come."""
        bench = self.bench
        with generation_weights(bench.policy, self.model.compute_dtype) as model:
            engine = Engine(model, bench.renderer.stop_ids, self.sampling, self.engine)
            scored = rollout(
                engine,
                bench.renderer,
                turns,
                bench.env_maker(split),
                num_samples=num_samples,
                seed=self.seed,
                update=update,
                max_prompt_tokens=self.max_prompt_tokens,
                judge=self._score,
            )
        groups = [scored[i : i + num_samples] for i in range(0, len(scored), num_samples)]
        for group in groups:
            self._add_group_rewards(group)
        return groups, engine

    def _add_group_rewards(self, group: list[Scored]) -> None:
        """Add the components that need the whole group, once all of its episodes are finished."""
        trajectories = [one.trajectory for one in group]
        parts = group_components(trajectories, self.reward)
        for one, extra in zip(group, parts, strict=True):
            one.components |= extra
            one.reward += total_reward(extra, self.reward.weights)

    def _score(self, trajectory: Trajectory) -> Scored:
        parts = reward_components(trajectory, self.reward)
        return Scored(trajectory, parts, total_reward(parts, self.reward.weights))

    def held_out(
        self, accelerator: Accelerator, log: RunLog, update: int, max_turns: int
    ) -> dict[str, float]:
        """Greedy EX and EM with gold history over all ranks, in domain (`dev_seen`) and out of
        domain (`dev`); returns EX by split."""
        greedy, summary, bench = (
            replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0),
            {},
            self.bench,
        )
        with generation_weights(bench.policy, self.model.compute_dtype) as model:
            for split in [name for name in bench.corpora if name != "train"]:
                turns = bench.corpora[split].turns[: max_turns or None]
                engine = Engine(model, bench.renderer.stop_ids, greedy, self.engine)
                scores, _ = evaluate(
                    engine,
                    bench.renderer,
                    turns[accelerator.process_index :: accelerator.num_processes],
                    bench.env_maker(split),
                    max_prompt_tokens=self.max_prompt_tokens,
                )
                scores = gather_list(accelerator, scores)
                summary[split] = summarize(scores)
                log.write_json(
                    f"eval/{split}-{update:05d}.json",
                    {**summary[split], "turns": scores_as_rows(scores)},
                )
        log.metrics(
            {
                "stage": "eval",
                "update": update,
                **{
                    f"{split}_{name}": value["all"][name]
                    for split, value in summary.items()
                    for name in ("ex", "em")
                },
            }
        )
        for split, value in summary.items():
            log.print(
                f"update {update}: {split} EX {value['all']['ex']:.1f} EM {value['all']['em']:.1f} "
                f"({value['all']['count']} turns)"
            )
        return {split: value["all"]["ex"] for split, value in summary.items()}


def probe(
    player: Player, settings: CurriculumConfig, accelerator: Accelerator, log: RunLog
) -> Curriculum:
    """Count successes (EX and EM) of the warm-started policy on training turns and sort them into
    stages."""
    turns = list(player.bench.corpora["train"].turns)
    random.Random(player.seed).shuffle(turns)
    if not settings.probe_samples:
        return build_curriculum({t.turn_id: (0, 0) for t in turns}, settings, player.seed)
    turns = turns[: settings.max_probe_turns or None]
    mine, counts = turns[accelerator.process_index :: accelerator.num_processes], []
    n, at_once = settings.probe_samples, 64
    longest = -(
        -len(turns) // accelerator.num_processes
    )  # as many rounds on every rank: each gathers the weights
    for start in log.progress(range(0, longest, at_once), "probe"):
        part = mine[start : start + at_once]
        groups, _ = player.play(part, "train", num_samples=n, update=2**31)
        counts += [
            (t.turn_id, (sum(s.is_right for s in g), n)) for t, g in zip(part, groups, strict=True)
        ]
    return build_curriculum(dict(gather_list(accelerator, counts)), settings, player.seed)


def roll_out(
    accelerator: Accelerator,
    picked: list[str],
    play: Callable[[list[str]], tuple[list[list[Scored]], Engine]],
    config: AdvantageConfig,
    *,
    refill: Callable[[int, list[str]], list[str]],
    resample_rounds: int,
) -> tuple[list[list[Scored]], dict[str, float]]:
    """This rank's groups of an update (whole ones, its share of the turns), and what all ranks did
    for them.

    `play(turn ids)` rolls out and scores. As often as `resample_rounds` allows, `refill(number,
    turns tried)` names as many others as there are too few groups in which anybody has an
    advantage. The ranks count those together between two rollouts, then all play, a rank without a
    turn too: none waits for another inside generation.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    groups, tried, now, sums = [], [], picked, {"computed": 0.0, "distinct": 0.0, "found": 0.0}
    before = sandbox_counts()
    for number in range(resample_rounds + 1):
        new, engine = play(now[rank::world])
        groups, tried = groups + new, tried + now
        sums["computed"] += engine.tokens_computed
        sums["distinct"] += engine.tokens_distinct
        sums["found"] += sum(has_signal(group, config) for group in new)
        sums |= {name: float(count - before[name]) for name, count in sandbox_counts().items()}
        total = sum_over_ranks(accelerator, sums)
        now = refill(len(picked) - int(total["found"]), tried) if number < resample_rounds else []
        if not now:
            break
    metrics = {
        "rollout_computed_per_distinct": total["computed"] / max(1.0, total["distinct"]),
        "zero_variance_frac": 1 - total["found"] / len(tried),
        "sql_deadlines": int(total["deadline"]),
        "sql_workers_died": int(total["died"]),
    }
    if resample_rounds:
        metrics |= {
            "resample/rounds": number,
            "resample/groups_sampled": len(tried),
            "resample/groups_kept": int(total["found"]),
        }
    return groups, metrics


def measure_kl(
    groups: list[list[Scored]],
    config: AdvantageConfig,
    with_reference: Callable[[list[Sample]], list[Sample]],
) -> None:
    """Measure each trajectory's KL to the reference, from the log-probs it was sampled at, for
    `compare` to charge."""
    scored = [s for group in groups for s in group]
    for s, sample in zip(
        scored, with_reference([s.trajectory.to_sample([]) for s in scored]), strict=True
    ):
        s.kl = kl_penalty(
            sample.old_logprobs, sample.ref_logprobs, sample.loss_mask, config.kl_estimator
        )


def compare(
    accelerator: Accelerator, groups: list[list[Scored]], config: AdvantageConfig
) -> list[Sample]:
    """This rank's samples with their advantages among the groups of all ranks; all of them count in
    the denominator.

    Left out: what `config` masks or drops, trajectories without a sampled token and, if
    `config.zero_variance` is drop, groups in which nobody has an advantage.
    """
    rank = accelerator.process_index
    everyone = gather_list(accelerator, [(rank, *_earned(group, config)) for group in groups])
    advantages = batch_advantages(
        [rewards for _, rewards, _ in everyone], config, [treatments for *_, treatments in everyone]
    )
    mine = [values for (r, *_), values in zip(everyone, advantages, strict=True) if r == rank]
    return [
        s.trajectory.to_sample([a] * len(s.trajectory.ids))
        for group, values in zip(groups, mine, strict=True)
        for s, a in zip(group, values, strict=True)
        if a is not None
        and s.trajectory.num_sampled
        and (any(values) or config.zero_variance == "count")
    ]


def has_signal(group: list[Scored], config: AdvantageConfig) -> bool:
    """Whether anybody in the group has an advantage."""
    rewards, treatments = _earned(group, config)
    return any(batch_advantages([rewards], config, [treatments])[0])


def _earned(group: list[Scored], config: AdvantageConfig) -> tuple[list[float], list[str]]:
    """(reward less the price of its KL, keep / mask / drop) of each trajectory."""
    return [s.reward - config.kl_coef * s.kl for s in group], [
        treatment(s.is_truncated, s.is_malformed, config) for s in group
    ]


def update_metrics(
    accelerator: Accelerator,
    groups: list[list[Scored]],
    samples: list[Sample],
    steps: list[dict[str, float]],
    config: AdvantageConfig,
    engine_gap: float | None = None,
) -> dict[str, float | None]:
    """Means over all ranks of what an update saw and did; every reward component, outcome and way
    to be left out by name, and how many queries a trajectory's tools ran, by status. `samples` are
    those that were worth a forward. Of `steps`, what the optimizer steps returned, token means and
    the mean loss and norm; `engine_gap` is the log-prob gap of the first unless it was measured
    before."""
    scored = [s for group in groups for s in group]
    sums = {
        "n": float(len(scored)),
        "num_samples": float(len(samples)),
        "reward": sum(s.reward for s in scored),
        "reward_sq": sum(s.reward**2 for s in scored),
        "reward_kl": sum(s.kl for s in scored),
        "sampled": float(sum(s.trajectory.num_sampled for s in scored)),
        "trained": float(sum(s.num_trained for s in samples)),
        "truncated": sum(s.is_truncated for s in scored),
        "malformed": sum(s.is_malformed for s in scored),
    }
    for s in scored:
        for name, value in s.components.items():
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + value
        queries = [
            f"queries/{step.status.value}"
            for step in s.trajectory.env.records
            if step.status is not None
        ]
        for key in (
            f"outcome/{s.trajectory.outcome.value}",
            treatment(s.is_truncated, s.is_malformed, config),
            *queries,
        ):
            sums[key] = sums.get(key, 0.0) + 1
    sums = sum_over_ranks(accelerator, sums)
    n = sums["n"]
    metrics = {k: v / n for k, v in sums.items() if k == "reward" or "/" in k}
    metrics["reward_std"] = math.sqrt(max(0.0, sums["reward_sq"] / n - metrics["reward"] ** 2))
    if config.kl_coef:
        metrics["reward_kl"] = sums["reward_kl"] / n
    taken = [stats for stats in steps if stats]
    total = {name: sum(stats[name] for stats in taken) for name in (taken[0] if taken else ())}
    if engine_gap is None and taken:
        engine_gap = taken[0]["logprob_gap"] / taken[0]["num_tokens"]
    whole = ("loss", "grad_norm", "num_computed", "num_distinct", "num_tokens")
    return {
        **metrics,
        **{f"loss/{k}": v / total["num_tokens"] for k, v in total.items() if k not in whole},
        **{k: total[k] / len(taken) if taken else None for k in ("loss", "grad_norm")},
        "num_steps": len(taken),
        "engine_gap": engine_gap,
        "num_tokens": sums["trained"],
        "kept_frac": sums["num_samples"] / n,
        "response_tokens": sums["sampled"] / n,
        **{f"{k}_frac": sums[k] / n for k in ("truncated", "malformed")},
        "masked_frac": sums.get("mask", 0.0) / n,
        "dropped_frac": sums.get("drop", 0.0) / n,
        "learn_computed_per_distinct": total["num_computed"] / total["num_distinct"]
        if taken
        else None,
    }
