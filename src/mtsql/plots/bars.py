"""Figures that compare checkpoints on one data set: EX by turn and by hardness, abilities with EX,
and the aha share. Bars begin at 0, and the thin lines on them are 95 % intervals."""

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from mtsql.judge.aggregate import TURNS
from mtsql.judge.hardness import HARDNESS
from mtsql.plots.sources import Estimate, Row, Scored, estimate
from mtsql.plots.style import Drawn, bar_style, finish, legend, new_figure
from mtsql.run.plots import ShareLocator

ABILITIES = {
    "call_execute": "call: execute",
    "call_memory": "call: memory",
    "exec_verify": "execution verified",
    "memory_verify": "memory verified",
    "propose": "proposed, corrected",
}
"""The five abilities of an episode (docs/evaluation.md) and their names in the figure."""
BAD_STARTS = ("empty", "failed")
"""First executions after which a right answer is an aha."""
HEIGHT = 3.3
MAX_FLAT = 60
"""Characters that fit side by side above all bars. More stand upright."""
MAX_UPRIGHT = 45
"""Bars of a figure up to which each has its value above it."""
BAR_ROOM = 0.8
"""Share of the room of a group that its bars take."""
COLUMNS = ("percent", "low", "high", "turns")


def evaluation_figures(sets: dict[str, list[Scored]]) -> list[Drawn]:
    """All figures for which the evaluations have numbers, for each data set."""
    found = []
    for data, models in sets.items():
        found += [
            _grouped(data, models, "turn", TURNS),
            _grouped(data, models, "hardness", HARDNESS),
            _abilities(data, models),
            _aha(data, models),
        ]
    return [one for one in found if one is not None]


def file_name(figure: str, data: str) -> str:
    """The name of a figure's files, such as ex_by_turn-sparc_dev."""
    return f"{figure}-{re.sub(r'[^A-Za-z0-9.]+', '_', data).strip('_') or 'data'}"


def _grouped(data: str, models: Sequence[Scored], key: str, names: Sequence[str]) -> Drawn | None:
    """EX of each model in groups of turns: those with the same place, or of the same hardness."""
    found = []
    for model in models:
        groups = [[row for row in model.rows if row[key] == name] for name in names]
        found.append([model.mean("ex", group) for group in groups])
    used = [place for place in range(len(names)) if any(row[place] for row in found)]
    if not used:
        return None
    figure = new_figure(HEIGHT, f"EX by {key}: {data}")
    axes = figure.subplots()
    counts = [next(one.count for row in found if (one := row[place])) for place in used]
    for number, row in enumerate(found):
        _draw_bars(axes, [row[place] for place in used], number, len(models), 0)
    labels = [
        f"{names[place]}\n{count} turn{'' if count == 1 else 's'}"
        for place, count in zip(used, counts, strict=True)
    ]
    _name_groups(axes, labels)
    finish(axes, "", "EX, % of the turns")
    _set_top(axes, [one for row in found for one in row if one], 100.0)
    _name_models(figure, models)
    header = ("checkpoint", key, *COLUMNS)
    table = [
        (model.name, names[place], *_cells(row[place]))
        for model, row in zip(models, found, strict=True)
        for place in used
    ]
    return Drawn(file_name(f"ex_by_{key}", data), figure, header, table)


def _abilities(data: str, models: Sequence[Scored]) -> Drawn | None:
    """The five abilities of each model as bars, and its EX as a star on a scale of its own."""
    found = [{name: _ability(model.rows, name) for name in ABILITIES} for model in models]
    used = [name for name in ABILITIES if any(row[name] for row in found)]
    if not used:
        return None
    figure = new_figure(HEIGHT + 0.3, f"Abilities (bars) and EX (stars): {data}")
    axes = figure.subplots()
    for number, name in enumerate(used):
        _draw_bars(axes, [row[name] for row in found], number, len(used), 2)
    _name_groups(axes, [_broken(model.name) for model in models])
    finish(axes, "", "mean over the episodes, 0 to 1")
    _set_top(axes, [one for row in found for one in row.values() if one], 1.0)
    scores = [model.mean("ex") for model in models]
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.set_ylabel("EX, % of the turns")
    values = [one.value for one in scores if one]
    series = [model.series for model in models]
    for name in dict.fromkeys(series):  # no line from one run to the next
        places = [place for place, other in enumerate(series) if other == name]
        style: dict[str, Any] = {
            "color": "black",
            "markersize": 9,
            "linewidth": 1.0,
            "markeredgecolor": "white",
        }
        [line] = right.plot(places, [values[place] for place in places], "--*", **style)
    for place, value in enumerate(values):
        right.annotate(
            f"{value:.1f}",
            (place, value),
            textcoords="offset points",
            xytext=(7, 5),
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )
    low, high = min(values), max(values)
    room = max(20.0, high - low)
    right.set_ylim(max(-2.0, low - room), min(104.0, high + 0.5 * room))
    right.yaxis.set_major_locator(ShareLocator(100.0))
    patches = [Patch(**bar_style(number)) for number in range(len(used))]
    legend(figure, [*patches, line], [*(ABILITIES[name] for name in used), "EX (right axis)"])
    table: list[tuple[Any, ...]] = [
        (model.name, name, *_cells(row[name]))
        for model, row in zip(models, found, strict=True)
        for name in used
    ]
    table += [(model.name, "ex", *_cells(one)) for model, one in zip(models, scores, strict=True)]
    header = ("checkpoint", "ability", "value", "low", "high", "episodes")
    return Drawn(file_name("abilities", data), figure, header, table)


