"""Figures over the updates of training runs: reward, reply length, held-out EX and EM."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mtsql.plots.sources import Row, Training
from mtsql.plots.style import Drawn, finish, legend, line_style, new_figure
from mtsql.run.plots import MIN_WINDOW, ShareLocator, smoothed, stages_of

PANEL = 1.9
"""Inches of one panel."""
SPLITS = {
    "held_out": "held_out (training databases that are held out)",
    "dev_seen": "dev_seen (databases of the training)",
}
LEAST_ROOM = 10.0
"""Percentage points that an axis of EX or EM has at least: small changes do not fill it."""
MAX_MARKERS = 40
"""Points of a line that are marked one by one."""


def training_figures(trainings: Sequence[Training], window: int | None = None) -> list[Drawn]:
    """All figures for which the runs have numbers. window: updates of the moving mean; None: a
    twentieth of the longest run, at least five."""
    with_updates = [one for one in trainings if one.updates]
    longest = max((len(one.updates) for one in with_updates), default=0)
    size = window or max(MIN_WINDOW, longest // 20)
    found = [
        _by_stage(with_updates, "reward", "reward", "Reward of the trajectories", size),
        _by_stage(with_updates, "response_tokens", "reply_length", "Sampled tokens", size),
        _held_out(trainings),
    ]
    return [one for one in found if one is not None]


def _by_stage(
    trainings: Sequence[Training], key: str, name: str, title: str, window: int
) -> Drawn | None:
    """A panel for each curriculum stage, with a moving mean and a band for each run."""
    by_run = [
        [(number, rows) for number, rows in stages_of(one.updates) if _has(rows, key)]
        for one in trainings
    ]
    numbers = sorted({number for parts in by_run for number, _ in parts})
    if not numbers:
        return None
    what = "of a trajectory, mean of each update" if key == "response_tokens" else "by update"
    figure = new_figure(0.9 + PANEL * len(numbers), f"{title} {what}, by curriculum stage")
    panels = figure.subplots(len(numbers), 1, squeeze=False)[:, 0]
    header = ("run", "stage", "update", name, "moving_mean", "low", "high")
    table: list[tuple[Any, ...]] = []
    for axes, number in zip(panels, numbers, strict=True):
        for place, (one, parts) in enumerate(zip(trainings, by_run, strict=True)):
            for _, rows in (part for part in parts if part[0] == number):
                x = [row["update"] for row in rows if row.get(key) is not None]
                values = [float(row[key]) for row in rows if row.get(key) is not None]
                mean, low, high = _band(values, window)
                _draw_band(axes, x, values, mean, low, high, place)
                table += [
                    (one.name, number + 1, *cells)
                    for cells in zip(x, values, mean, low, high, strict=True)
                ]
        finish(axes, f"stage {number + 1}", name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel(
        f"finished updates (line: mean of {window} updates; band: one standard deviation of them)"
    )
    lines = [axes_line(panels[0], place) for place in range(len(trainings))]
    legend(figure, lines, [one.name for one in trainings])
    return Drawn(name, figure, header, table)


def _has(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def axes_line(axes: Axes, place: int) -> Any:
    """A line for the legend, in the style of the run with this number."""
    style = line_style(place)
    return axes.plot([], [], linewidth=1.6, markersize=4, **style)[0]


def _band(values: list[float], window: int) -> tuple[list[float], list[float], list[float]]:
    """-> (mean, mean - deviation, mean + deviation) of the `window` values around each one."""
    middle = sum(values) / len(values)  # squares of values around zero lose no digits
    mean = smoothed(values, window)
    squares = smoothed([(value - middle) ** 2 for value in values], window)
    spread = [
        math.sqrt(max(0.0, square - (one - middle) ** 2))
        for square, one in zip(squares, mean, strict=True)
    ]
    low = [one - width for one, width in zip(mean, spread, strict=True)]
    high = [one + width for one, width in zip(mean, spread, strict=True)]
    return mean, low, high


def _draw_band(
    axes: Axes,
    x: Sequence[int],
    values: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    place: int,
) -> None:
    style = line_style(place)
    every = max(1, len(x) // 6)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(x, values, ".", color=style["color"], markersize=2.5, alpha=0.5)
    # The markers of two runs stand at different updates.
    start = (place * every // 3) % every if every > 1 else 0
    axes.plot(x, mean, linewidth=1.6, markersize=4, markevery=(start, every), **style)


def _held_out(trainings: Sequence[Training]) -> Drawn | None:
    """EX and EM of each split over the updates, a line for each run, with intervals where the turns
    are known."""
    splits = dict.fromkeys(
        key[:-3] for one in trainings for row in one.evals for key in row if key.endswith("_ex")
    )
    if not splits:
        return None
    figure = new_figure(0.9 + 2.5 * len(splits), "Held-out turns: greedy, with gold history")
    panels = figure.subplots(len(splits), 2, squeeze=False, sharex=True)
    header = ("run", "split", "update", "metric", "percent", "low", "high", "turns")
    table: list[tuple[Any, ...]] = []
    for row_of_panels, split in zip(panels, splits, strict=True):
        for axes, metric in zip(row_of_panels, ("ex", "em"), strict=True):
            seen: list[float] = []
            for place, one in enumerate(trainings):
                found = _points(one, split, metric)
                if found:
                    _draw_points(axes, found, place, len(trainings))
                    seen += [end for one in found.values() for end in one[:3] if end is not None]
                    table += [
                        (one.name, split, update, metric, value, low, high, count)
                        for update, (value, low, high, count) in found.items()
                    ]
            finish(axes, SPLITS.get(split, split), f"{metric.upper()}, % of the turns")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            if seen:
                _set_range(axes, min(seen), max(seen))
    for axes in panels[-1]:
        axes.set_xlabel("finished updates (bars: 95 % intervals)")
    lines = [axes_line(panels[0][0], place) for place in range(len(trainings))]
    legend(figure, lines, [one.name for one in trainings])
    return Drawn("held_out", figure, header, table)


def _set_range(axes: Axes, low: float, high: float) -> None:
    """A little more than from `low` to `high`, in percent, and nothing that is no share."""
    missing = max(0.0, LEAST_ROOM - (high - low))
    low = max(0.0, min(low - missing / 2, 100.0 - LEAST_ROOM))
    high = min(100.0, max(high + missing / 2, low + LEAST_ROOM))
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(ShareLocator(100.0))


Point = tuple[float, float | None, float | None, int | None]
"""A figure in percent, the two ends of its interval, the number of turns."""


def _points(training: Training, split: str, metric: str) -> dict[int, Point]:
    """Update -> its point. An evaluation that a resumed run repeats is one point."""
    found: dict[int, Point] = {}
    for row in training.evals:
        value = row.get(f"{split}_{metric}")
        if value is None:
            continue
        scored = training.held_out.get((split, row["update"]))
        known = scored.mean(metric) if scored else None
        low, high = known.interval if known and known.interval else (None, None)
        found[row["update"]] = (float(value), low, high, known.count if known else None)
    return found


def _draw_points(axes: Axes, found: dict[int, Point], place: int, num_runs: int) -> None:
    style = line_style(place)
    size = 4 if len(found) <= MAX_MARKERS else 0
    longest = max(found) or 1
    shift = 0.006 * longest * (place - (num_runs - 1) / 2)  # the intervals stand side by side
    x = [update + shift for update in found]
    values = [value for value, *_ in found.values()]
    axes.plot(x, values, linewidth=1.4, markersize=size, **style)
    for at, (value, low, high, _) in zip(x, found.values(), strict=True):
        if low is not None and high is not None:
            ends = (min(low, value), max(high, value))
            axes.plot([at, at], ends, color=style["color"], linewidth=0.7, alpha=0.7)
