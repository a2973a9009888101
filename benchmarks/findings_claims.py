"""What the findings of the paper say, as comparisons that the verdicts answer.

A comparison is a difference that the finding expects to be above 0. Other differences stand beside
it, about which the paper claims nothing.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from findings_data import ABILITIES, ALONG, Verdict
from findings_verdicts import SPLITS, Verdicts, aha, having, starts_bad

from mtsql.judge.crossed_intervals import Estimate

CHAIN = ("base", "round1", "round2", "round3", "outcome", "process")
SHORT = ("short-sft", "short-rl", "short-sft-compute", "short-rl-compute")
NO_FIGURES, HOLDS, REVERSED, UNDECIDED = "no figures", "holds", "reversed", "undecided"
EX_POINTS = "points of EX"


@dataclass(frozen=True)
class Comparison:
    """A difference and its estimate. None: a model was not run, or no episode gave occasion."""

    name: str
    found: Estimate | None

    @property
    def answer(self) -> str:
        """What its interval says about the claim that it is above 0."""
        if self.found is None:
            return NO_FIGURES
        if self.found.is_above_0:
            return HOLDS
        return REVERSED if self.found.is_below_0 else UNDECIDED

    @property
    def sign(self) -> str:
        """What its interval says where nothing is claimed."""
        words = {HOLDS: "above 0", REVERSED: "below 0"}
        return words.get(self.answer, self.answer)


@dataclass(frozen=True)
class Finding:
    """A finding of the paper. unit: that of its comparisons. main: the effect that stands for all,
    if one can. comparisons: what the finding expects to be above 0. others: differences about which
    the paper claims nothing. note: what a reader must know about them."""

    number: int
    title: str
    unit: str
    main: Comparison | None
    comparisons: list[Comparison]
    others: list[Comparison]
    note: str

    @property
    def answer(self) -> str:
        """What all comparisons together say, such as `mixed: 2 hold, 1 undecided`."""
        counts = Counter(one.answer for one in self.comparisons)
        num_missing = counts.pop(NO_FIGURES, 0)
        if not counts:
            return NO_FIGURES
        if len(counts) == 1:
            [text] = counts
        else:
            words = {HOLDS: "hold" if counts[HOLDS] > 1 else "holds"}
            parts = [
                f"{counts[answer]} {words.get(answer, answer)}"
                for answer in (HOLDS, REVERSED, UNDECIDED)
                if counts[answer]
            ]
            text = f"mixed: {', '.join(parts)}"
        return f"{text}, as far as there are figures" if num_missing else text


def findings(v: Verdicts) -> list[Finding]:
    """The findings but the third, which is about a real model."""
    return [
        _chain(v),
        _horizon(v),
        _turns_and_hardness(v),
        _domains(v),
        _process_reward(v),
        _abilities(v),
        _aha_and_ablations(v),
    ]


def _gain(v: Verdicts, a: str, b: str) -> Comparison:
    return Comparison(f"{b} - {a}", v.gain(a, b))


def _is_late(one: Verdict) -> bool:
    return one.turn in ("3", "4", "> 4")


def _is_hard(one: Verdict) -> bool:
    return one.hardness in ("hard", "extra")


def _chain(v: Verdicts) -> Finding:
    return Finding(
        1,
        "Base < rounds 1, 2, 3 < outcome RL < outcome and process RL",
        EX_POINTS,
        _gain(v, "round3", "outcome"),
        [_gain(v, a, b) for a, b in pairwise(CHAIN)],
        [_gain(v, a, "process") for a in ("round3", "base")] + [_gain(v, "base", "round3")],
        "`tables.md` says what each model is.",
    )


def _horizon(v: Verdicts) -> Finding:
    pairs = (
        ("short-sft", "round3"),
        ("short-sft-compute", "round3"),
        ("short-rl", "process"),
        ("short-rl-compute", "process"),
    )
    comparisons = [_gain(v, a, b) for a, b in pairs]
    return Finding(
        2,
        "Long horizon against short horizon, at equal data and at equal compute",
        EX_POINTS,
        comparisons[-1],
        comparisons,
        [_gain(v, a, "outcome") for a in ("short-rl", "short-rl-compute")],
        "`short-sft` learns the turns that the rounds roll out. `short-rl` has as many updates, "
        "turns and samples as `process`. `-compute` has about as many operations (`commands.md`). "
        "RL at the short horizon has the outcome reward only, so `outcome` is compared with it, "
        "too. On this world, the codes of values are only in the database and in earlier turns. A "
        "model without tools has to guess them, so a part of the difference is by construction.",
    )


def _turns_and_hardness(v: Verdicts) -> Finding:
    parts = (
        ("turns 3 and later - turn 1", _is_late, having("turn", "1")),
        ("hard and extra - easy", _is_hard, having("hardness", "easy")),
    )
    comparisons = [
        Comparison(f"gain {b} - {a}: {name}", v.gain(a, b, which=which, minus=minus))
        for name, which, minus in parts
        for a, b in (("round3", "process"), ("base", "process"))
    ]
    return Finding(
        4,
        "Later turns and harder questions gain more",
        EX_POINTS,
        comparisons[0],
        comparisons,
        [],
        "Gains are in points: where a model was often right before, there is less to gain. "
        "`tables.md` has the gain of each turn.",
    )


def _domains(v: Verdicts) -> Finding:
    comparisons = [
        Comparison(f"{name}: {b} - {a}", v.gain(a, b, which=having("split", split)))
        for a, b in (("base", "round3"), ("round3", "process"))
        for split, name in SPLITS.items()
    ]
    inside, outside = having("split", "dev_seen"), having("split", "dev")
    more = Comparison(
        "gain process - round3: out of domain - in domain",
        v.gain("round3", "process", which=outside, minus=inside),
    )
    return Finding(
        5,
        "Gains in domain and out of domain; RL gains most out of domain",
        EX_POINTS,
        more,
        [*comparisons, more],
        [],
        "In domain: other dialogues about the databases of the training (`dev_seen`). Out of "
        "domain: databases that no training saw (`dev`).",
    )


def _process_reward(v: Verdicts) -> Finding:
    hard = Comparison(
        "process - outcome: hard and extra", v.gain("outcome", "process", which=_is_hard)
    )
    by_stage = _gain(v, "outcome", "process-hard")
    return Finding(
        6,
        "Process reward on the hard stage; credit by step against broadcast",
        EX_POINTS,
        by_stage,
        [by_stage, hard],
        [_gain(v, "process", "reply")],
        "`process-hard` has the process reward from the hard stage on: after the number of updates "
        "that `--reward.process_from` names in `commands.md`. The paper broadcasts an episode's "
        "advantage to all its tokens, as `process` does; `reply` gives each reply its own, with "
        "the mean of the other episodes as the baseline: two changes at once.",
    )


def _abilities(v: Verdicts) -> Finding:
    comparisons = [Comparison(name, v.correlation(k, True)) for k, name in enumerate(ABILITIES)]
    of_rl = [
        Comparison(f"{name}: RL only", v.correlation(k, False)) for k, name in enumerate(ABILITIES)
    ]
    return Finding(
        7,
        "Abilities rise with EX over the checkpoints of all stages",
        "rank correlation",
        None,
        comparisons,
        of_rl,
        "Spearman's rank correlation of an ability (`docs/evaluation.md`) with EX over "
        "checkpoints, for each seed, then averaged; 0 if the ability is the same at all of them. "
        "The ability is measured on one half of the dialogues and EX on the other half, and the "
        "other way round, because luck on the same dialogues would raise both. Two figures that "
        "both rise with training correlate; that does not say that one causes the other.",
    )


def _aha_and_ablations(v: Verdicts) -> Finding:
    along = v.along()
    ahas = bad = repaired = None
    if len(along) > 1:
        first, last = (v.of(ALONG, at=at) for at in (along[0], along[-1]))
        ahas = v.estimate(v.gains(first, last, aha))
        bad = v.estimate(v.gains(first, last, starts_bad))
        starts = [v.values(one, aha, lambda one: bool(one.starts_bad)) for one in (last, first)]
        repaired = v.estimate(*starts) if all(starts) else None
    shorter, longer = v.history_loss("short-rl"), v.history_loss("process")
    both = v.estimate(shorter, longer) if shorter and longer else None
    ablated = ("no-exec", "no-memory", "process-without-exec", "process-without-memory")
    aha_share = Comparison("aha share: last - first checkpoint of RL", ahas)
    return Finding(
        8,
        "The aha share grows along RL; execution, memory and gold history help",
        "points",
        aha_share,
        [
            aha_share,
            *(Comparison(f"EX: process - {model}", v.gain(model, "process")) for model in ablated),
            Comparison("EX of process: gold - predicted history", v.estimate(longer)),
        ],
        [
            Comparison("share of bad starts: last - first checkpoint of RL", bad),
            Comparison("aha share among bad starts: last - first checkpoint of RL", repaired),
            Comparison("loss by predicted history: short-rl - process", both),
        ],
        "An episode starts badly if its first query fails or returns nothing. It has an aha if it "
        "starts so and ends right with another query. The aha share is that of all episodes in "
        "percent. It also rises if more episodes start badly, so the share of bad starts and the "
        "aha share among them stand below it. The first checkpoint is round 3. In `no-exec` and "
        "`no-memory`, RL ran without the tool, from round 3, which was trained with it. "
        "`process-without-...` only lost the tool in the evaluation. History is compared on the "
        "turns after the first.",
    )
