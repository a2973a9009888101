"""The figures of the report: EX and EM over the chain, gains by turn and hardness, abilities along
the run."""

import os
from collections.abc import Sequence
from pathlib import Path

from findings_claims import CHAIN
from findings_data import ABILITIES, ALONG
from findings_verdicts import SPLITS, Verdicts, aha, em, ex, having
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtsql.judge.aggregate import TURNS
from mtsql.judge.crossed_intervals import Estimate
from mtsql.judge.hardness import HARDNESS
from mtsql.run.plots import COLOURS, MARKERS
from mtsql.run.runlog import writing

FIGURES = ("chain.png", "gains.png", "along.png")
GAINS = (("base", "round3", "SFT: round3 - base"), ("round3", "process", "RL: process - round3"))


def draw(v: Verdicts, folder: Path) -> list[str]:
    """Draw all figures. -> the names of the files."""
    figures = (chain_figure(v), gains_figure(v), along_figure(v))
    for name, figure in zip(FIGURES, figures, strict=True):
        save(figure, folder / name)
    return list(FIGURES)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, completely or not at all. WriteError that names the file if it cannot
    be written."""
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": ""})
        os.replace(partial, file)


def chain_figure(v: Verdicts) -> Figure:
    """EX (solid) and EM (dashed) of the models of the chain, in domain and out of domain."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for place, (split, label) in enumerate(SPLITS.items()):
        for metric, line in ((ex, "-"), (em, "--")):
            found = [v.mean(model, metric, having("split", split)) for model in CHAIN]
            name = f"{metric.__name__.upper()}, {label}"
            x = [number + 0.06 * (2 * place - 1) for number in range(len(CHAIN))]
            _draw_points(axes, x, found, place, line, name)
    axes.set_xticks(range(len(CHAIN)), CHAIN)
    _finish(axes, "From the base model to RL: mean of the seeds, 95 % intervals", "% of the turns")
    return figure


def gains_figure(v: Verdicts) -> Figure:
    """Gains of EX by turn and by hardness."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    groups = (("turn", TURNS), ("hardness", HARDNESS))
    for axes, (key, names) in zip(both, groups, strict=True):
        for place, (a, b, label) in enumerate(GAINS):
            found = [v.gain(a, b, which=having(key, name)) for name in names]
            x = [number + 0.12 * (2 * place - 1) for number in range(len(names))]
            _draw_points(axes, x, found, place, "", label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(key)
        _finish(axes, f"Gain of EX by {key}", "points of EX" if key == "turn" else "")
    return figure


def along_figure(v: Verdicts) -> Figure:
    """EX, the aha share and the abilities along the run with the process reward."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    along = v.along()
    places = [v.of(ALONG, at=at) for at in along]
    for place, (metric, label) in enumerate(((ex, "EX"), (aha, "aha share"))):
        found = [v.estimate(v.values(one, metric)) for one in places]
        _draw_points(left, along, found, place, "-", label)
    for number, name in enumerate(ABILITIES):
        found = [
            v.estimate(v.values(one, lambda verdict, number=number: verdict.abilities[number]))
            for one in places
        ]
        _draw_points(right, along, found, number, "-", name)
    for axes in (left, right):
        axes.set_xticks(along)
        axes.set_xlabel("finished updates")
    _finish(left, "EX, and episodes that repair a query", "% of the turns")
    _finish(right, "Abilities", "mean")
    return figure


def _draw_points(
    axes: Axes,
    x: Sequence[float],
    found: Sequence[Estimate | None],
    number: int,
    line: str,
    label: str,
) -> None:
    """Estimates with their intervals; those that are missing are left out."""
    known = [(place, one) for place, one in zip(x, found, strict=True) if one is not None]
    if not known:
        return
    y = [one.value for _, one in known]
    ends = [one.interval or (one.value, one.value) for _, one in known]
    below = [max(0.0, value - low) for value, (low, _) in zip(y, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, ends, strict=True)]
    colours = (*COLOURS, "#56B4E9")
    axes.errorbar(
        [place for place, _ in known],
        y,
        yerr=[below, above],
        linestyle=line or "none",
        marker=(*MARKERS, "v")[number],
        color=colours[number],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
