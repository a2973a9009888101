"""What the live display of a training run says: the newest update, or the newest optimizer steps of
SFT, in a few named lines."""

from collections.abc import Sequence
from typing import Any

from mtsql.run.live import Lines, current, sparkline
from mtsql.run.screen import duration, percent, rate, short

Row = dict[str, Any]
NEWEST = 5
"""Updates whose endings and shares of time are shown as means."""
TIMES = {
    "rollout_secs": "rollouts",
    "learn_secs": "learning",
    "step_secs": "learning",
    "eval_secs": "evaluation",
    "probe_secs": "probe",
}
"""Timers of metrics.jsonl, and what their time goes to."""


def update_panel(rows: Sequence[Row], num_updates: int, secs_left: float) -> Lines:
    """The lines of train_rl.py after an update. rows: all rows of the run, of which the last one
    is an update with its rates."""
    updates = [row for row in rows if row["stage"] == "rl"]
    row = updates[-1]
    newest = updates[-NEWEST:]
    same_stage = [one for one in updates if one["curriculum_stage"] == row["curriculum_stage"]]
    kl = row["loss/kl"] if row["loss/kl"] is not None else row.get("reward_kl")
    return (
        (
            "update",
            (
                f"{row['update']}/{num_updates}",
                f"stage {row['curriculum_stage'] + 1}",
                f"{duration(secs_left)} left",
            ),
        ),
        ("reward", (f"{row['reward']:.3f}", sparkline([one["reward"] for one in same_stage]))),
        ("", _terms(row, "reward/", short)),
        ("held-out", _held_out(rows)),
        ("endings", _shares(newest, "outcome/")),
        (
            "policy",
            (
                f"entropy {short(row['loss/entropy'])}",
                f"KL {short(kl)}",
                f"grad {short(row['grad_norm'])}",
                f"zero-variance {percent(row.get('zero_variance_frac'))} %",
                f"length {short(row.get('response_tokens'))} tokens",
            ),
        ),
        (
            "tokens/s",
            (
                f"sampled {rate(row.get('rollout_tokens_per_sec'))}",
                f"learned {rate(row.get('learn_tokens_per_sec'))}",
                f"MFU {percent(row.get('learn_mfu'))} %",
            ),
        ),
        ("time", _times(rows)),
        ("warned", _warnings(updates)),
    )


def show_held_out(rows: Sequence[Row]) -> None:
    """Put the newest evaluation into the live display of this process, if there is one. rows: all
    rows of the run."""
    live = current()
    if live is not None:
        live.replace("held-out", _held_out(rows))


def step_panel(
    rows: Sequence[Row], stage: str, num_done: int, num_steps: int, secs_left: float | None
) -> Lines:
    """The lines of train_sft.py after an optimizer step. rows: all rows of the run. secs_left: of
    this stage; None if it is not known yet."""
    steps = [row for row in rows if row["stage"] == stage]
    row = steps[-1]
    newest = steps[-NEWEST:]
    loss = sum(one["loss"] for one in newest) / len(newest)
    left = "" if secs_left is None else f"{duration(secs_left)} left"
    return (
        ("step", (f"{num_done}/{num_steps}", stage, left)),
        ("loss", (short(loss), sparkline([one["loss"] for one in steps]))),
        ("policy", (f"grad {short(row['grad_norm'])}", f"lr {short(row['lr'])}")),
        (
            "tokens/s",
            (
                f"learned {rate(row.get('tokens_per_sec'))}",
                f"MFU {percent(row.get('learn_mfu'))} %",
            ),
        ),
        ("time", _times(rows)),
    )


def _terms(row: Row, prefix: str, text: Any) -> list[str]:
    """Each component of the reward with its mean."""
    return [
        f"{key.removeprefix(prefix)} {text(value)}"
        for key, value in row.items()
        if key.startswith(prefix) and value is not None
    ]


def _held_out(rows: Sequence[Row]) -> list[str]:
    """EX of each split: before training, now, and after how many updates that was."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if row["stage"] == "eval" and key.endswith("_ex"):
                found.setdefault(key.removesuffix("_ex"), []).append((row["update"], value))
    texts = []
    for split, points in found.items():
        (_, first), (update, last) = points[0], points[-1]
        text = f"{split} EX {first:.1f}"
        texts.append(text if len(points) == 1 else f"{text} -> {last:.1f} (update {update})")
    return texts


def _shares(rows: Sequence[Row], prefix: str) -> list[str]:
    """The mean shares of the keys with this prefix, the largest first, without zeros."""
    means = {
        key.removeprefix(prefix): sum(row.get(key) or 0.0 for row in rows) / len(rows)
        for key in rows[-1]
        if key.startswith(prefix)
    }
    ordered = sorted(means.items(), key=lambda item: -item[1])
    return [f"{name} {percent(share)} %" for name, share in ordered if share >= 0.0005]


def _times(rows: Sequence[Row]) -> list[str]:
    """Where the time of the run has gone, in shares of all of it."""
    total = sum(row.get("wall_secs") or 0.0 for row in rows)
    secs: dict[str, float] = {}
    for key, name in TIMES.items():
        secs[name] = secs.get(name, 0.0) + sum(row.get(key) or 0.0 for row in rows)
    if total <= 0:
        return []
    secs["other"] = max(0.0, total - sum(secs.values()))
    ordered = sorted(secs.items(), key=lambda item: -item[1])
    return [f"{name} {percent(one / total)} %" for name, one in ordered if one >= 0.0005 * total]


def _warnings(updates: Sequence[Row]) -> list[str]:
    """The names of the warnings given so far, each with its update."""
    return [
        f"{name} (update {row['update']})"
        for row in updates
        for name in (row.get("warning") or "").split(", ")
        if name
    ]
