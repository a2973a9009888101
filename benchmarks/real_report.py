"""The report of benchmarks/real.py: the files that it is made from, and the page.

real_verdicts.jsonl.gz    a line for each turn, model and history (`findings_data.Verdict`); its
                          split is the data set
real.json                 figures of the evaluations, curves of the trainings, times, versions
real_notes.md             written by hand: what the figures do not say; may be missing
real.md, real.png         the page and its figure, made from these files
"""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from findings_data import (
    Verdict,
    cells_of,
    facts_of,
    machine,
    read_keys,
    read_verdicts,
    require_steps,
    verdict_of,
    versions,
    write_verdicts,
)
from findings_figures import save
from findings_report import level, signed, table
from findings_run import Steps
from findings_steps import Step
from findings_verdicts import HARDNESS_AND_TURNS, Verdicts, em, everything, ex
from matplotlib.figure import Figure

from mtsql.agent.env import Outcome
from mtsql.files import read_json, read_rows, read_text, write_text
from mtsql.judge.crossed_intervals import Estimate
from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, share
from mtsql.run.plots import COLOURS
from mtsql.run.screen import duration

NOTES = "real_notes.md"
VERDICTS, FACTS, PAGE, PICTURE = "real_verdicts.jsonl.gz", "real.json", "real.md", "real.png"
MODELS = {"untrained": "untrained", "sft": "stage 1", "rl": "stage 2"}
SPARC, COSQL = "sparc dev", "cosql dev"
HISTORIES = ("gold", "predicted")
KEPT = ("abilities", "aha", "outcomes", "costs")
"""Figures of a cell of scores.json that real.json keeps."""
CURVES = ("loss", "reward", "held_out_ex", "held_out_em")
"""Numbers of metrics.jsonl that real.json keeps."""
WANTED_EX = 20.0
"""EX on SParC dev that stage 1 is to reach."""
WANTED_GAIN = 3.0
"""Points of EX that stage 2 is to add."""


def gather(steps: Steps) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts of all finished evaluations, and what real.json holds."""
    verdicts: list[Verdict] = []
    evaluations: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    selected: dict[str, Any] | None = None
    for step in steps.steps:
        run = steps.folder / step.key
        if step.script == "eval.py" and steps.states[step.key].is_done:
            model = step.name.split("-")[1]
            for cell in cells_of(run):
                verdicts += _of_cell(step, model, cell)
                evaluations.append(_figures(model, cell))
        elif step.script != "eval.py" and (run / "metrics.jsonl").is_file():
            curves[step.name] = list(_curve(read_rows(run / "metrics.jsonl")))
        if (run / "model" / "selected.json").is_file():
            selected = read_json(run / "model" / "selected.json")
    return verdicts, {
        "untrained": _untrained(evaluations),
        "evaluations": evaluations,
        "curves": curves,
        "selected": selected,
        "machine": machine(),
        "versions": versions(steps, steps.steps[0].seed),
        "steps": [facts_of(steps, step) for step in steps.steps],
    }


def write_files(verdicts: list[Verdict], facts: dict[str, Any], folder: Path) -> None:
    """Write the two files that the page is made from."""
    write_verdicts(verdicts, folder / VERDICTS)
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def has_files(folder: Path) -> bool:
    """Whether the folder has both files."""
    return (folder / VERDICTS).is_file() and (folder / FACTS).is_file()


def _of_cell(step: Step, model: str, cell: dict[str, Any]) -> Iterator[Verdict]:
    for row in cell["turns"]:
        yield verdict_of(step.seed, model, cell["data"], cell["history"], row)


def _figures(model: str, cell: dict[str, Any]) -> dict[str, Any]:
    kept = {key: cell[key] for key in KEPT}
    names = {key: cell[key] for key in ("data", "history")}
    answers = [
        (row["dialogue_id"], float(row["outcome"] == Outcome.ANSWERED.value))
        for row in cell["turns"]
    ]
    return {"model": model, **names, "all": cell["all"], "answered": share(answers), **kept}


def _untrained(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """What docs/findings/README.md says of the untrained model; empty if it was not evaluated."""
    for one in evaluations:
        if (one["model"], one["data"]) == ("untrained", SPARC):
            return {
                "model": "SmolLM2-135M-Instruct",
                "data": one["data"],
                "turns": one["answered"]["of"],
                "ex": one["all"]["ex"],
                "ex_interval": one["all"]["ex_interval"],
                "answered": one["answered"]["percent"],
                "answered_interval": one["answered"]["interval"],
            }
    return {}


def _curve(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The numbers of a training that the figure shows, by finished updates."""
    for row in rows:
        wanted = {key: row[key] for key in CURVES if row.get(key) is not None}
        if wanted:
            yield {"update": row["update"], "stage": row["stage"], **wanted}


