"""Stage 1, self-taught warm start: keep what the model got right, and choose by difficulty (paper
section 3.1).

Rollouts that are right in execution and in structure are kept. For a turn that is easy or always
solved, up to two with few interactions are chosen. For any other turn those with many interactions
are clustered by an embedding, and three that differ are chosen. They are added to the training data
of all later rounds. Solved turns are not rolled out again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtsql.choices import require_choices
from mtsql.rl.kmeans import medoids
from mtsql.rl.trajectory import Trajectory

Embed = Callable[[list[Trajectory]], np.ndarray]
"""Maps N trajectories to points (N, width); see embeddings.py."""


@dataclass(frozen=True)
class SelfTaughtConfig:
    """Collecting and selecting (paper section 3.2)."""

    rounds: int = 3
    """Number of rounds of collect, select, train, leave out the solved turns."""
    samples_per_turn: int = 20
    """Rollouts per turn and round."""
    temperature: float = 0.7
    """Sampling temperature while collecting."""
    guard: bool = False
    """Whether a rollout must also be right on altered copies of its database (judge/guard.py), so
    that it is not right by accident. The paper has no such guard. It costs time on SQL workers and
    keeps fewer rollouts."""
    start: Literal["policy", "first", "base"] = "policy"
    """The weights that a round's SFT starts from. policy: those that sampled (algorithm 1). first:
    those after the first round, which itself starts from the base model. base: the base model.
    Adam starts afresh in each round."""
    eval_split: Literal["dev", "dev_seen", "held_out"] | None = "dev"
    """The split that the model of each round is scored on, greedily and with gold history. Nothing
    is selected by it. null: none."""
    eval_turns: int = 0
    """Score at most this many of its turns, in dialogues about different databases as far as there
    are any. 0: all."""
    max_easy: int = 2
    """Maximum number of trajectories kept for a turn that is easy or was always solved: those with
    the fewest interactions."""
    max_easy_interactions: int = 2
    """Such a turn's trajectories have at most this many interactions (tool results that the model
    has read). If each of them has more, those with the fewest are kept all the same, because a
    solved turn is not rolled out again."""
    max_hard: int = 3
    """Maximum number of trajectories kept for any other solved turn: one of each cluster."""
    min_hard_interactions: int = 2
    """Such a turn's trajectories have at least this many interactions. If none of them has, all are
    clustered."""
    embedding: str = "policy"
    """What is clustered. policy: the mean of the policy's last hidden states over the tokens that
    it sampled. counts: token counts, which cost nothing. Anything else is the folder of a
    sentence-embedding model."""

    def __post_init__(self) -> None:
        names = ("rounds", "samples_per_turn", "max_easy", "max_hard")
        for name in names:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"selftaught.{name} is {value}: it must be at least 1")
        require_choices(self, "selftaught")
        for name in ("max_easy_interactions", "min_hard_interactions", "eval_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"selftaught.{name} must not be negative")
        if self.temperature <= 0:
            raise ValueError(
                "selftaught.temperature must be above 0: rollouts of one turn would all be equal"
            )
        if not self.embedding:
            raise ValueError("selftaught.embedding is empty: policy, counts or a folder")


def select(
    rollouts: list[Trajectory],
    is_valid: list[bool],
    is_easy: bool,
    config: SelfTaughtConfig,
    seed: int,
    embed: Embed,
) -> list[Trajectory]:
    """Choose from one turn's rollouts by difficulty, in the order of `rollouts`. `is_valid[i]` says
    whether rollout i is right in execution and in structure. Of rollouts with the same tokens only
    the first counts.

    A turn that is easy, or whose rollouts are all valid: the `max_easy` ones with the fewest
    interactions, and with `max_easy_interactions` at most. The seed breaks ties.

    Any other turn: all rollouts with at least `min_hard_interactions` are embedded and clustered by
    k-means with k = `max_hard`, and the medoid of each cluster is chosen. If there are no more than
    `max_hard`, all of them are chosen, and `embed` is not called.

    A turn with a valid rollout always gives at least one trajectory. The two limits on interactions
    do not apply where no valid rollout keeps to them: the turn would be taken out of the data
    without having been learned. (The paper does not say what it does there.)
    ValueError for vectors that are not finite.
    """
    distinct: dict[tuple[int, ...], Trajectory] = {}
    for trajectory, is_right in zip(rollouts, is_valid, strict=True):
        if is_right:
            distinct.setdefault(tuple(trajectory.ids), trajectory)
    valid = list(distinct.values())
    if is_easy or all(is_valid):
        few = [t for t in valid if num_interactions(t) <= config.max_easy_interactions]
        return _shortest(few or valid, config.max_easy, seed)
    many = [t for t in valid if num_interactions(t) >= config.min_hard_interactions]
    candidates = many or valid
    if len(candidates) <= config.max_hard:
        return candidates
    points = embed(candidates)
    if not np.isfinite(points).all():
        raise ValueError(
            f"selftaught.embedding {config.embedding}: a vector has a number that is not finite"
        )
    chosen = medoids(points, config.max_hard, seed)
    return [candidates[place] for place in chosen]


def num_interactions(trajectory: Trajectory) -> int:
    """Number of tool results that the model has read: all of its replies but the last got one. (The
    paper counts interactions of agent and tool and does not define them.) So a question that is
    answered after one query has 1, and one that is also checked against the memory has 2."""
    return max(0, len(trajectory.reply_spans) - 1)


def _shortest(trajectories: list[Trajectory], max_chosen: int, seed: int) -> list[Trajectory]:
    """The ones with the fewest interactions, in their order. The seed breaks ties."""
    places = list(range(len(trajectories)))
    random.Random(seed).shuffle(places)
    places.sort(key=lambda place: num_interactions(trajectories[place]))
    return [trajectories[place] for place in sorted(places[:max_chosen])]
