"""The pages of the report of benchmarks/findings.py: README.md, tables.md and commands.md."""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from findings_claims import (
    CHAIN,
    HOLDS,
    NO_FIGURES,
    REVERSED,
    SHORT,
    UNDECIDED,
    Comparison,
    Finding,
    findings,
)
from findings_data import RUNS, VERDICTS, Verdict, read_keys
from findings_figures import draw
from findings_steps import NUM_ROUNDS
from findings_verdicts import HARDNESS_AND_TURNS, SPLITS, Verdicts, aha, em, having

from mtsql.files import read_text, write_text
from mtsql.judge.crossed_intervals import Estimate
from mtsql.run.screen import duration

REAL = "real.json"
"""What benchmarks/real.py leaves in the folder of the report."""
NOTES = "notes.md"
"""Written by hand in the folder of the report, if it is there: what the figures do not say."""
GAINS = (
    ("base", "round3"),
    ("round3", "outcome"),
    ("round3", "process"),
    ("base", "process"),
    ("short-rl", "process"),
    ("short-rl-compute", "process"),
)
"""Pairs of models whose gains stand in tables.md."""
THIRD = "An untrained small model cannot follow the protocol"
REAL_KEYS = ("model", "data", "turns", "ex", "ex_interval", "answered", "answered_interval")
FOLLOWS_FROM = 50.0
"""A model follows the protocol if at least this percentage of its episodes end with an answer."""
OTHERS = (
    "process-hard",
    "reply",
    "no-exec",
    "no-memory",
    "process-without-exec",
    "process-without-memory",
)
WORDS = {
    "base": "SFT of the random embedded model on demonstrations",
    "round1": "self-taught SFT, first round, from base",
    "round2": "second round",
    "round3": "third round; all long-horizon RL starts here",
    "outcome": "RL, reward EX + EM",
    "process": "RL, outcome and process reward",
    "short-sft": "short horizon from base: the gold SQL of the turns of the rounds, equal data",
    "short-rl": "RL from there, equal updates and samples",
    "short-sft-compute": "short-sft with about the operations of the three rounds",
    "short-rl-compute": "RL from there with about the operations of process",
    "process-hard": "RL, the process reward counts from the hard stage on",
    "reply": "RL, outcome and process reward, credit by reply",
    "no-exec": "RL without exec_sql",
    "no-memory": "RL without memory_retrieve",
    "process-without-exec": "process, exec_sql removed in the evaluation",
    "process-without-memory": "process, memory_retrieve removed in the evaluation",
}
PICTURES = (
    (1, "EX and EM from the base model to RL", "chain.png"),
    (4, "Gains by turn and hardness", "gains.png"),
    (7, "EX, aha share and abilities along RL", "along.png"),
)
"""Number of a finding, text and file of its figure."""
FEW_SEEDS = 5
"""With fewer seeds, the page says what that means for its intervals."""


def write_report(
    verdicts: Iterable[Verdict], runs: dict[str, Any], folder: Path, num_resamples: int = 2000
) -> None:
    """Write the three pages and the figures into the folder of the verdicts. ValueError, before
    anything is written, if one of them is empty, or a seed of the verdicts was not run."""
    v = Verdicts(verdicts, num_resamples)
    ran = sorted({one["seed"] for key in ("seeds", "steps") for one in runs[key]})
    if not v.seeds or not runs["steps"] or not v.seeds <= set(ran):
        raise ValueError(
            f"{folder}: {VERDICTS} has verdicts of the seeds {sorted(v.seeds)}, and {RUNS} has "
            f"{len(runs['steps'])} steps of the seeds {ran}: they are not of one report"
        )
    notes = read_text(folder / NOTES).strip() if (folder / NOTES).exists() else ""
    real = read_keys(folder / REAL, ["untrained"]) if (folder / REAL).is_file() else None
    draw(v, folder)
    write_text(folder / "README.md", page(v, runs, real, notes))
    write_text(folder / "tables.md", tables(v))
    write_text(folder / "commands.md", commands(runs))


