"""Checkpoints: everything a killed run needs to go on bit for bit as if it had not been killed.

    <run>/checkpoints/update-00020/      after 20 updates
        model/                           an ordinary Hugging Face or peft folder: eval.py loads it
        optimizer.safetensors            Adam's averages by parameter name
        state.json                       update, curriculum (or the place in train_sft.py's rounds), config, commit, bytes
                                         of metrics.jsonl, sizes of all files
    <run>/inputs.json                    hashes of the turns, the prompts, the tokens and the first
                                         weights: a run goes on only if they are the same

No generator state is stored: every random number of an update is drawn from (seed, update, rank). A checkpoint is
written beside its place, synced and renamed, so a folder of that name is whole. Nothing in it is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtsql.config import flat, to_dict
from mtsql.runlog import git_commit

FORMAT = "mtsql-checkpoint-1"
MAY_CHANGE = (
    "run", "resume", "eval_every", "eval_turns", "max_batch_tokens", "sft.max_batch_tokens", "engine.", "checkpoint.",
    "optim.offload", "sft.optim.offload", "model.gradient_checkpointing", "env.num_sql_workers",
)  # fmt: skip
"""Keys that a resumed run may change; all but the batch and engine sizes leave its numbers as they were."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 10
    """Updates between two checkpoints; 0: only before the first update and after the last."""
    keep_last: int = 2
    """Keep so many of the newest."""
    keep_best: int = 1
    """Keep besides so many with the highest held-out EX (mean over splits) among those taken at an evaluation."""

    def __post_init__(self):
        if self.every < 0 or self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(
                "checkpoint.every and keep_best must not be negative, "
                "checkpoint.keep_last at least 1"
            )


def save_checkpoint(
    run: Path,
    update: int,
    save_model: Callable[[Path], None],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    config: CheckpointConfig,
    is_main: bool = True,
) -> None:
    """Write the checkpoint of `update` finished updates, then delete those not to be kept.

    `save_model(folder)` is called on every rank (sharded weights are gathered by all), the rest is the main rank's.
    ValueError naming the folder if the disk is full or the folder cannot be written; older checkpoints stay.
    """
    place = run / "checkpoints" / f"update-{update:05d}"
    partial = place.with_name(f".{place.name}.partial")
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        save_model(partial / "model")
        if not is_main:
            return
        save_file(optimizer, partial / "optimizer.safetensors")
        metrics = run / "metrics.jsonl"
        _sync(metrics)
        files = {
            str(f.relative_to(partial)): f.stat().st_size
            for f in sorted(partial.rglob("*"))
            if f.is_file()
        }
        state = {"format": FORMAT, "update": update, **state, "commit": git_commit(),
                 "metrics_bytes": metrics.stat().st_size, "files": files}  # fmt: skip
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _remove(place)  # of the same update, when Ctrl-C came right after it was written
        os.replace(partial, place)
        _sync(place.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"checkpoint {place} could not be written: {reason}; resume from the one before it"
        ) from error
    _prune(place.parent, config)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, None if it has none yet."""
    return max((run / "checkpoints").glob("update-*"), default=None)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(state, optimizer tensors). ValueError naming the file if anything is missing, cut short or not ours."""
    advice = f"delete {folder} to resume from the checkpoint before it"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'state.json'} cannot be read as JSON; {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is not a checkpoint of this program (its format is not {FORMAT})"
        )
    for name, size in state["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if found != size:
            raise ValueError(
                f"{folder / name} has {max(found, 0)} bytes instead of {size}; {advice}"
            )
    try:
        return state, load_file(folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'optimizer.safetensors'} is damaged ({error}); {advice}"
        ) from error


def resumed(config: Any) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """(config, state, optimizer tensors) of the newest checkpoint of the run `config.resume` to go on with, empty for a
    new run and for one that was killed before its first checkpoint: it starts over. Every rank reads the run folder, so
    all machines must see it."""
    if not config.resume:
        return config, {}, {}
    check_unchanged(config, Path(config.resume))
    newest = newest_checkpoint(Path(config.resume))
    state, averages = read_checkpoint(newest) if newest else ({}, {})
    return replace(config, run=config.resume), state, averages


def check_unchanged(config: Any, run: Path) -> None:
    """ValueError for a key whose change would make the resumed run another run."""
    saved = flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    now = flat(to_dict(config))
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise ValueError(
                f"{key} is {now.get(key)!r}, but {run} was started with {saved.get(key)!r}: leave it, or start a new "
                "run with --model.path on a checkpoint's model folder"
            )


def keep_inputs(run: Path, inputs: dict[str, str]) -> None:
    """Write down what goes into a run besides its configuration, as hashes by name, in inputs.json.
    What the file has already stays."""
    file = run / "inputs.json"
    if not file.is_file():
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)


def check_inputs(run: Path, inputs: dict[str, str]) -> None:
    """ValueError for an input that is another one than `keep_inputs` has written down."""
    file = run / "inputs.json"
    if not file.is_file():
        return
    try:
        saved = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as a JSON object: {error}") from error
    for name, value in inputs.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume {run}: {name} changed since the run was started: undo the change, or "
                "start a new run with --model.path on a checkpoint's model folder"
            )


def _prune(folder: Path, config: CheckpointConfig) -> None:
    places = sorted(folder.glob("update-*"))
    found = {p: json.loads((p / "state.json").read_text(encoding="utf-8"))["ex"] for p in places}
    scores = {p: sum(ex.values()) / len(ex) for p, ex in found.items() if ex}
    best = sorted(scores, key=lambda p: -scores[p])[: config.keep_best]
    for place in set(places) - set(places[-config.keep_last :]) - set(best):
        _remove(place)


def _remove(place: Path) -> None:
    """Rename first: a name like a checkpoint's never belongs to half of one."""
    if place.exists():
        gone = place.with_name(f".{place.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(place, gone)
        shutil.rmtree(gone)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