def write_report(folder: Path, num_resamples: int) -> None:
    """Write the page and the figure from the two files."""
    keys = ("evaluations", "curves", "selected", "machine", "versions", "steps")
    facts = read_keys(folder / FACTS, keys)
    require_steps(facts, folder / FACTS)
    v = Verdicts(read_verdicts(folder / VERDICTS), num_resamples)
    save(draw(facts["curves"]), folder / PICTURE)
    notes = read_text(folder / NOTES).splitlines() if (folder / NOTES).is_file() else []
    write_text(folder / PAGE, page(v, facts, notes))


def page(v: Verdicts, facts: dict[str, Any], notes: list[str]) -> str:
    """real.md. notes: lines that were written by hand."""
    secs = sum(step["secs"] for step in facts["steps"])
    lines = [
        "# SmolLM2-135M on SParC",
        "",
        "Written by `python benchmarks/real.py report`. SmolLM2-135M-Instruct learns on SParC "
        "train without a GPU: stage 1 from demonstrations made from gold SQL, stage 2 by "
        f"curriculum GRPO. {duration(secs)} in all. Brackets are 95 % intervals; those of a "
        "difference are paired, over dialogues (`docs/compare.md`). One seed.",
        "",
        *verdict_lines(v),
        *selection_lines(facts["selected"]),
        *notes,
        "",
        "![Stage 1 and stage 2](real.png)",
        "",
        "## EX and EM",
        "",
        *scores(v),
        "",
        *turn_lines(v),
        "## By turn and by hardness",
        "",
        "EX on SParC dev, gold history.",
        "",
        *by_group(v),
        "",
        "## What the model does",
        "",
        *abilities(facts["evaluations"]),
        "",
        "## Commands and times",
        "",
        *commands(facts),
        "",
    ]
    return "\n".join(lines)


def verdict_lines(v: Verdicts) -> list[str]:
    """What was wanted, and what was found."""
    sft, gain = _on(v, "sft", SPARC), _gain(v, "sft", "rl", SPARC)
    lines = []
    if sft is not None:
        answer = "reached" if sft.value >= WANTED_EX else "not reached"
        lines.append(
            f"- EX on SParC dev after stage 1: {level(sft)}; wanted {WANTED_EX:g}: {answer}."
        )
    if gain is not None:
        is_reached = gain.value >= WANTED_GAIN and gain.is_above_0
        answer = "reached" if is_reached else "not reached"
        lines.append(
            f"- Stage 2 adds {signed(gain)} points; wanted {WANTED_GAIN:g}, and the interval above "
            f"0: {answer}."
        )
    return lines or ["No trained model has been evaluated yet."]


def selection_lines(selected: dict[str, Any] | None) -> list[str]:
    """Which update's weights are those of stage 2; nothing if it is not finished."""
    if selected is None:
        return []
    place = f"update {selected['update']} of {selected['num_updates']}"
    if selected["select_by"] is None:
        return [f"- Stage 2 is evaluated with the weights of {place}, its last."]
    start = ", which is stage 1 itself" if selected["update"] == 0 else ""
    return [
        f"- Stage 2 is evaluated with the weights of {place}{start}. They have the highest EX on "
        "training databases that were held out of both stages."
    ]


