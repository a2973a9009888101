"""The verdicts of benchmarks/findings.py by model, and the estimates that are made from them.

Differences of EX and of the aha share are in percentage points, over the turns that both models
have answered with the same seed; rank correlations are between -1 and 1.
"""

from collections.abc import Callable, Iterable, Sequence

from findings_data import ALONG, Verdict

from mtsql.judge.aggregate import TURNS
from mtsql.judge.crossed_intervals import (
    Estimate,
    Value,
    crossed_correlation,
    crossed_mean,
)
from mtsql.judge.hardness import HARDNESS

SPLITS = {"dev_seen": "in domain", "dev": "out of domain"}
Which = Callable[[Verdict], bool]
Key = tuple[int, str, str]
"""(seed, split, turn id)."""


def having(key: str, name: str) -> Which:
    """Takes the verdicts that have this value, such as the split `dev`."""
    return lambda one: getattr(one, key) == name


HARDNESS_AND_TURNS = [
    *((f"turn {name}", having("turn", name)) for name in TURNS),
    *((name, having("hardness", name)) for name in HARDNESS),
]
"""The rows of tables by turn and by hardness: name, and which verdicts it takes."""


def everything(_: Verdict) -> bool:
    """Every turn."""
    return True


def ex(verdict: Verdict) -> float:
    """EX in percent."""
    return 100.0 * verdict.ex


def em(verdict: Verdict) -> float:
    """EM in percent."""
    return 100.0 * verdict.em


def aha(verdict: Verdict) -> float:
    """Whether the episode has repaired a failing or empty query, in percent."""
    return 100.0 * verdict.is_aha


def starts_bad(verdict: Verdict) -> float:
    """Whether the episode's first query fails or returns nothing, in percent."""
    return 100.0 * verdict.starts_bad


class Verdicts:
    """The verdicts by model, history and place along the run.

    num_resamples: draws of an interval. ValueError for two verdicts on one turn.
    """

    def __init__(self, verdicts: Iterable[Verdict], num_resamples: int = 2000) -> None:
        self.num_resamples = num_resamples
        self.seeds: set[int] = set()
        self.by_model: dict[tuple[str, str, int | None], dict[Key, Verdict]] = {}
        for one in verdicts:
            self.seeds.add(one.seed)
            place = self.by_model.setdefault((one.model, one.history, one.at), {})
            key = (one.seed, one.split, one.turn_id)
            if key in place:
                raise ValueError(f"two verdicts on {one.turn_id} by {one.model}, seed {one.seed}")
            place[key] = one

    def of(self, model: str, history: str = "gold", at: int | None = None) -> dict[Key, Verdict]:
        """The verdicts of a model by (seed, split, turn). Empty if it was not evaluated."""
        return self.by_model.get((model, history, at), {})

    def values(
        self, verdicts: dict[Key, Verdict], figure: Callable = ex, which: Which = everything
    ) -> list[Value]:
        """The figure of each turn that `which` takes; those that have none are left out."""
        found = [
            (one.seed, f"{one.split}/{one.dialogue}", figure(one))
            for one in verdicts.values()
            if which(one)
        ]
        return [value for value in found if value[2] is not None]

    def mean(
        self, model: str, figure: Callable = ex, which: Which = everything, history: str = "gold"
    ) -> Estimate | None:
        """The mean of a figure over the turns of a model; None without one."""
        values = self.values(self.of(model, history), figure, which)
        return self.estimate(values)

    def gains(
        self,
        a: dict[Key, Verdict],
        b: dict[Key, Verdict],
        figure: Callable = ex,
        which: Which = everything,
    ) -> list[Value]:
        """b - a on each turn that both have."""
        return [
            (one.seed, f"{one.split}/{one.dialogue}", figure(one) - figure(a[key]))
            for key, one in b.items()
            if key in a and which(one)
        ]

    def gain(
        self,
        a: str,
        b: str,
        figure: Callable = ex,
        which: Which = everything,
        minus: Which | None = None,
    ) -> Estimate | None:
        """The gain from model a to model b on the turns that `which` takes, less that on those
        that `minus` takes. None without a turn."""
        gains = self.gains(self.of(a), self.of(b), figure, which)
        if minus is None:
            return self.estimate(gains)
        others = self.gains(self.of(a), self.of(b), figure, minus)
        return self.estimate(gains, others) if others else None

    def along(self) -> list[int]:
        """The finished updates at which the training `ALONG` was evaluated with every seed."""
        places = [at for model, _, at in self.by_model if model == ALONG and at is not None]
        seeds = {key[0] for at in places for key in self.of(ALONG, at=at)}
        return sorted(at for at in places if {key[0] for key in self.of(ALONG, at=at)} == seeds)

    def checkpoints(self, is_whole: bool) -> list[dict[Key, Verdict]]:
        """The verdicts of the checkpoints of RL, before them (`is_whole`) those of the base model
        and of the first rounds. The last round is the first checkpoint of RL."""
        before = ("base", "round1", "round2") if is_whole else ()
        return [self.of(model) for model in before] + [self.of(ALONG, at=at) for at in self.along()]

    def correlation(self, number: int, is_whole: bool) -> Estimate | None:
        """The rank correlation of an ability, by its number, with EX over the checkpoints at which
        it has a value with every seed. None with fewer than three of them, or with too few
        values."""
        models = self.checkpoints(is_whole)
        seeds = {key[0] for one in models for key in one}
        pairs = [
            (self.values(one, lambda verdict: verdict.abilities[number]), self.values(one))
            for one in models
        ]
        pairs = [pair for pair in pairs if {value[0] for value in pair[0]} == seeds]
        if len(pairs) < 3:
            return None
        x, y = zip(*pairs, strict=True)
        return crossed_correlation(x, y, num_resamples=min(self.num_resamples, 1000))

    def history_loss(self, model: str) -> list[Value]:
        """EX with gold history less EX with predicted history, on each turn after the first."""
        return self.gains(
            self.of(model, "predicted"), self.of(model), which=lambda one: one.turn != "1"
        )

    def estimate(
        self, values: Sequence[Value], minus: Sequence[Value] | None = None
    ) -> Estimate | None:
        """The mean of the values, less that of `minus`; None without a value."""
        if not values:
            return None
        return crossed_mean(values, minus, num_resamples=self.num_resamples)
