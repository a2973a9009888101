"""Draw the figure of a run from the files that it wrote."""

import math
import os
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator

from mtsql.run.metrics_file import read_metrics
from mtsql.run.recipes import read_yaml

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Colours that the colour-blind can tell apart (Okabe and Ito)."""
MARKERS = ("o", "s", "^", "D")
SHADES = (0.96, 0.84)
"""Grey of the first stage and of the last one."""
MIN_WINDOW = 5
"""Updates that the smoothed reward is a mean over. In a long run it is a twentieth of them all."""
NARROW_FRAC = 0.08
"""A stage with a smaller share of the updates has its label upright."""
STAGE_NOTE = (
    "A later stage has turns that the model solved less often before the first update,\n"
    "so the mean reward may fall where a stage begins."
)
PENALTIES = ("extra_replies", "overlong")
"""Components of the reward between -1 and 0."""
TOY_SPLITS = {"dev_seen": "dev_seen (seen databases)", "dev": "dev (unseen databases)"}

Row = dict[str, Any]


def plot_training(metrics_file: Path, png: Path) -> None:
    """Draw the figure of an RL run from its metrics.jsonl and the config.yaml beside it, at any
    time after the first evaluation. `png` is complete or not there; OSError if it cannot be
    written."""
    rows = read_metrics(metrics_file)
    config_file = metrics_file.with_name("config.yaml")
    config = read_yaml(config_file) if config_file.is_file() else {}
    figure = training_figure(rows, config, metrics_file.resolve().parent.name)
    save_figure(figure, png, dpi=120)


def save_figure(figure: Figure, file: Path, **options: Any) -> None:
    """Write a figure in the format that the file's name ends with, completely or not at all.
    OSError if it cannot be written. options: those of matplotlib's savefig."""
    partial = file.with_name(f".{file.name}.partial")
    figure.savefig(partial, format=file.suffix[1:], **options)
    os.replace(partial, file)


def training_figure(rows: list[Row], config: dict[str, Any], run: str) -> Figure:
    """The figure of a run of this name, from the rows of metrics.jsonl and the configuration as
    plain values (may be empty).

    Above: the reward of each update (mean, standard deviation over the trajectories, and moving
    mean), with the curriculum stages shaded. Below: EX and EM of each held-out split. The ranges of
    the axes follow from the data and from the weights of the rewards.
    """
    updates = [row for row in rows if row["stage"] == "rl"]
    evals = [row for row in rows if row["stage"] == "eval"]
    last = max((row["update"] for row in [*updates, *evals]), default=0)
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(f"{run}, after update {last}", parse_math=False)  # a name may have a $
    rewards, scores = figure.subplots(2, 1, sharex=True)
    _draw_rewards(rewards, updates, config)
    _draw_scores(scores, evals, config)
    for axes in (rewards, scores):
        axes.grid(axis="y", color="0.8", linewidth=0.6)
        axes.set_axisbelow(True)
        _shade_stages(axes, updates, has_labels=axes is rewards)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    margin = max(0.5, 0.02 * last)
    scores.set_xlim(-margin, max(1, last) + margin)
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_rewards(axes: Axes, updates: list[Row], config: dict) -> None:
    axes.set_title("Training: reward of the trajectories", loc="left")
    axes.set_ylabel("reward")
    if not updates:
        _say(axes, "no update")
        return
    x = [row["update"] for row in updates]
    mean = [row["reward"] for row in updates]
    low = [row["reward"] - row["reward_std"] for row in updates]
    high = [row["reward"] + row["reward_std"] for row in updates]
    possible = _possible_rewards(updates, config)
    if possible:
        # A mean minus or plus a deviation may be no possible reward.
        low = [max(value, min(possible[0], *mean)) for value in low]
        high = [min(value, max(possible[1], *mean)) for value in high]
    window = max(MIN_WINDOW, len(updates) // 20)
    is_short = len(updates) <= window
    style: dict[str, Any] = {
        "color": COLOURS[0],
        "linewidth": 0.8,
        "marker": "." if is_short else None,
    }
    label = "mean \u00b1 standard deviation"
    axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label=label)
    axes.plot(x, mean, **style, alpha=0.7, label="mean of an update")
    label = f"moving mean ({window} updates)"
    for _, stage in [] if is_short else stages_of(updates):
        x = [row["update"] for row in stage]
        smooth = smoothed([row["reward"] for row in stage], window)
        axes.plot(x, smooth, color="black", linewidth=2, label=label)
        label = ""  # once in the legend
    bottom, top = min(low), max(high)
    if possible:
        label = f"highest possible: {possible[1]:g}"
        axes.axhline(possible[1], color="black", linewidth=1, linestyle=":", label=label)
        bottom, top = min(bottom, possible[0]), max(top, possible[1])
    room = (top - bottom) or 1.0
    axes.set_ylim(bottom - 0.03 * room, top + 0.12 * room)  # the stages are named above the data