def turn_lines(v: Verdicts) -> list[str]:
    """On how many turns each model was evaluated."""
    parts = []
    for data in (SPARC, COSQL):
        counts = []
        for model, name in MODELS.items():
            verdicts = [one for one in v.of(model).values() if one.split == data]
            dialogues = {one.dialogue for one in verdicts}
            if verdicts:
                counts.append(f"{name} {len(verdicts)} turns of {len(dialogues)} dialogues")
        if counts:
            parts.append(f"{data}: {', '.join(counts)}")
    if not parts:
        return []
    return [f"Evaluated with gold history: {'; '.join(parts)}.", ""]


def scores(v: Verdicts) -> list[str]:
    """EX and EM of each model, data set and history, and what stage 2 adds."""
    rows = []
    for data in (SPARC, COSQL):
        for history in HISTORIES:
            for name, figure in (("EX", ex), ("EM", em)):
                cells = [level(_on(v, model, data, figure, history)) for model in MODELS]
                gain = _gain(v, "sft", "rl", data, figure, history)
                added = "" if gain is None else signed(gain)
                rows.append((data, history, name, *cells, added))
    return table(("data", "history", "", *MODELS.values(), "stage 2 - stage 1"), rows)


def by_group(v: Verdicts) -> list[str]:
    """EX on SParC dev by turn and by hardness."""
    rows = []
    for name, which in HARDNESS_AND_TURNS:
        sft = _on(v, "sft", SPARC, which=which)
        rl = _on(v, "rl", SPARC, which=which)
        gain = _gain(v, "sft", "rl", SPARC, which=which)
        count = "" if sft is None else str(sft.count)
        added = "" if gain is None else signed(gain)
        rows.append((name, count, level(sft), level(rl), added))
    return table(("", "turns", "stage 1", "stage 2", "difference"), rows)


def abilities(evaluations: list[dict[str, Any]]) -> list[str]:
    """How episodes go, with gold history (docs/evaluation.md defines the figures)."""
    header = ("model", "data", "answered %", *ABILITY_DEFINITIONS, "replies", "sampled tokens")
    rows = []
    for one in evaluations:
        if one["history"] != "gold":
            continue
        answered = one["answered"]["percent"]
        values = [_mean(one["abilities"][name]) for name in ABILITY_DEFINITIONS]
        costs = [_mean(one["costs"][name]) for name in ("replies", "sampled_tokens")]
        rows.append((MODELS[one["model"]], one["data"], f"{answered:.1f}", *values, *costs))
    return table(header, rows)


def commands(facts: dict[str, Any]) -> list[str]:
    """What each step took, and its command."""
    rows = [
        (step["name"], duration(step["secs"]), "yes" if step["is_done"] else "no")
        for step in facts["steps"]
    ]
    words = [shlex.join(step["command"]) for step in facts["steps"]]
    about = {**facts["versions"], **facts["machine"]}
    text = ", ".join(f"{key} {value}" for key, value in about.items())
    return [
        *table(("step", "time", "finished"), rows),
        "",
        f"{text}.",
        "",
        "```bash",
        *words,
        "```",
    ]


def draw(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """The loss of stage 1; reward and held-out EX of stage 2."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = (
        (left, "sft", "loss", "Stage 1: loss", "optimizer steps"),
        (middle, "rl", "reward", "Stage 2: reward", "updates"),
        (right, "rl", "held_out_ex", "Stage 2: EX on held-out databases", "updates"),
    )
    for axes, name, key, title, unit in panels:
        points = [(row["update"], row[key]) for row in curves.get(name, []) if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[0], linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    return figure


def _on(
    v: Verdicts,
    model: str,
    data: str,
    figure: Callable = ex,
    history: str = "gold",
    which: Callable[[Verdict], bool] = everything,
) -> Estimate | None:
    return v.mean(model, figure, lambda one: one.split == data and which(one), history)


def _gain(
    v: Verdicts,
    a: str,
    b: str,
    data: str,
    figure: Callable = ex,
    history: str = "gold",
    which: Callable[[Verdict], bool] = everything,
) -> Estimate | None:
    def takes(one: Verdict) -> bool:
        return one.split == data and which(one)

    return v.estimate(v.gains(v.of(a, history), v.of(b, history), figure, takes))


def _mean(figure: Any) -> str:
    value = figure.get("mean") if isinstance(figure, dict) else figure
    return "" if value is None else f"{value:.2f}"