def _ability(rows: Sequence[Row], name: str) -> Estimate | None:
    values = [(row["dialogue_id"], row.get("abilities", {}).get(name)) for row in rows]
    return estimate([(dialogue, value) for dialogue, value in values if value is not None])


def _aha(data: str, models: Sequence[Scored]) -> Drawn | None:
    """How often an episode ends right whose first query failed or returned nothing, beside the
    other episodes."""
    starts = ("failed or returned nothing", "all other episodes")
    if not any("first_execution" in row for model in models for row in model.rows):
        return None
    found = []
    for model in models:
        bad = [row for row in model.rows if row.get("first_execution") in BAD_STARTS]
        rest = [row for row in model.rows if row.get("first_execution") not in BAD_STARTS]
        found.append([model.mean("ex", bad), model.mean("ex", rest)])
    figure = new_figure(
        HEIGHT, f"Aha share, EX by how the first query of the episode ended: {data}"
    )
    axes = figure.subplots()
    for number, row in enumerate(found):
        _draw_bars(axes, row, number, len(models), 0, with_counts=True)
    without = [all(row[place] is None for row in found) for place in range(len(starts))]
    _name_groups(
        axes,
        [f"{start} (none)" if no else start for start, no in zip(starts, without, strict=True)],
    )
    finish(axes, "", "EX, % of these episodes")
    _set_top(axes, [one for row in found for one in row if one], 100.0)
    _name_models(figure, models)
    table = [
        (model.name, start, *_cells(one))
        for model, row in zip(models, found, strict=True)
        for start, one in zip(starts, row, strict=True)
    ]
    header = ("checkpoint", "first query", "percent", "low", "high", "episodes")
    return Drawn(file_name("aha", data), figure, header, table)


def _draw_bars(
    axes: Axes,
    found: Sequence[Estimate | None],
    number: int,
    num_bars: int,
    digits: int,
    with_counts: bool = False,
) -> None:
    """The bar with this number of each group that has a value, with interval and value."""
    width = BAR_ROOM / num_bars
    count = num_bars * len(found)
    for place, one in enumerate(found):
        if one is None:
            continue
        x = place - BAR_ROOM / 2 + (number + 0.5) * width
        axes.bar(x, one.value, width * 0.94, **bar_style(number))
        top = one.value
        if one.interval is not None:
            low, high = (min(one.interval[0], top), max(one.interval[1], top))
            axes.plot([x, x], [low, high], color="0.15", linewidth=0.9)
            top = high
        text = f"{one.value:.{digits}f}"
        is_upright = count * (len(text) + 1) > MAX_FLAT
        if with_counts:
            text += f"{' ' if is_upright else chr(10)}of {one.count}"
        if count <= MAX_UPRIGHT:
            axes.annotate(
                text,
                (x, top),
                textcoords="offset points",
                xytext=(0, 2),
                horizontalalignment="center",
                rotation=90 if is_upright else 0,
                fontsize=7.5,
            )


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """The name of each group under its bars. A group without bars has its room, too."""
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.tick_params(axis="x", length=0)


def _set_top(axes: Axes, found: Sequence[Estimate], most: float) -> None:
    """From 0 to a little above the highest interval."""
    top = max(max(one.value, *(one.interval or (0.0,))) for one in found)
    axes.set_ylim(0, min(most, max(top, 0.05 * most)) * 1.15)
    axes.yaxis.set_major_locator(ShareLocator(most))


def _name_models(figure: Any, models: Sequence[Scored]) -> None:
    patches = [Patch(**bar_style(number)) for number in range(len(models))]
    legend(figure, patches, [model.name for model in models])


def _broken(name: str) -> str:
    """A name in two lines, where it says which update it is."""
    return name.replace(", update", ",\nupdate")


def _cells(one: Estimate | None) -> tuple[Any, ...]:
    if one is None:
        return (None, None, None, 0)
    low, high = one.interval or (None, None)
    return (one.value, low, high, one.count)
