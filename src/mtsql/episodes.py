"""Play episodes and score them, compare siblings, describe both: what train_rl.py does besides learning."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from mtsql.agent.env import Outcome
from mtsql.evaluate import evaluate, scores_as_rows, summarize
from mtsql.learner import gather_list, sum_over_ranks
from mtsql.llm.engine import Engine, EngineLimits, Sampling
from mtsql.llm.model import ModelConfig, generation_weights
from mtsql.llm.packing import Sample
from mtsql.rl.advantages import AdvantageConfig, batch_advantages, overlong_penalty
from mtsql.rl.rewards import RewardConfig, reward_components, total_reward
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.runlog import RunLog
from mtsql.sql.database import QueryLimits
from mtsql.sql.dialogues import Turn
from mtsql.workbench import Workbench

BUDGETS = (
    Outcome.MAX_STEPS, Outcome.STEP_TOKENS, Outcome.TRAJECTORY_TOKENS, Outcome.OBSERVATION_TOKENS, Outcome.PROMPT_TOKENS
)  # fmt: skip
"""Endings on a budget instead of an answer: the trajectories `advantage.cut` speaks of."""


@dataclass
class Scored:
    """A finished trajectory and what it earned."""

    trajectory: Trajectory
    components: dict[str, float]
    reward: float

    @property
    def is_right(self) -> bool:
        """Right in execution and in structure."""
        return bool(self.components["ex"] and self.components["em"])

    def readable(self) -> dict:
        """As text, for the run folder's best and worst."""
        turn, env = self.trajectory.turn, self.trajectory.env
        return {
            "turn_id": turn.turn_id, "question": turn.question, "gold_sql": turn.sql, "reward": self.reward,
            "components": self.components, "outcome": env.outcome.value, "final_sql": env.final_sql,
            "transcript": env.transcript(),
        }  # fmt: skip


@dataclass(frozen=True)
class Player:
    """Everything that stays the same between two rollouts of a run."""

    bench: Workbench
    model: ModelConfig
    engine: EngineLimits
    sampling: Sampling
    reward: RewardConfig
    max_prompt_tokens: int
    seed: int

    def play(
        self, turns: list[Turn], split: str, *, num_samples: int, update: int
    ) -> tuple[list[list[Scored]], Engine]:
        """Roll out a group of `num_samples` episodes for each turn with the current policy and score every one. No
        collective inside, but with sharded weights every rank must come."""
        bench, corpus = self.bench, self.bench.corpora[split]
        with generation_weights(bench.policy, self.model.compute_dtype) as model:
            engine = Engine(model, bench.renderer.stop_ids, self.sampling, self.engine)
            trajectories = rollout(
                engine, bench.renderer, turns, bench.env_maker(split), num_samples=num_samples, seed=self.seed,
                update=update, max_prompt_tokens=self.max_prompt_tokens,
            )  # fmt: skip
        scored = [self._score(t, corpus.schemas[t.turn.db_id], corpus.db_paths[t.turn.db_id]) for t in trajectories]
        return [scored[i : i + num_samples] for i in range(0, len(scored), num_samples)], engine

    def _score(self, trajectory: Trajectory, schema, db_path: Path) -> Scored:
        parts = reward_components(trajectory.env, trajectory.turn, schema, db_path, self.reward, QueryLimits())
        reward = total_reward(parts, self.reward.weights)
        if self.reward.overlong_buffer:
            reward += overlong_penalty(
                len(trajectory.ids), self.sampling.max_trajectory_tokens, self.reward.overlong_buffer
            )
        return Scored(trajectory, parts, reward)

    def held_out(self, accelerator: Accelerator, log: RunLog, update: int, max_turns: int) -> dict[str, float]:
        """Greedy EX and EM with gold history over all ranks, in domain (`dev_seen`) and out of domain (`dev`); returns
        EX by split."""
        greedy, summary, bench = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0), {}, self.bench
        with generation_weights(bench.policy, self.model.compute_dtype) as model:
            for split in [name for name in bench.corpora if name != "train"]:
                turns = bench.corpora[split].turns[: max_turns or None]
                engine = Engine(model, bench.renderer.stop_ids, greedy, self.engine)
                scores, _ = evaluate(
                    engine, bench.renderer, bench.corpora[split],
                    turns[accelerator.process_index :: accelerator.num_processes], bench.env_maker(split),
                    max_prompt_tokens=self.max_prompt_tokens, limits=QueryLimits(),
                )  # fmt: skip
                scores = gather_list(accelerator, scores)
                summary[split] = summarize(scores)
                log.write_json(f"eval/{split}-{update:05d}.json", {**summary[split], "turns": scores_as_rows(scores)})
        log.metrics({"stage": "eval", "update": update, **{f"{split}_{name}": value["all"][name]
                     for split, value in summary.items() for name in ("ex", "em")}})  # fmt: skip
        for split, value in summary.items():
            log.print(f"update {update}: {split} EX {value['all']['ex']:.1f} EM {value['all']['em']:.1f} "
                      f"({value['all']['count']} turns)")  # fmt: skip
        return {split: value["all"]["ex"] for split, value in summary.items()}


