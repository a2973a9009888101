"""Which turns to train on, and when: success counts, stages from easy to hard.

Paper section 4.1: the warm-started policy samples every training turn n times; a turn it always solves is dropped, the
others are bucketed by how often it succeeded and trained from often to rarely, in three stages.
"""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CurriculumConfig:
    """Buckets and their share of the updates. Bucket limits are ours (the paper gives none), as
    success fractions."""

    probe_samples: int = 20
    """Rollouts per training turn before the first update, to count successes (paper: 20). 0 skips
    the probe: one stage holds every turn."""
    max_probe_turns: int = 0
    """Probe at most this many training turns, drawn by the seed (0 = all)."""
    bounds: tuple[float, ...] = (0.7, 0.35, 0.0)
    """A turn belongs to the first stage whose bound its success fraction reaches (paper counts
    14-19, 7-13, 0-6)."""
    shares: tuple[float, ...] = (0.4, 0.4, 0.2)
    """Share of the updates each stage gets (paper: 60, 60 and 30 of 150 steps)."""
    drop_solved: bool = True
    """Leave out turns that every probe rollout solved."""
    resample_rounds: int = 0
    """At most so many times an update, roll out as many other turns of the stage as groups came out
    with equal rewards (DAPO's dynamic sampling). Needs advantage.zero_variance=drop. 0: off."""

    def __post_init__(self):
        if len(self.bounds) != len(self.shares) or not self.bounds:
            raise ValueError(
                "curriculum.bounds and curriculum.shares must have the same length, at least 1"
            )
        if list(self.bounds) != sorted(self.bounds, reverse=True) or self.bounds[-1] > 0:
            raise ValueError(
                "curriculum.bounds must fall, down to 0: every success fraction needs a stage"
            )
        if any(share < 0 for share in self.shares) or sum(self.shares) <= 0:
            raise ValueError("curriculum.shares must not be negative, nor all zero")
        for name in ("probe_samples", "max_probe_turns", "resample_rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"curriculum.{name} must not be negative")


@dataclass
class Curriculum:
    """Stages of turn ids and the running success counts. `state()` is JSON and goes into the
    checkpoint."""

    stages: list[list[str]]
    shares: tuple[float, ...]
    seed: int
    num_dropped: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)
    """turn id -> [successes, attempts], probe and training together."""

    def stage_at(self, update: int, num_updates: int) -> int:
        """The stage of an update, by the shares of the stages that hold any turn."""
        shares = [
            share if turns else 0.0 for share, turns in zip(self.shares, self.stages, strict=True)
        ]
        progress, reached = (update + 0.5) / num_updates * sum(shares), 0.0
        for stage, share in enumerate(shares):
            reached += share
            if share and progress < reached:
                return stage
        return max(i for i, share in enumerate(shares) if share)

    def pick(self, update: int, num_updates: int, num_turns: int) -> list[str]:
        """`num_turns` different turn ids for an update; a smaller stage gives every turn it has,
        once.

        A stage is walked in seeded shuffled order, again and again. The answer depends on (seed,
        update) only, so a resumed run picks what the straight run picked. No turn comes twice in an
        update: its samples' noise would too.
        """
        stage = self.stage_at(update, num_updates)
        turns = self.stages[stage]
        if len(turns) <= num_turns:
            return random.Random(f"{self.seed}/{stage}/{update}").sample(turns, len(turns))
        first = next(u for u in range(update + 1) if self.stage_at(u, num_updates) == stage)
        start, walk, epoch = (update - first) * num_turns, [], 0
        while len(walk) < start + num_turns:
            order = random.Random(f"{self.seed}/{stage}/{epoch}").sample(turns, len(turns))
            begun = set(
                walk[len(walk) // num_turns * num_turns :]
            )  # already in the update that this order completes
            walk += sorted(order, key=begun.__contains__)  # stable: those come last
            epoch += 1
        return walk[start : start + num_turns]

    def refill(self, update: int, num_updates: int, num_turns: int, tried: list[str]) -> list[str]:
        """Up to `num_turns` further turn ids of the update's stage, none of them in `tried`, in an
        order that depends on (seed, update) only; fewer when the stage runs out."""
        stage = self.stage_at(update, num_updates)
        turns = self.stages[stage]
        order, seen = (
            random.Random(f"{self.seed}/{stage}/{update}/refill").sample(turns, len(turns)),
            set(tried),
        )
        return [turn_id for turn_id in order if turn_id not in seen][:num_turns]

    def record(self, turn_id: str, num_correct: int, num_attempts: int) -> None:
        """Add the outcome of a group to the turn's counts."""
        count = self.counts.setdefault(turn_id, [0, 0])
        count[0] += num_correct
        count[1] += num_attempts

    def state(self) -> dict:
        """Everything `from_state` needs, as JSON."""
        return {
            "stages": self.stages,
            "shares": list(self.shares),
            "seed": self.seed,
            "num_dropped": self.num_dropped,
            "counts": self.counts,
        }

    @classmethod
    def from_state(cls, state: dict) -> "Curriculum":
        """The inverse of `state`."""
        return cls(**{**state, "shares": tuple(state["shares"])})


def build_curriculum(
    counts: dict[str, tuple[int, int]], config: CurriculumConfig, seed: int
) -> Curriculum:
    """Stages from probe counts {turn id: (successes, attempts)}; an unprobed turn has no entry.

    Raises ValueError when nothing is left to train on.
    """
    stages: list[list[str]] = [[] for _ in config.bounds]
    num_dropped = 0
    for turn_id, (num_correct, num_attempts) in sorted(counts.items()):
        if num_attempts and num_correct == num_attempts and config.drop_solved:
            num_dropped += 1
            continue
        fraction = num_correct / num_attempts if num_attempts else 0.0
        stages[next(i for i, bound in enumerate(config.bounds) if fraction >= bound)].append(
            turn_id
        )
    if not any(stages):
        raise ValueError(
            "the curriculum is empty: every probed turn is already solved (curriculum.drop_solved)"
        )
    if not any(share for share, turns in zip(config.shares, stages, strict=True) if turns):
        raise ValueError("curriculum.shares gives no update to any stage that holds turns")
    return Curriculum(
        stages,
        config.shares,
        seed,
        num_dropped,
        {t: list(count) for t, count in sorted(counts.items())},
    )
