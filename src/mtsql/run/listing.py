"""The runs below a folder: how far they are, their scores, and what differs in their
configurations."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtsql.files import read_json
from mtsql.run.config import flat
from mtsql.run.metrics_file import read_metrics
from mtsql.run.recipes import read_yaml

Row = dict[str, Any]
Kind = Literal["rl", "sft", "eval"]
INSIDE = (
    "checkpoints",
    "eval",
    "figures",
    "model",
    "predictions",
    "probe",
    "rounds",
    "tensorboard",
    "trajectories",
    "wandb",
)
"""Folders of a run in which there are no other runs."""
NEVER_COMPARED = ("run", "resume", "from_run", "keep", "dry_run")
"""Keys that say where a run is and not what it does."""
NEWEST = 5
"""The newest rows whose mean is the score of a run in a number of its updates, such as reward."""


@dataclass
class Run:
    """One run. done: such as 12/20 updates; for eval.py all or part. secs: the time of all rows, on
    the clock. scores: name -> number, EX and EM in percent. differs: keys of its configuration
    that have another value in another run of the same kind."""

    name: str
    kind: Kind
    done: str
    secs: float
    scores: dict[str, float]
    config: dict[str, Any]
    differs: dict[str, Any] = field(default_factory=dict)


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """All runs in a folder and below it, by name, and a line for each that cannot be read.

    ValueError if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    runs = []
    faults = []
    for place in _run_folders(folder):
        try:
            name = place.relative_to(folder) if place != folder else place.resolve().name
            run = read_run(place, str(name))
        except ValueError as error:
            faults.append(str(error))
            continue
        if run is not None:
            runs.append(run)
    for kind in ("rl", "sft", "eval"):
        _compare([run for run in runs if run.kind == kind])
    return runs, faults


def _run_folders(folder: Path) -> Iterator[Path]:
    """The folders that hold a metrics.jsonl, in the order of their names. Links are not followed,
    because they may lead back."""
    for place, folders, files in os.walk(folder):
        if "metrics.jsonl" in files:
            yield Path(place)
            folders[:] = [name for name in folders if name not in INSIDE]
        folders.sort()


def read_run(folder: Path, name: str) -> Run | None:
    """The run in a folder; None if nothing is logged yet. ValueError that names the file if one of
    its files is damaged."""
    rows = read_metrics(folder / "metrics.jsonl")
    file = folder / "config.yaml"
    config = flat(read_yaml(file)) if file.is_file() else {}
    secs = sum(row.get("wall_secs") or 0.0 for row in rows)
    if (folder / "scores.json").is_file():
        found = read_json(folder / "scores.json")
        done = "part" if _of(found, "is_complete", True) is False else "all"
        return Run(name, "eval", done, secs, _scores_of_parts(found), config)
    stages = {row.get("stage") for row in rows}
    updates = [row for row in rows if row.get("stage") == "rl"]
    evals = [row for row in rows if row.get("stage") == "eval" and "data" not in row]
    if updates or evals or "probe" in stages:
        last = updates[-1]["update"] if updates else 0
        done = f"{last}/{config.get('num_updates', '?')}"
        scores = _newest_means(updates) | _scores_of_model(folder, evals)
        return Run(name, "rl", done, secs, scores, config)
    steps = [row for row in rows if row.get("stage") not in ("collect", "eval", None)]
    if not rows:
        return None
    return Run(name, "sft", str(len(steps)), secs, _newest_means(steps), config)


def _of(found: Any, key: str, default: Any) -> Any:
    return found.get(key, default) if isinstance(found, dict) else default


def _scores_of_parts(found: Any) -> dict[str, float]:
    """EX and EM of each part of an evaluation: `dev_ex` as in training runs, for another data set
    its name (`cosql_dev_ex`), and for the model's own history `dev_ex_predicted`."""
    scores: dict[str, float] = {}
    for part in _of(found, "results", []):
        table = _of(part, "all", {})
        name = _of(part, "split", "?")
        if _of(part, "domain", "") == "out-of-domain":
            name = _of(part, "data", "?").replace(" ", "_")
        history = _of(part, "history", "gold")
        end = "" if history == "gold" else f"_{history}"
        for metric in ("ex", "em"):
            value = _of(table, metric, None)
            if isinstance(value, (int, float)):
                scores.setdefault(f"{name}_{metric}{end}", float(value))
    return scores


def _scores_of_model(folder: Path, evals: Sequence[Row]) -> dict[str, float]:
    """Held-out EX and EM of RUN/model, which may be that of an earlier update; before it is written
    those of the newest evaluation."""
    if not evals:
        return {}
    file = folder / "model" / "selected.json"
    update = _of(read_json(file), "update", None) if file.is_file() else None
    rows = [row for row in evals if row["update"] == update] or [evals[-1]]
    return {
        key: float(value)
        for key, value in rows[-1].items()
        if key.endswith(("_ex", "_em")) and value is not None
    }


def _newest_means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each number over the newest rows that have it."""
    newest = rows[-NEWEST:]
    keys = [key for key in (newest[-1] if newest else {}) if key not in ("time", "update")]
    found = {}
    for key in keys:
        values = [row.get(key) for row in newest]
        numbers = [one for one in values if isinstance(one, (int, float))]
        if numbers:
            found[key] = sum(numbers) / len(numbers)
    return found


def _compare(runs: Sequence[Run]) -> None:
    """Set `differs` of runs of one kind."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    for key in keys:
        values = [repr(run.config.get(key)) for run in runs]
        if key not in NEVER_COMPARED and len(set(values)) > 1:
            for run in runs:
                if key in run.config:
                    run.differs[key] = run.config[key]


def ranked(runs: Sequence[Run], by: str | None, is_lowest: bool) -> list[Run]:
    """The runs with this score, the best first, then the others by name."""
    with_score = [run for run in runs if by in run.scores]
    without = [run for run in runs if by not in run.scores]
    sign = 1 if is_lowest else -1
    return [*sorted(with_score, key=lambda run: sign * run.scores[str(by)]), *without]