def _possible_rewards(updates: list[Row], config: dict) -> tuple[float, float] | None:
    """The lowest and the highest reward if each component is in [0, 1], and each penalty in
    [-1, 0]. None if config.yaml is not there or does not have their weights."""
    weights = (config.get("reward") or {}).get("weights") or {}
    names = {key.removeprefix("reward/") for key in updates[0] if key.startswith("reward/")}
    if not names or not names <= weights.keys():
        return None
    ends = [-weights[name] if name in PENALTIES else weights[name] for name in names]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0)


def _draw_scores(axes: Axes, evals: list[Row], config: dict) -> None:
    """EX solid and EM dashed, a colour and a marker for each split."""
    axes.set_title("Held-out turns: greedy, with gold history", loc="left")
    axes.set_ylabel("% of the turns")
    axes.set_xlabel("finished updates")
    splits = {key.removesuffix("_ex"): 0 for row in evals for key in row if key.endswith("_ex")}
    names = _split_names(config)
    seen: list[float] = []
    for place, split in enumerate(splits):
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5 if len(evals) <= 20 else 2,
        }
        axes.plot([], [], " ", label=names.get(split, split))  # a heading in the legend
        for metric, line, fill in (("ex", "-", style["color"]), ("em", "--", "white")):
            key = f"{split}_{metric}"
            points = {row["update"]: row[key] for row in evals if key in row}
            if not points:
                continue
            values = list(points.values())
            change = " \u2192 ".join(f"{value:.1f}" for value in (values[:1] + values[1:][-1:]))
            label = f"{metric.upper()} {change}"
            axes.plot(list(points), values, line, **style, markerfacecolor=fill, label=label)
            seen += values
    if not seen:
        _say(axes, "no evaluation")
        return
    # To the next ten, at least two percentage points away from the data.
    axes.set_ylim(
        max(-2, 10 * math.floor((min(seen) - 2) / 10)),
        min(102, 10 * math.ceil((max(seen) + 2) / 10)),
    )
    axes.yaxis.set_major_locator(ShareLocator(100.0))


def _shade_stages(axes: Axes, updates: list[Row], has_labels: bool) -> None:
    """Each curriculum stage in a grey of its own. Stages count from 1 for the reader."""
    stages = stages_of(updates)
    numbers = sorted({number for number, _ in stages})
    for number, stage in stages:
        first, last = stage[0]["update"], stage[-1]["update"]
        depth = numbers.index(number) / max(1, len(numbers) - 1)
        shade = SHADES[0] + (SHADES[1] - SHADES[0]) * depth
        axes.axvspan(first - 0.5, last + 0.5, color=str(shade), linewidth=0, zorder=-1)
        if has_labels:
            axes.text(
                (first + last) / 2,
                0.98,
                f"stage {number + 1}",
                transform=axes.get_xaxis_transform(),
                horizontalalignment="center",
                verticalalignment="top",
                rotation=90 if len(stage) < NARROW_FRAC * len(updates) else 0,
            )
    if has_labels and len(numbers) > 1:
        axes.set_xlabel(STAGE_NOTE, fontsize="small", loc="left")


class ShareLocator(AutoLocator):
    """Marks of an axis of shares: none below 0 or above `most`, where the axis may only have room
    for its points."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """The marks between two ends of the axis."""
        marks = super().tick_values(max(0.0, vmin), min(self.most, vmax))
        return [mark for mark in marks if -1e-9 <= mark <= self.most * (1 + 1e-9)]


def stages_of(updates: list[Row]) -> list[tuple[int, list[Row]]]:
    """Each stage with its rows, in the order of the updates."""
    groups = groupby(updates, key=lambda row: row["curriculum_stage"])
    return [(number, list(rows)) for number, rows in groups]


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of the `window` values around each one; of fewer at both ends."""
    half = window // 2
    sums = list(accumulate(values, initial=0.0))  # a sum per place would be slow in a long run
    ends = [(max(0, i - half), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _split_names(config: dict) -> dict[str, str]:
    """The names of the splits in the figure. Only of the embedded world is it known which databases
    the training has seen."""
    data = config.get("data") or {}
    is_toy = "toy_folder" in data and data.get("dev") is None
    return TOY_SPLITS if is_toy else {}


def _say(axes: Axes, text: str) -> None:
    """A text in the middle of axes without data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, horizontalalignment="center")
    axes.set_yticks([])
