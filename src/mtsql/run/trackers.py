"""Experiment trackers: the numbers of metrics.jsonl go to TensorBoard and others, too.

metrics.jsonl stays the record of a run. Accelerate's trackers write a copy of its numbers, and for
each update a table of some trajectories, on the main rank. The names below are those of
Accelerate's trackers that can keep everything on this machine and that go on with a run that is
resumed.

    tensorboard   files in RUN/tensorboard: tensorboard --logdir runs
    wandb         Weights & Biases: needs `wandb login`, or WANDB_MODE=offline (files in RUN/wandb)
    trackio       a local database: trackio show --project mtsql
    mlflow        MLFLOW_TRACKING_URI, or files in the current folder: mlflow ui
"""

import json
import re
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from mtsql.files import read_json, write_text
from mtsql.run.config import flat, to_dict

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
"""Names of trackers, which are those of their packages."""
Cell = str | int | float | None
Row = Sequence[Cell]
PROJECT = "mtsql"
"""The project in which a tracker keeps all runs."""
ID_FILE = "tracker-id.json"


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """ValueError for a tracker that is named twice, or that is not installed, with how to install
    it."""
    for name in trackers:
        if trackers.count(name) > 1:
            raise ValueError(f"trackers: {name} is named twice: name it once")
        if find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} is not installed: pip install {name}, or leave it out"
            )


def start_trackers(accelerator: Accelerator, run: Path, config: Any, first_step: int) -> None:
    """Start the trackers of the Accelerator with the resolved configuration of the run.

    `first_step` is the first step that will be logged: a resumed run repeats those after its
    checkpoint. TensorBoard then hides what it has of them. The others keep it, which makes no
    difference, since a resumed run repeats the same numbers.
    """
    if not accelerator.is_main_process:
        return
    kept = _identity(run)
    identity = kept["id"]
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flat(to_dict(config)).items()
    }
    options = {
        "tensorboard": {"purge_step": first_step},
        "wandb": {"id": identity, "name": str(run), "dir": str(run), "resume": "allow"},
        "trackio": {"name": f"{run.name}-{identity}", "resume": "allow"},
        "mlflow": {"run_name": f"{run.name}-{identity}", "run_id": kept.get("mlflow")},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name == "mlflow" and kept.get("mlflow"):
            continue  # it refuses a parameter that has changed, such as `resume`
        tracker.store_init_configuration(values)
        if tracker.name == "mlflow":
            kept["mlflow"] = tracker.tracker.info.run_id  # MLflow chooses it
            write_text(run / ID_FILE, json.dumps(kept) + "\n")


def tracked_numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl as trackers get them: `rl/reward`, `eval/dev_ex`."""
    numbers = {}
    for name, value in row.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name not in ("time", "update"):
            numbers[f"{row['stage']}/{name}"] = value
    return numbers


def log_table(
    accelerator: Accelerator, name: str, columns: Sequence[str], rows: Sequence[Row], step: int
) -> None:
    """Give the trackers a table of this update. rows: cells in the order of the columns.

    TensorBoard shows it as text; W&B, Trackio and MLflow have tables.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text(name, markdown_table(columns, rows), step)
        elif tracker.name == "wandb":
            tracker.log_table(name, columns=list(columns), data=list(map(list, rows)), step=step)
        elif tracker.name == "trackio":
            import trackio

            table = trackio.Table(columns=list(columns), data=list(map(list, rows)))
            tracker.log({name: table}, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            data = {key: list(cells) for key, cells in zip(columns, zip(*rows), strict=True)}
            mlflow.log_table(data, artifact_file=f"{name}/update-{step:05d}.json")


def markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table in Markdown. Whatever a cell holds stays text."""
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([_as_text(cell) for cell in row]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _as_text(cell: Cell) -> str:
    """A cell without what Markdown, HTML or a table would act on: a number, or text whose marks are
    HTML escapes."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    text = " ".join(str(cell).split())
    return re.sub(r"[&<>'\"\\`*_{}\[\]()#+!|~]", lambda mark: f"&#{ord(mark[0])};", text)


def _identity(run: Path) -> dict[str, str]:
    """The names of the run in the trackers. They are kept in the run folder, so that a resumed run
    goes on under them."""
    file = run / ID_FILE
    if not file.is_file():
        write_text(file, f'{{"id": "{secrets.token_hex(4)}"}}\n')
    kept: dict[str, str] = read_json(file)
    return kept
