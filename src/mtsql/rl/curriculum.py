"""Which turns to train on, and when: success counts, stages from easy to hard.

Paper section 4.1: the warm-started policy samples every training turn n times. A turn that it
always solves is dropped. The others are put into three stages by how often it succeeded, and the
stages are trained from often to rarely.
"""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CurriculumConfig:
    """The stages and their share of the updates. The bounds are ours: the paper gives none."""

    probe_samples: int = 20
    """Rollouts per training turn before the first update, to count successes (paper: 20). 0: no
    probe, and one stage holds all turns."""
    max_probe_turns: int = 0
    """Probe at most this many training turns, drawn by the seed. 0: all."""
    bounds: tuple[float, ...] = (0.7, 0.35, 0.0)
    """A turn belongs to the first stage whose bound its fraction of successes reaches (paper:
    14-19, 7-13 and 0-6 successes of 20)."""
    shares: tuple[float, ...] = (0.4, 0.4, 0.2)
    """Each stage's share of the updates (paper: 60, 60 and 30 of 150). A stage with a share of 0 is
    left out, unless no other holds a turn."""
    drop_solved: bool = True
    """Leave out turns that all their rollouts in the probe solved."""
    resample_rounds: int = 0
    """Maximum number of further rollouts in an update, each with as many other turns of the stage
    as there are zero-variance groups to replace (DAPO's dynamic sampling). Needs
    advantage.zero_variance=drop. 0: off."""

    def __post_init__(self) -> None:
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
    past: list[int] = field(default_factory=list)
    """The stages of finished updates that were laid out over another number of updates."""

    def stage_at(self, update: int, num_updates: int) -> int:
        """The stage of an update, by the shares of `num_updates` that the stages which hold a turn
        have. Further updates stay in the last of these stages.

        An update in `past` had its stage before the stages were laid out anew. Training never goes
        back to an earlier stage than the last of these.
        """
        if update < len(self.past):
            return self.past[update]
        return max([self._planned(update, num_updates), *self.past[-1:]])

    def _planned(self, update: int, num_updates: int) -> int:
        """The stage of an update by the shares alone. If all stages that hold a turn have a share
        of 0, they share the updates equally."""
        held = [bool(turns) for turns in self.stages]
        shares = [share * is_held for share, is_held in zip(self.shares, held, strict=True)]
        if not any(shares):
            shares = [float(is_held) for is_held in held]
        progress = (update + 0.5) / num_updates * sum(shares)
        reached = 0.0
        for stage, share in enumerate(shares):
            reached += share
            if share and progress < reached:
                return stage
        return max(stage for stage, share in enumerate(shares) if share)

    def pick(self, update: int, num_updates: int, num_turns: int) -> list[str]:
        """`num_turns` different turn ids for an update; all turns of a stage that has fewer.

        A stage is walked in seeded shuffled order, again and again. The answer depends on (seed,
        update) only, so a resumed run picks what the straight run picked. A turn is picked at most
        once per update; a second time it would draw the same noise and give identical samples.
        """
        stage = self.stage_at(update, num_updates)
        turns = self.stages[stage]
        if len(turns) <= num_turns:
            return random.Random(f"{self.seed}/{stage}/{update}").sample(turns, len(turns))
        num_before = sum(self.stage_at(u, num_updates) == stage for u in range(update))
        start = num_before * num_turns
        # Example with the turns a to e, three per update:
        #
        #     walk     d a e b c | a d e c b     each epoch is a new order of all turns
        #     update   0 0 0 1 1   1 2 2 2 3
        #
        # An epoch may begin within an update, here in update 1. The new order must not repeat
        # that update's turns at once, so they are moved to its end.
        walk: list[str] = []
        epoch = 0
        while len(walk) < start + num_turns:
            order = random.Random(f"{self.seed}/{stage}/{epoch}").sample(turns, len(turns))
            begun = set(walk[len(walk) // num_turns * num_turns :])  # of the update not yet full
            walk += [turn for turn in order if turn not in begun]
            walk += [turn for turn in order if turn in begun]
            epoch += 1
        return walk[start : start + num_turns]

    def resample(
        self, update: int, num_updates: int, num_turns: int, tried: list[str]
    ) -> list[str]:
        """Up to `num_turns` further turn ids of the update's stage, none of them in `tried`; fewer
        when the stage has no more. Their order depends on (seed, update) only."""
        stage = self.stage_at(update, num_updates)
        turns = self.stages[stage]
        generator = random.Random(f"{self.seed}/{stage}/{update}/refill")
        order = generator.sample(turns, len(turns))
        seen = set(tried)
        return [turn_id for turn_id in order if turn_id not in seen][:num_turns]

    def lay_out_anew(self, num_done: int, num_updates: int) -> None:
        """Fix the stages of `num_done` finished updates, which were laid out over `num_updates`.
        After this, `stage_at` may be asked with another number."""
        self.past = [self.stage_at(update, num_updates) for update in range(num_done)]

    def record(self, turn_id: str, num_correct: int, num_attempts: int) -> None:
        """Add the successes of a group to the turn's counts."""
        count = self.counts.setdefault(turn_id, [0, 0])
        count[0] += num_correct
        count[1] += num_attempts

    def state(self) -> dict:
        """Everything that `from_state` needs, as JSON."""
        return {
            "stages": self.stages,
            "shares": list(self.shares),
            "seed": self.seed,
            "num_dropped": self.num_dropped,
            "counts": self.counts,
            "past": self.past,
        }

    @classmethod
    def from_state(cls, state: dict) -> "Curriculum":
        """The inverse of `state`."""
        return cls(**{**state, "shares": tuple(state["shares"])})


def build_curriculum(
    counts: dict[str, tuple[int, int]], config: CurriculumConfig, seed: int
) -> Curriculum:
    """Stages from probe counts {turn id: (successes, attempts)}. A turn that was not probed has no
    entry. ValueError when no turn is left to train on."""
    stages: list[list[str]] = [[] for _ in config.bounds]
    num_dropped = 0
    for turn_id, (num_correct, num_attempts) in sorted(counts.items()):
        if num_attempts and num_correct == num_attempts and config.drop_solved:
            num_dropped += 1
            continue
        fraction = num_correct / num_attempts if num_attempts else 0.0
        stage = next(i for i, bound in enumerate(config.bounds) if fraction >= bound)
        stages[stage].append(turn_id)
    if not any(stages):
        raise ValueError(
            "the curriculum is empty: every probed turn is already solved (curriculum.drop_solved)"
        )
    running = {turn_id: list(count) for turn_id, count in sorted(counts.items())}
    return Curriculum(stages, config.shares, seed, num_dropped, running)
