"""Stage 1, self-taught warm start: keep what the model got right, and choose by difficulty (paper
section 3.1).

Rollouts that are right in execution and in structure are kept. For a turn that is easy or always
solved, up to two short ones are chosen, and for any other turn three long ones that differ. They
are added to the training data of all later rounds. Solved turns are not rolled out again.
"""

import random
from collections import Counter
from dataclasses import dataclass

from mtsql.rl.trajectory import Trajectory


@dataclass(frozen=True)
class SelfTaughtConfig:
    """Collecting and selecting (paper section 3.2)."""

    rounds: int = 3
    """Number of rounds of collect, select, train, leave out the solved turns."""
    samples_per_turn: int = 20
    """Rollouts per turn and round."""
    temperature: float = 0.7
    """Sampling temperature while collecting."""
    max_easy: int = 2
    """Maximum number of trajectories kept for a turn that is easy or was always solved."""
    max_hard: int = 3
    """Maximum number of trajectories kept for any other solved turn."""

    def __post_init__(self) -> None:
        for name in ("rounds", "samples_per_turn", "max_easy", "max_hard"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"selftaught.{name} is {value}: it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                "selftaught.temperature must be above 0: rollouts of one turn would all be equal"
            )


def select(
    rollouts: list[Trajectory],
    is_valid: list[bool],
    is_easy: bool,
    config: SelfTaughtConfig,
    seed: int,
) -> list[Trajectory]:
    """Choose from one turn's rollouts by difficulty. `is_valid[i]` says whether rollout i is right
    in execution and in structure.

    The seed breaks ties. Long rollouts are chosen one by one: the next one is as long as possible
    and, among equally long ones, least similar to those already chosen. (Similarity compares token
    counts; the paper clusters sentence embeddings.)
    """
    valid = [trajectory for trajectory, ok in zip(rollouts, is_valid, strict=True) if ok]
    random.Random(seed).shuffle(valid)
    if is_easy or all(is_valid):
        return sorted(valid, key=lambda t: len(t.reply_spans))[: config.max_easy]
    chosen: list[Trajectory] = []
    rest = sorted(valid, key=lambda t: -len(t.reply_spans))
    while rest and len(chosen) < config.max_hard:
        best = min(rest, key=lambda t: (-len(t.reply_spans), _similarity_to_any(t, chosen)))
        chosen.append(best)
        rest = [trajectory for trajectory in rest if trajectory.ids != best.ids]
    return chosen


def _similarity_to_any(trajectory: Trajectory, others: list[Trajectory]) -> float:
    """Similarity to the most similar one of the others; 0 if there are none."""
    return max((_similarity(trajectory, other) for other in others), default=0.0)


def _similarity(a: Trajectory, b: Trajectory) -> float:
    """Cosine similarity of the two trajectories' sampled token counts, in [0, 1]."""
    x, y = _sampled_counts(a), _sampled_counts(b)
    dot = sum(x[token] * y[token] for token in x)
    squares_x = sum(count * count for count in x.values())
    squares_y = sum(count * count for count in y.values())
    return dot / (squares_x * squares_y) ** 0.5 if dot else 0.0


def _sampled_counts(trajectory: Trajectory) -> Counter[int]:
    pairs = zip(trajectory.ids, trajectory.loss_mask, strict=True)
    return Counter(token for token, is_sampled in pairs if is_sampled)
