"""Experiment trackers: the numbers of metrics.jsonl go to TensorBoard and others, too.

metrics.jsonl stays the record of a run. Accelerate's trackers write a copy of its numbers, on the
main rank. The names below are those of Accelerate's trackers that can keep everything on this
machine and that go on with a run that is resumed.

    tensorboard   files in RUN/tensorboard: tensorboard --logdir runs
    wandb         Weights & Biases: needs `wandb login`, or WANDB_MODE=offline (files in RUN/wandb)
    trackio       a local database: trackio show --project mtsql
"""

import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from mtsql.files import read_json, write_text
from mtsql.run.config import flat, to_dict

Tracker = Literal["tensorboard", "wandb", "trackio"]
"""Names of trackers, which are those of their packages."""
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
    identity = _identity(run)
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flat(to_dict(config)).items()
    }
    options = {
        "tensorboard": {"purge_step": first_step},
        "wandb": {"id": identity, "name": str(run), "dir": str(run), "resume": "allow"},
        "trackio": {"name": f"{run.name}-{identity}", "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)


def tracked_numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl as trackers get them: `rl/reward`, `eval/dev_ex`."""
    numbers = {}
    for name, value in row.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name not in ("time", "update"):
            numbers[f"{row['stage']}/{name}"] = value
    return numbers


def _identity(run: Path) -> str:
    """The run's name among all runs of the project. It is kept in the run folder, so that a resumed
    run goes on under it."""
    file = run / ID_FILE
    if not file.is_file():
        write_text(file, f'{{"id": "{secrets.token_hex(4)}"}}\n')
    identity: str = read_json(file)["id"]
    return identity
