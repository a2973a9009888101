"""The figure of a run: its ranges, names and labels come from what the run wrote."""

import json
import math
import time
import warnings

import pytest
import yaml
from matplotlib.axes import Axes

from mtsql.run.plots import STAGE_NOTE, plot_training, smoothed, training_figure

WEIGHTS = {"ex": 1.0, "em": 1.0, "propose": 0.8, "overlong": 0.5}
TOY = {"data": {"toy_folder": "data/toyworld", "dev": None}}


@pytest.fixture(autouse=True)
def no_warnings():
    """Matplotlib warns of ranges of width 0, empty legends and characters that a font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def update(number: int, stage: int = 0, reward: float = 1.5, std: float = 1.0, **values) -> dict:
    row = {"stage": "rl", "update": number, "curriculum_stage": stage}
    return row | {"reward": reward, "reward_std": std} | values


def evaluation(number: int, **scores: float) -> dict:
    return {"stage": "eval", "update": number, **scores}


def axes_of(rows: list[dict], config: dict | None = None) -> tuple[Axes, Axes]:
    """The two axes, drawn once. Their ranges are finite and not empty."""
    figure = training_figure(rows, config or {}, "the run $x$_{")
    figure.canvas.draw()
    for axes in figure.axes:
        for low, high in (axes.get_xlim(), axes.get_ylim()):
            assert math.isfinite(low) and math.isfinite(high) and low < high
    rewards, scores = figure.axes
    return rewards, scores


def test_the_figure_of_a_very_long_run_takes_seconds():
    values = [float(number % 7) for number in range(100_000)]
    begun = time.perf_counter()
    smooth = smoothed(values, 5000)
    assert time.perf_counter() - begun < 2
    assert smooth[50_000] == pytest.approx(sum(values[47_500:52_501]) / 5001)
    assert smooth[0] == pytest.approx(sum(values[:2501]) / 2501)
    assert smoothed([1.0, 2.0, 6.0], 5) == [3.0, 3.0, 3.0]


def labels(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_run_has_a_figure_from_its_first_evaluation_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluation(0, dev_ex=33.3, dev_em=40.0)))
    plot_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "training.png"}
    rewards, scores = axes_of([evaluation(0, dev_ex=33.3, dev_em=40.0)])
    assert texts(rewards) == ["no update"] and labels(scores) == ["dev", "EX 33.3", "EM 40.0"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [update(1)],
        [update(1, reward=0.0, std=0.0)],
        [evaluation(0, dev_ex=0.0, dev_em=100.0), update(1)],
        [update(number, std=0.0) for number in range(1, 8)],
        [update(number, stage=number // 700) for number in range(1, 2001)],
    ],
    ids=["nothing", "no splits", "zeros", "ends of the range", "constant", "long"],
)
def test_every_run_has_ranges(rows):
    axes_of(rows)
    axes_of(rows, TOY | {"reward": {"weights": WEIGHTS}})


def test_ex_and_em_of_every_split_are_shown_by_name():
    rows = [
        evaluation(0, dev_seen_ex=46.3, dev_seen_em=85.3, dev_ex=33.7, dev_em=65.3, eval_secs=9.0),
        evaluation(20, dev_seen_ex=57.0, dev_seen_em=81.7, dev_ex=41.0, dev_em=61.3),
    ]
    _, scores = axes_of(rows)
    seen = ["EX 46.3 \u2192 57.0", "EM 85.3 \u2192 81.7"]
    unseen = ["EX 33.7 \u2192 41.0", "EM 65.3 \u2192 61.3"]
    assert labels(scores) == ["dev_seen", *seen, "dev", *unseen]
    low, high = scores.get_ylim()
    assert (low, high) == (30, 90)
    _, scores = axes_of([evaluation(0, dev_ex=0.0, dev_em=100.0)])
    assert min(scores.get_yticks()) == 0 and max(scores.get_yticks()) == 100
    _, scores = axes_of(rows, TOY)
    assert [labels(scores)[place] for place in (0, 3)] == [
        "dev_seen (seen databases)",
        "dev (unseen databases)",
    ]
    _, scores = axes_of(rows, {"data": {"toy_folder": "data/toyworld", "dev": "own.json"}})
    assert labels(scores)[3] == "dev"


def test_an_evaluation_that_a_resumed_run_repeats_is_one_point():
    rows = [evaluation(0, dev_ex=1.0), evaluation(20, dev_ex=2.0), evaluation(20, dev_ex=2.0)]
    _, scores = axes_of(rows)
    assert labels(scores) == ["dev", "EX 1.0 \u2192 2.0"]
    assert [len(line.get_xdata()) for line in scores.lines if len(line.get_xdata())] == [2]


def test_stages_count_from_one_and_each_has_a_shade():
    rows = [update(1), update(2), update(3, 1), update(4, 2)]
    rewards, scores = axes_of(rows)
    assert texts(rewards) == ["stage 1", "stage 2", "stage 3"]
    for axes in (rewards, scores):
        spans = [(span.get_x(), span.get_x() + span.get_width()) for span in axes.patches]
        assert spans == [(0.5, 2.5), (2.5, 3.5), (3.5, 4.5)]
        assert len({span.get_facecolor() for span in axes.patches}) == 3
    assert rewards.get_xlabel() == STAGE_NOTE


def test_a_single_stage_needs_no_note():
    rewards, _ = axes_of([update(1), update(2)])
    assert texts(rewards) == ["stage 1"] and rewards.get_xlabel() == ""


def test_the_range_of_the_reward_follows_from_the_weights(tmp_path):
    rows = [update(1, reward=2.5, **{"reward/ex": 0.9, "reward/propose": 0.8})]
    config = {"reward": {"weights": WEIGHTS}}
    rewards, _ = axes_of(rows, config)
    assert "highest possible: 1.8" in labels(rewards)
    low, high = rewards.get_ylim()
    assert low < 0 and high > 2.5  # a reward that occurred is shown, even one that seems impossible
    rows[0] |= {"reward": 1.0, "reward/overlong": -0.1}
    low, high = axes_of(rows, config)[0].get_ylim()
    assert -0.7 < low < -0.5 and 1.8 < high < 2.2
    extra = {"reward": {"weights": WEIGHTS | {"extra_replies": 2.0}}}
    low, high = axes_of([rows[0] | {"reward/extra_replies": -0.1}], extra)[0].get_ylim()
    assert -3 < low < -2.5 and 1.8 < high < 2.5
    rows[0]["reward/own"] = 1.0  # without a known weight
    assert not any("possible" in label for label in labels(axes_of(rows, config)[0]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]))
    plot_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")


def test_the_moving_mean_does_not_cross_a_stage():
    stages = [0] * 10 + [1] * 10
    rows = [update(n, stage, reward=2.0 - stage) for n, stage in enumerate(stages, 1)]
    rewards, _ = axes_of(rows)
    assert labels(rewards)[2] == "moving mean (5 updates)"
    smooth = [set(line.get_ydata()) for line in rewards.lines if line.get_color() == "black"]
    assert smooth == [{2.0}, {1.0}]