def page(v: Verdicts, runs: dict[str, Any], real: dict[str, Any] | None, notes: str) -> str:
    """README.md. notes: text that was written by hand, may be empty."""
    found = findings(v)
    third = third_finding(real)
    seeds = sorted(v.seeds)
    secs = sum(step["secs"] for step in runs["steps"])
    turns = {key for place in v.by_model.values() for key in place}
    num_turns = len({key[1:] for key in turns})
    num_left = sum(not step["is_done"] for step in runs["steps"])
    head = [
        "# The findings of the paper in miniature",
        "",
        "`python benchmarks/findings.py run` trains every model, and `report` makes this page from "
        f"the runs or, in a fresh clone, from the files of this folder: `{VERDICTS}` has the "
        f"verdict on every turn. Seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}; {num_turns} held-out turns; the steps took "
        f"{duration(secs)}, one after another. `commands.md` has every command and what it took, "
        "`tables.md` every model by turn and hardness.",
    ]
    if num_left:
        head[-1] += f" **{num_left} of {len(runs['steps'])} steps are not finished yet.**"
    head += ["", method(found, len(seeds)), "", *_summary(found, third), ""]
    if notes:
        head += [notes, ""]
    parts = ["\n".join(head)]
    for finding in found:
        if finding.number == 4:
            parts.append(f"## 3. {THIRD}\n\n{third.sentence}\n")
        parts.append(_section(finding, v))
    return "\n".join(parts)


def method(found: Sequence[Finding], num_seeds: int) -> str:
    """How the intervals are made, and how far they can be trusted."""
    differences = [one for each in found for one in (*each.comparisons, *each.others)]
    num = sum(one.found is not None for one in differences)
    text = (
        "Intervals are 95 % bootstrap intervals over seeds and dialogues together: a resample "
        "draws as many seeds as there are and independently as many dialogues, with replacement; "
        "the weight of a turn is how often its seed was drawn times how often its dialogue was. "
        "Differences are paired: both models have answered the same turn with the same seed. A "
        "claim *holds* if the whole interval is above 0, is *reversed* if the whole interval is "
        "below 0, and is *undecided* if the interval contains 0. *Not claimed*: the paper says "
        "nothing about it. The intervals are not corrected "
        f"for their number: this page has {num}. If all differences were 0 in truth, about "
        f"{num / 20:.0f} intervals would exclude 0 by chance."
    )
    if num_seeds == 1:
        text += " There is one seed, so the intervals say nothing about other trainings."
    elif num_seeds < FEW_SEEDS:
        text += (
            f" {num_seeds} seeds are few, so each seed's own figure stands beside the interval. In "
            "simulations with three seeds, such an interval holds the true figure in 92 to 94 % of "
            "the cases if the difference varies between seeds by a standard deviation of 3 points, "
            "in 85 % at 5 points and in 75 % at 10 (`src/mtsql/judge/crossed_intervals.py`)."
        )
    return text


class Third(NamedTuple):
    """What is said about an untrained real model: answer and effect for the table, a sentence."""

    answer: str
    effect: str
    sentence: str


def third_finding(real: dict[str, Any] | None) -> Third:
    """The third finding, from figures of benchmarks/real.py. ValueError if one is missing."""
    figures = (real or {}).get("untrained")
    if not figures:
        where = f"`{REAL}` is missing here" if real is None else f"`{REAL}` has none yet"
        return Third(
            NO_FIGURES,
            "",
            f"No figures: {where}. `benchmarks/real.py` makes them for an untrained "
            "SmolLM2-135M-Instruct.",
        )
    missing = [key for key in REAL_KEYS if key not in figures]
    if missing:
        raise ValueError(f"{REAL}: untrained.{missing[0]} is missing")
    answered, ends = figures["answered"], figures["answered_interval"]
    low, high = ends or (answered, answered)
    answer = UNDECIDED
    if high < FOLLOWS_FROM:
        answer = HOLDS
    elif low >= FOLLOWS_FROM:
        answer = REVERSED
    effect = f"*episodes that end with an answer* {answered:.1f} %{_brackets(ends)}"
    none = ""
    if not answered:
        bound = 100 * (1 - 0.05 ** (1 / figures["turns"]))
        none = (
            f" None did; the exact upper bound for {figures['turns']} independent turns is "
            f"{bound:.0f} % (one-sided, 95 %)."
        )
    return Third(
        answer,
        effect,
        f"**{answer.capitalize()}.** {effect}, EX {figures['ex']:.1f}"
        f"{_brackets(figures['ex_interval'])}: {figures['model']}, untrained, on "
        f"{figures['turns']} turns of {figures['data']}. We say that a model cannot follow the "
        f"protocol if the whole interval is below {FOLLOWS_FROM:.0f} %.{none}",
    )