def compare(
    accelerator: Accelerator, groups: list[list[Scored]], config: AdvantageConfig, keep_equal: bool
) -> list[Sample]:
    """This rank's samples with their advantages among the groups of all ranks.

    Left out: what `config.cut` masks or drops, trajectories without a sampled token and, unless `keep_equal` (a KL or
    entropy term learns from them too), those without an advantage, as all have in a group of equal rewards.
    """
    rank = accelerator.process_index
    mine = [(rank, [s.reward for s in g], [s.trajectory.outcome in BUDGETS for s in g]) for g in groups]
    everyone = gather_list(accelerator, mine)
    advantages = batch_advantages([rewards for _, rewards, _ in everyone], config, [cuts for _, _, cuts in everyone])
    mine = [values for (r, *_), values in zip(everyone, advantages, strict=True) if r == rank]
    kept = []
    for group, values in zip(groups, mine, strict=True):
        for s, a in zip(group, values, strict=True):
            if a is not None and s.trajectory.num_sampled and (keep_equal or any(values)):
                kept.append(s.trajectory.to_sample([a] * len(s.trajectory.ids)))
    return kept


def update_metrics(
    accelerator: Accelerator,
    groups: list[list[Scored]],
    samples: list[Sample],
    stats: dict[str, float],
    num_tokens: float,
    engine: Engine,
) -> dict[str, float | None]:
    """Means over all ranks of what an update saw; every reward component and outcome by name."""
    scored = [s for group in groups for s in group]
    sums = {"n": float(len(scored)), "num_samples": float(len(samples)), "reward": sum(s.reward for s in scored),
            "reward_sq": sum(s.reward**2 for s in scored),
            "sampled": float(sum(s.trajectory.num_sampled for s in scored)),
            "tokens_computed": float(engine.tokens_computed), "tokens_distinct": float(engine.tokens_distinct)}  # fmt: skip
    for s in scored:
        for name, value in s.components.items():
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + value
        key = f"outcome/{s.trajectory.outcome.value}"
        sums[key] = sums.get(key, 0.0) + 1
    sums = sum_over_ranks(accelerator, sums)
    n = sums["n"]
    metrics = {k: v / n for k, v in sums.items() if k == "reward" or "/" in k}
    metrics["reward_std"] = math.sqrt(max(0.0, sums["reward_sq"] / n - metrics["reward"] ** 2))
    whole = ("loss", "grad_norm", "num_computed", "num_distinct")
    return {
        **metrics, **{f"loss/{k}": v / num_tokens for k, v in stats.items() if k not in whole},
        "loss": stats.get("loss"), "grad_norm": stats.get("grad_norm"), "num_tokens": num_tokens,
        "kept_frac": sums["num_samples"] / n, "response_tokens": sums["sampled"] / n,
        "rollout_computed_per_distinct": sums["tokens_computed"] / max(1.0, sums["tokens_distinct"]),
        "learn_computed_per_distinct": stats["num_computed"] / stats["num_distinct"] if stats else None,
    }  # fmt: skip
