"""Collect trajectories with the current policy and score them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtsql.agent.env import SqlEnv
from mtsql.engine.counts import EngineCounts
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.model.flops import ModelFlops
from mtsql.model.policy import generation_weights
from mtsql.model.rendering import Renderer
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.curriculum import Curriculum, CurriculumConfig
from mtsql.rl.evaluate import TurnScore, evaluate
from mtsql.rl.rewards import (
    RewardConfig,
    RewardWeights,
    group_components,
    process_so_far,
    reward_components,
    total_reward,
)
from mtsql.rl.rollout import Show, rollout, show_nothing, show_part
from mtsql.rl.rollout_metrics import Metric, RolloutCounts, rollout_metrics
from mtsql.rl.samples import has_signal
from mtsql.rl.scored import Group, Scored, num_right, turn_of
from mtsql.rl.sweep import Sweep, Swept, chunks_of, sweep, sweep_key
from mtsql.rl.trajectory import Trajectory
from mtsql.run.ranks import Ranks
from mtsql.sql.dialogues import Corpus, Turn

PROBE_UPDATE = 2**31
"""The update number of the probe's random numbers, which no training update has. The probe counts
right answers and uses no reward."""


Played = tuple[Trajectory, TurnScore]
"""An episode of an evaluation, and how it was scored."""


@dataclass(frozen=True)
class Collector:
    """The policy, the environments, the engine's configuration and the reward: what stays the same
    from one rollout of a run to the next."""

    ranks: Ranks
    policy: torch.nn.Module
    compute_dtype: torch.dtype
    renderer: Renderer
    corpora: dict[str, Corpus]
    """The splits by name."""
    env_maker: Callable[[str], Callable[[Turn], SqlEnv]]
    """From the name of a split to a function that makes a fresh environment for a turn of it."""
    engine: EngineConfig
    sampling: SamplingConfig
    reward: RewardConfig
    advantage: AdvantageConfig
    group_size: int
    resample_rounds: int
    max_prompt_tokens: int
    seed: int
    flops: ModelFlops
    """Operations of the policy, for the metrics."""

    def collect(
        self,
        picked: list[str],
        curriculum: Curriculum,
        update: int,
        num_updates: int,
        show: Show = show_nothing,
    ) -> tuple[list[Group], dict[str, Metric]]:
        """This rank's groups of an update, scored, and metrics of the rollouts of all ranks.

        `picked` are the ids of the update's turns. Each rank rolls out its share of them as whole
        groups. If a group has no signal (no trajectory in it has an advantage), a group of another
        turn of the stage is added, in up to `resample_rounds` further rounds. The ranks count such
        groups together between two rounds, and a rank without a turn enters each round too. So no
        rank waits for another inside generation.
        """
        turns = {turn.turn_id: turn for turn in self.corpora["train"].turns}
        groups: list[Group] = []
        tried: list[str] = []
        counts = RolloutCounts()
        turn_ids = picked  # those of the next rollout
        with self.new_engine(self.sampling) as engine:
            for num_resampled in range(self.resample_rounds + 1):
                mine = [turns[turn_id] for turn_id in self.ranks.share(turn_ids)]
                new, new_counts = self.play(
                    engine, mine, "train", num_samples=self.group_size, update=update, show=show
                )
                groups += new
                tried += turn_ids
                counts.add(new_counts, sum(has_signal(group, self.advantage) for group in new))
                total = self.ranks.sum(counts.values())
                num_missing = len(picked) - int(total["with_signal"])
                if num_resampled == self.resample_rounds:
                    break
                turn_ids = curriculum.resample(update, num_updates, num_missing, tried)
                if not turn_ids:  # every group has a signal, or the stage has no further turn
                    break
        metrics = {
            **rollout_metrics(total, self.flops, self.ranks.count),
            "zero_variance_frac": 1 - total["with_signal"] / len(tried),
            "sql_deadlines": int(total["deadline"]),
            "sql_workers_died": int(total["died"]),
        }
        if self.reward.process_from:
            metrics["process_on"] = int(update >= self.reward.process_from)
        if self.resample_rounds:
            metrics["resample/rounds"] = num_resampled
            metrics["resample/groups_sampled"] = len(tried)
            metrics["resample/groups_kept"] = int(total["with_signal"])
        return groups, metrics

    @contextmanager
    def new_engine(self, sampling: SamplingConfig) -> Iterator[Engine]:
        """An engine for the current weights, with an empty cache. It must not be used after the
        `with`, since the weights may change or be freed then.

        With sharded weights all ranks must enter together.
        """
        with generation_weights(self.policy, self.compute_dtype) as model:
            yield Engine(model, self.renderer.stop_ids, sampling, self.engine)

    def play(
        self,
        engine: Engine,
        turns: list[Turn],
        split: str,
        *,
        num_samples: int,
        update: int,
        show: Show = show_nothing,
    ) -> tuple[list[Group], EngineCounts]:
        """Roll out and score a group of `num_samples` episodes for each turn, with the weights that
        the rewards have at this update. Returns the groups and what the engine has done for them.
        No rank waits for another inside."""
        before = replace(engine.counts)
        weights = self.reward.weights_at(update)
        scored = rollout(
            engine,
            self.renderer,
            turns,
            self.env_maker(split),
            num_samples=num_samples,
            seed=self.seed,
            update=update,
            max_prompt_tokens=self.max_prompt_tokens,
            judge=partial(self._score, weights=weights),
            show=show,
        )
        starts = range(0, len(scored), num_samples)
        groups = [scored[start : start + num_samples] for start in starts]
        for group in groups:
            self._add_group_components(group, weights)
        return groups, engine.counts - before

    def _score(self, trajectory: Trajectory, weights: RewardWeights) -> Scored:
        """The trajectory with its own components; those of its group are added later."""
        components = reward_components(trajectory, self.reward)
        scored = Scored(trajectory, components, total_reward(components, weights))
        if self.advantage.credit == "reply":
            scored.so_far, scored.is_paid = process_so_far(trajectory, self.reward, weights)
        return scored

    def _add_group_components(self, group: Group, weights: RewardWeights) -> None:
        """Add the components that need the whole group, when all of its episodes are finished."""
        trajectories = [one.trajectory for one in group]
        components = group_components(trajectories, self.reward)
        for one, values in zip(group, components, strict=True):
            one.components |= values
            one.reward += total_reward(values, weights)

    def probe(
        self, config: CurriculumConfig, folder: Path, show: Show = show_nothing
    ) -> tuple[dict[str, tuple[int, int]], Swept]:
        """Turn id -> (successes, attempts) of the current policy, for the turns of all ranks. A
        success is right in execution and in structure. Finished chunks are kept in `folder`."""
        turns = list(self.corpora["train"].turns)
        random.Random(self.seed).shuffle(turns)

        def count(groups: list[Group], engine: Engine) -> list[tuple[str, int, int]]:
            return [(turn_of(group), num_right(group), len(group)) for group in groups]

        swept = self.sweep(
            turns[: config.max_probe_turns or None],
            count,
            name="probe",
            folder=folder,
            num_samples=config.probe_samples,
            update=PROBE_UPDATE,
            show=show,
        )
        counts = {turn_id: (right, num) for part in swept.found for turn_id, right, num in part}
        return counts, swept

    def sweep(
        self,
        turns: list[Turn],
        find: Callable[[list[Group], Engine], Any],
        *,
        name: str,
        folder: Path,
        num_samples: int,
        update: int,
        check: Callable[[list[Any]], None] | None = None,
        show: Show = show_nothing,
    ) -> Swept:
        """Play `num_samples` episodes of each turn with the current policy, in chunks (sweep.py).

        `find(groups, engine)` returns what is kept of a chunk, as JSON. All ranks must call this.
        """
        chunks = chunks_of(turns, self.seed)

        def play(chunk: list[Turn], show_chunk: Show) -> Any:
            groups, _ = self.play(
                engine,
                chunk,
                "train",
                num_samples=num_samples,
                update=update,
                show=show_chunk,
            )
            return find(groups, engine)

        settings = {
            "seed": self.seed,
            "update": update,
            "num_samples": num_samples,
            "max_prompt_tokens": self.max_prompt_tokens,
            "sampling": asdict(self.sampling),
            "reward": asdict(self.reward),
        }
        with self.new_engine(self.sampling) as engine:
            key = sweep_key(engine.model, chunks, settings)
            plan = Sweep(name, folder, key, chunks, num_samples)
            return sweep(plan, engine, play, self.ranks, check=check, show=show)

    def evaluate_held_out(
        self, max_turns: int, show: Show = show_nothing
    ) -> tuple[dict[str, list[TurnScore]], EngineCounts, dict[str, list[Played]]]:
        """The scores of all ranks for each split other than train, what this rank's engines have
        counted, and this rank's trajectories of each split, with their scores: greedy episodes with
        gold history. At most `max_turns` turns of a split are played (0 = all): those of
        `Corpus.sample_turns`, which reaches as many databases as their dialogues can."""
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0)
        turns_of = {
            split: self.ranks.share(corpus.sample_turns(max_turns))
            for split, corpus in self.corpora.items()
            if split != "train"
        }
        num_all = sum(len(turns) for turns in turns_of.values())
        num_done = 0
        scores = {}
        played = {}
        with self.new_engine(greedy) as engine:
            for split, turns in turns_of.items():
                mine, trajectories = evaluate(
                    engine,
                    self.renderer,
                    turns,
                    self.env_maker(split),
                    max_prompt_tokens=self.max_prompt_tokens,
                    show=show_part(show, num_done, num_all),
                )
                num_done += len(turns)
                scores[split] = self.ranks.gather(mine)
                played[split] = list(zip(trajectories, mine, strict=True))
        return scores, engine.counts, played