def _brackets(ends: Sequence[float] | None) -> str:
    return f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""


def _summary(found: Sequence[Finding], third: Third) -> list[str]:
    rows = [(one.number, one.title, one.answer, _effect(one)) for one in found]
    rows.insert(2, (3, THIRD, third.answer, third.effect))
    return table(("", "finding", "here", "effect"), rows)


def _effect(finding: Finding) -> str:
    main = finding.main
    if main is None or main.found is None:
        return ""
    return f"*{main.name}* {_estimate(main.found, finding)}"


def _section(finding: Finding, v: Verdicts) -> str:
    answer = finding.answer
    effect = _effect(finding)
    effect = f"{effect} {finding.unit}. " if effect else ""
    lines = [f"## {finding.number}. {finding.title}", ""]
    lines += [f"**{answer[0].upper()}{answer[1:]}.** {effect}{finding.note}", ""]
    rows = [_comparison(one, finding, one.answer) for one in finding.comparisons]
    rows += [_comparison(one, finding, f"{one.sign} (not claimed)") for one in finding.others]
    counted = "checkpoints" if finding.number == 7 else "turns x seeds"
    header = (f"difference, {finding.unit}", "effect", "each seed", counted, "answer")
    if finding.number == 7:
        header = (finding.unit, *header[1:])
    lines += table(header, rows)
    for number, text, file in PICTURES:
        if finding.number == number:
            lines += ["", f"![{text}]({file})"]
    return "\n".join([*lines, ""])


def _comparison(one: Comparison, finding: Finding, answer: str) -> tuple[str, ...]:
    if one.found is None:
        return (one.name, "", "", "", NO_FIGURES)
    digits = _digits(finding)
    seeds = ["none" if math.isnan(value) else f"{value:+.{digits}f}" for value in one.found.by_seed]
    effect = _estimate(one.found, finding)
    return (one.name, effect, ", ".join(seeds), f"{one.found.count:,}", answer)


def _digits(finding: Finding) -> int:
    return 2 if finding.number == 7 else 1


def _estimate(found: Estimate, finding: Finding) -> str:
    return signed(found, _digits(finding))


def signed(found: Estimate, digits: int = 1) -> str:
    """A difference with its sign and interval, such as +3.1 [+1.0, +5.2]."""
    text = f"{found.value:+.{digits}f}"
    if found.interval is None:
        return text
    low, high = found.interval
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def level(found: Estimate | None) -> str:
    """A figure with its interval, such as 42.1 [40.0, 44.3]; empty without one."""
    if found is None:
        return ""
    if found.interval is None:
        return f"{found.value:.1f}"
    low, high = found.interval
    return f"{found.value:.1f} [{low:.1f}, {high:.1f}]"


def tables(v: Verdicts) -> str:
    """tables.md: every model, and the gains by turn and hardness."""
    models = [model for model in (*CHAIN, *SHORT, *OTHERS) if v.of(model)]
    lines = ["# Every model of the findings", "", "Gold history; 95 % intervals.", ""]
    rows = []
    for model in models:
        replies = v.mean(model, lambda one: one.replies)
        splits = [v.mean(model), *(v.mean(model, which=having("split", name)) for name in SPLITS)]
        levels = [level(one) for one in (*splits, v.mean(model, em), v.mean(model, aha))]
        rows.append((model, WORDS[model], *levels, f"{replies.value:.1f}" if replies else ""))
    names = ["EX", *(f"EX {name}" for name in SPLITS.values())]
    lines += table(("model", "what", *names, "EM", "aha, %", "replies"), rows)
    lines += ["", "## EX by turn and hardness", ""]
    everything = [one for model in models for one in v.of(model).values()]
    known = [(name, which) for name, which in HARDNESS_AND_TURNS if any(map(which, everything))]
    rows = [(model, *(level(v.mean(model, which=which)) for _, which in known)) for model in models]
    lines += table(("model", *(name for name, _ in known)), rows)
    lines += ["", "## Gains of EX by turn and hardness", ""]
    rows = []
    for a, b in GAINS:
        gains = [v.gain(a, b, which=which) for _, which in known]
        rows.append((f"{b} - {a}", *(signed(gain) if gain else "" for gain in gains)))
    lines += table(("models", *(name for name, _ in known)), rows)
    history = [model for model in models if v.of(model, "predicted")]
    lines += ["", "## EX with predicted history", ""]
    rows = [(model, level(v.mean(model, history="predicted"))) for model in history]
    lines += table(("model", "EX, all turns"), rows)
    return "\n".join([*lines, ""])


