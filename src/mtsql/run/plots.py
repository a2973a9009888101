"""Plot the figures of a run from the files that it wrote."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first


def plot_training(metrics_file: Path, png: Path) -> None:
    """Reward over updates (mean, one standard deviation, curriculum stages shaded) and held-out EX,
    as one PNG."""
    text = Path(metrics_file).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    updates = [line for line in lines if line["stage"] == "rl"]
    evals = [line for line in lines if line["stage"] == "eval"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    x = [line["update"] + 1 for line in updates]
    mean = [line["reward"] for line in updates]
    std = [line["reward_std"] for line in updates]
    low = [m - s for m, s in zip(mean, std, strict=True)]
    high = [m + s for m, s in zip(mean, std, strict=True)]
    top.plot(x, mean, label="mean reward")
    top.fill_between(x, low, high, alpha=0.2, label="one standard deviation")
    for axis in (top, bottom):
        for line in updates:
            if line["curriculum_stage"] % 2:
                axis.axvspan(line["update"] + 0.5, line["update"] + 1.5, color="0.93", zorder=0)
    top.set_ylabel("reward")
    top.set_title("Curriculum GRPO: training reward (shading: second stage)")
    top.legend(loc="lower right")
    names = {"dev_seen_ex": "seen databases", "dev_ex": "unseen databases"}
    for key, name in names.items():
        points = [(line["update"], line[key]) for line in evals if key in line]
        if points:
            bottom.plot(*zip(*points, strict=True), marker="o", label=name)
    bottom.set_ylabel("execution match (%)")
    bottom.set_xlabel("update")
    bottom.set_title("Held-out turns, greedy, gold history")
    bottom.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(png, dpi=120)
    plt.close(figure)
