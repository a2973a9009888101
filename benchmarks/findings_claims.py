"""What the findings of the paper say, as comparisons that the verdicts answer.

A comparison is a difference that the finding expects to be above 0. Differences of EX and of the
aha share are in percentage points, over the turns that both models have answered with the same
seed; those of rank correlations are correlations.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from findings_data import ABILITIES, ALONG, Verdict

from mtsql.judge.aggregate import TURNS
from mtsql.judge.crossed_intervals import (
    Estimate,
    Value,
    crossed_correlation,
    crossed_mean,
)
from mtsql.judge.hardness import HARDNESS

CHAIN = ("base", "round1", "round2", "round3", "outcome", "process")
SHORT = ("short-sft", "short-rl", "short-sft-compute", "short-rl-compute")
LATE = ("3", "4", "> 4")
HARDER = ("hard", "extra")
SPLITS = {"dev_seen": "in domain", "dev": "out of domain"}
Which = Callable[[Verdict], bool]
Key = tuple[int, str, str]
"""(seed, split, turn id)."""


def _is(key: str, name: str) -> Which:
    return lambda one: getattr(one, key) == name


HARDNESS_AND_TURNS = [
    *((f"turn {name}", _is("turn", name)) for name in TURNS),
    *((name, _is("hardness", name)) for name in HARDNESS),
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


class Verdicts:
    """The verdicts by model, history and place along the run."""

    def __init__(self, verdicts: Iterable[Verdict], num_resamples: int = 2000) -> None:
        self.num_resamples = num_resamples
        self.by_model: dict[tuple[str, str, int | None], dict[Key, Verdict]] = {}
        for one in verdicts:
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
        it has a value with every seed. None with fewer than three of them."""
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


@dataclass(frozen=True)
class Comparison:
    """What a finding expects to be above 0, and what was found. None: a model was not run, or no
    episode gave occasion."""

    name: str
    found: Estimate | None

    @property
    def answer(self) -> str:
        """What its interval says."""
        if self.found is None:
            return "no figures"
        if self.found.is_above_0:
            return "holds"
        return "does not hold here" if self.found.is_below_0 else "cannot be told"


@dataclass(frozen=True)
class Finding:
    """A finding of the paper. unit: that of its comparisons. main: the effect that stands for all.
    others: figures without a claim."""

    number: int
    title: str
    unit: str
    main: Comparison
    comparisons: list[Comparison]
    others: list[Comparison]

    @property
    def answer(self) -> str:
        """What all comparisons together say."""
        answers = [one.answer for one in self.comparisons if one.found is not None]
        if not answers:
            return "no figures"
        for answer in ("holds", "does not hold here", "cannot be told"):
            if set(answers) == {answer}:
                return answer
        return (
            "holds in part" if "holds" in answers else "does not hold here, as far as can be told"
        )

    @property
    def sentence(self) -> str:
        """The answer in words: which comparisons say what."""
        parts = []
        for answer, text in (
            ("holds", "Above 0 with the whole interval"),
            ("does not hold here", "Below 0, the other way round"),
            ("cannot be told", "Cannot be told, because the interval has 0 in it"),
            ("no figures", "No figures"),
        ):
            names = [f"*{one.name}*" for one in self.comparisons if one.answer == answer]
            if names:
                parts.append(f"{text}: {', '.join(names)}.")
        return " ".join(parts)


def findings(v: Verdicts) -> list[Finding]:
    """The findings but the third, which is about a real model."""

    def gain(a: str, b: str) -> Comparison:
        return Comparison(f"{b} - {a}", v.gain(a, b))

    def on(name: str, a: str, b: str, which: Which, minus: Which | None = None) -> Comparison:
        return Comparison(name, v.gain(a, b, which=which, minus=minus))

    chain = [gain(a, b) for a, b in zip(CHAIN, CHAIN[1:], strict=False)]
    horizon = [
        gain("short-sft", "round3"),
        gain("short-sft-compute", "round3"),
        gain("short-rl", "process"),
        gain("short-rl-compute", "process"),
    ]
    by_place = [
        on(
            f"gain {b} - {a}: turns 3 and later - turn 1",
            a,
            b,
            lambda one: one.turn in LATE,
            lambda one: one.turn == "1",
        )
        for a, b in (("round3", "process"), ("base", "process"))
    ]
    by_place += [
        on(
            f"gain {b} - {a}: hard and extra - easy",
            a,
            b,
            lambda one: one.hardness in HARDER,
            lambda one: one.hardness == "easy",
        )
        for a, b in (("round3", "process"), ("base", "process"))
    ]
    domains = [
        on(f"{name}: {b} - {a}", a, b, lambda one, split=split: one.split == split)
        for a, b in (("base", "round3"), ("round3", "process"))
        for split, name in SPLITS.items()
    ]
    between = on(
        "gain process - base: in domain - out of domain",
        "base",
        "process",
        lambda one: one.split == "dev_seen",
        lambda one: one.split == "dev",
    )
    credit = [
        gain("outcome", "process-hard"),
        gain("process", "process-hard"),
        gain("process", "reply"),
    ]
    along = v.along()
    ahas = None
    if len(along) > 1:
        first, last = (v.of(ALONG, at=at) for at in (along[0], along[-1]))
        ahas = v.estimate(v.gains(first, last, aha))
    predicted = {model: v.history_loss(model) for model in ("process", "short-rl")}
    losses = [v.estimate(values) for values in predicted.values()]
    both = None
    if all(predicted.values()):
        both = v.estimate(predicted["short-rl"], predicted["process"])
    abilities = [Comparison(name, v.correlation(k, True)) for k, name in enumerate(ABILITIES)]
    of_rl = [
        Comparison(f"{name}: RL only", v.correlation(k, False)) for k, name in enumerate(ABILITIES)
    ]
    aha_share = Comparison("aha share: last - first checkpoint of RL", ahas)
    needed = [
        gain("no-exec", "process"),
        gain("no-memory", "process"),
        gain("process-without-exec", "process"),
        gain("process-without-memory", "process"),
        Comparison("process: gold - predicted history", losses[0]),
    ]
    not_claimed = [
        Comparison("short-rl: gold - predicted history", losses[1]),
        Comparison("loss of short-rl - loss of process", both),
    ]
    whole = gain("base", "process")
    stages = [gain("base", "round3"), gain("round3", "process"), whole]
    points = "points of EX"
    return [
        Finding(
            1,
            "Base < rounds 1, 2, 3 < outcome RL < outcome and process RL",
            points,
            whole,
            chain,
            stages,
        ),
        Finding(
            2,
            "Long horizon against short horizon, at equal data and at equal compute",
            points,
            horizon[-1],
            horizon,
            [gain("short-rl", "outcome"), gain("short-rl-compute", "outcome")],
        ),
        Finding(4, "Later turns and harder questions gain more", points, by_place[0], by_place, []),
        Finding(5, "Gains in domain and out of domain", points, domains[-1], domains, [between]),
        Finding(
            6,
            "Process reward on the hard stage; credit by step against broadcast",
            points,
            credit[0],
            credit,
            [],
        ),
        Finding(
            7,
            "Abilities follow EX over the checkpoints of all stages",
            "rank correlation",
            abilities[-1],
            abilities,
            of_rl,
        ),
        Finding(
            8,
            "The aha share grows along RL; execution, memory and gold history are needed",
            "points of the aha share or of EX",
            aha_share,
            [aha_share, *needed],
            not_claimed,
        ),
    ]