def commands(runs: dict[str, Any]) -> str:
    """commands.md: each command with the seconds of each seed and the operations."""
    steps = runs["steps"]
    seeds = sorted({step["seed"] for step in steps})
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for step in steps:
        by_name.setdefault(step["name"], {})[step["seed"]] = step
    rows = []
    for name, of_seeds in by_name.items():
        times = [
            duration(of_seeds[seed]["secs"]) if of_seeds[seed]["is_done"] else "not done"
            for seed in seeds
        ]
        work = ""
        if any("flops" in step for step in of_seeds.values()):
            flops = [step.get("flops") for step in of_seeds.values()]
            work = ", ".join("-" if number is None else f"{number / 1e12:.1f}" for number in flops)
        taken = [str(s["optimizer_steps"]) for s in of_seeds.values() if "optimizer_steps" in s]
        rows.append((name, *times, work, ", ".join(taken)))
    totals = [sum(s["secs"] for s in steps if s["seed"] == seed) for seed in seeds]
    rows.append(("all", *map(duration, totals), "", ""))
    header = ("step", *(f"seed {seed}" for seed in seeds), "TFLOPs", "optimizer steps")
    lines = [
        "# Commands of the findings",
        "",
        f"`{RUNS}` and `{VERDICTS}` hold what this report is made from. Times are in "
        "minutes and seconds, of one process; operations are those of rollouts and "
        "learning, without evaluations.",
        "",
        *origin_lines(runs["seeds"]),
        "",
        "Equal data: the short horizon learns the gold SQL of the turns that the rounds roll out, "
        f"with {NUM_ROUNDS} passes, because the trajectories of the first round are learned in "
        "each round. Its RL has as many updates, turns and samples. Equal compute: there are more "
        "passes and updates, so that the short SFT takes about the operations of the rounds, "
        "rollouts included, and the short RL about those of `process`." + compute_ratios(steps),
        "",
        "The runner writes `demonstrations.jsonl`, the gold SQL of the turns of the rounds, before "
        "`short-sft`. The folders `round0` to `round2` are the rounds 1 to 3.",
        "",
        *table(header, rows),
        "",
        f"The commands of seed {seeds[0]}:",
        "",
        "```bash",
        *(shlex.join(step["command"]) for step in steps if step["seed"] == seeds[0]),
        "```",
        "",
    ]
    return "\n".join(lines)


def compute_ratios(steps: Iterable[dict[str, Any]]) -> str:
    """How the operations of equal compute compare, in a sentence; empty if some are missing."""
    flops = {(step["name"], step["seed"]): step.get("flops") for step in steps}
    texts = []
    for short, long in (("short-sft-compute", "rounds"), ("short-rl-compute", "process")):
        ratios = []
        for (name, seed), number in flops.items():
            whole = flops.get((long, seed))
            if name == short and number and whole:
                ratios.append(f"{number / whole:.2f}")
        if not ratios:
            return ""
        texts.append(f"{', '.join(ratios)} (`{short}`)")
    return f" The ratios are {' and '.join(texts)}."


def origin_lines(origins: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each machine with its versions, and the seeds that come from it."""
    seeds: dict[str, list[int]] = {}
    for one in origins:
        machine = [f"{value} {key}" for key, value in one["machine"].items()]
        versions = [f"{key} {value}" for key, value in one["versions"].items()]
        seeds.setdefault("; ".join(map(", ".join, (versions, machine))), []).append(one["seed"])
    return [
        f"- seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}: {about}"
        for about, found in seeds.items()
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table as lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
