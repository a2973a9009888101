"""Write and read checkpoints: what a killed run needs to continue as if uninterrupted:
bit for bit on a CPU, up to rounding on a GPU.

    <run>/checkpoints/update-00020/      after 20 updates
        model/                           an ordinary Hugging Face or peft folder: eval.py loads it
        optimizer.safetensors            Adam's averages by parameter name
        state.json                       update, curriculum (or the progress of train_sft.py),
                                         config, commit, bytes of metrics.jsonl, sizes of all files

A run is only resumed with the configuration and the inputs (inputs.py) that it was started with. No
generator state is stored, because every random number of an update is drawn from (seed, update,
rank). A checkpoint is written under another name, synced and renamed, so a folder with the name of
a checkpoint is complete. Nothing in it is ever unpickled.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtsql.files import WriteError, read_json, read_text, write_text
from mtsql.run.commit import git_commit
from mtsql.run.config import flat, to_dict
from mtsql.run.inputs import moved_keys
from mtsql.run.length import require_updates_left
from mtsql.run.recipes import read_yaml
from mtsql.run.runlog import writing

FORMAT = "mtsql-checkpoint-2"
MAY_CHANGE = (
    "run",
    "resume",
    "num_updates",
    "schedule_updates",
    "eval_every",
    "max_batch_tokens",
    "sft.max_batch_tokens",
    "engine.",
    "checkpoint.",
    "optim.offload",
    "sft.optim.offload",
    "model.gradient_checkpointing",
    "env.num_sql_workers",
    "trackers",
    "trajectories.",
)
"""Keys that a resumed run may change. Of these, only the batch and engine sizes change its
numbers, and `schedule_updates` those of updates to come. `check_unchanged` adds `eval_turns`."""
NEW_RUN = "--model.path CHECKPOINT/model"
OLDER_SOURCE = "by a source without this key, which cannot be resumed: "
NAME = re.compile("update-([0-9]+)")
LEFTOVERS = {
    ".": r"\.(model|training\.png|leave_out\.tsv|report\.md|demonstrations\.jsonl|config(-\d+)?"
    r"\.yaml|(inputs|scores|audit|farming|gold|tracker-id|versions(-\d+)?)\.json)\.(partial|old)",
    "checkpoints": r"\.update-[0-9]+\.(partial|old)",
    "eval": r"\.(train|held_out|dev|dev_seen)-[0-9]+\.json\.partial",
    "predictions": r"\..+\.sql\.partial",
    "rounds": r"\.base\.(partial|old)",
    "rounds/round*": r"\.(model|pool\.jsonl|chat_template\.jinja|"
    r"(coverage|held_out|dev|dev_seen)\.json)\.(partial|old)",
    "trajectories": r"\..+\.(txt|jsonl\.gz)\.partial",
}
"""Folder inside a run -> pattern of what a killed process leaves half written or half deleted."""
REPLACED = re.compile(r"\.(update-[0-9]+)\.replaced")
"""The name of a checkpoint while another one of the same update takes its place."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 10
    """Updates between two checkpoints. 0: only before the first update and after the last."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of further checkpoints to keep: those with the highest EX among the ones written at an
    evaluation. It is the EX that selects the model, or without a selection the mean of the
    splits."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(
                "checkpoint.every and checkpoint.keep_best must not be negative, and "
                "checkpoint.keep_last must be at least 1"
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
    """Write the checkpoint of `update` finished updates, then delete older ones as `config` says.

    `save_model(folder)` is called on every rank, because all ranks gather sharded weights. The main
    rank does the rest. WriteError that names the folder if the disk is full or the folder cannot be
    written; older checkpoints stay.
    """
    place = run / "checkpoints" / f"update-{update:05d}"
    partial = place.with_name(f".{place.name}.partial")
    replaced = place.with_name(f".{place.name}.replaced")
    try:
        with writing(f"checkpoint {place}"):
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            save_model(partial / "model")
            if not is_main:
                return
            save_file(optimizer, partial / "optimizer.safetensors")
            metrics = run / "metrics.jsonl"
            _sync(metrics)
            state = {
                "format": FORMAT,
                "update": update,
                **state,
                "commit": git_commit(),
                "metrics_bytes": metrics.stat().st_size,
                "files": _sizes(partial),
            }
            write_text(partial / "state.json", json.dumps(state))
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            if place.exists():  # Ctrl-C right after a checkpoint writes the same one again
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(place, replaced)
            os.replace(partial, place)
            _sync(place.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except WriteError:
        shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
        raise
    with writing(f"{place.parent} (to delete old checkpoints)"):
        _prune(run, config)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder in the order of their updates: folders whose name is exactly
    `update-` and a number."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    numbered = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            numbered.append((int(match[1]), path.name, path))
    return [path for _, _, path in sorted(numbered)]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, None if it has none yet."""
    return max(checkpoints(run)[-1:], default=None)


def what_is_kept(run: Path) -> str:
    """What is kept of a run that ends early, and how to continue."""
    resume = f"--resume {shlex.quote(str(run))}"
    newest = newest_checkpoint(run)
    # Those of the probe are in the first checkpoint.
    chunks = kept_chunks(run, "rounds") or (kept_chunks(run, "probe") if newest is None else "")
    kept = [str(newest)] * (newest is not None) + [chunks] * bool(chunks)
    if kept:
        is_one = len(kept) == 1 and (not chunks or chunks.startswith("1 "))
        return f"{' and '.join(kept)} {'is' if is_one else 'are'} kept: continue with {resume}"
    if (run / "config.yaml").is_file():
        return f"no checkpoint was written yet: {resume} starts over"
    return "nothing is kept: start it again with the same command"


def kept_chunks(run: Path, part: str) -> str:
    """How many finished chunks of rollouts a part of the run has kept (rl/sweep.py), such as "12
    chunks of rollouts". Empty without one."""
    num_chunks = 0
    for file in (run / part).rglob("rank*.jsonl"):
        with open(file, "rb") as lines:
            num_chunks += sum(line.endswith(b"\n") for line in lines)
    return f"{num_chunks} chunk{'s' * (num_chunks > 1)} of rollouts" if num_chunks else ""


def done_at_stop(run: Path, num_updates: int, is_saved: bool) -> str:
    """The message of a run that Ctrl-C or SIGTERM has stopped.

    is_saved: a checkpoint was written just now. That is impossible with sharded weights, because
    all ranks would have to gather them.
    """
    if is_saved:
        chunks = kept_chunks(run, "rounds")
        done = f"{num_updates} updates and {chunks}" if chunks else f"{num_updates} updates"
        return f"{done} are done; continue with --resume {shlex.quote(str(run))}"
    return (
        f"{num_updates} updates are done, but sharded weights cannot be written when a run is "
        f"stopped; {what_is_kept(run)}"
    )


def clean(run: Path) -> None:
    """Delete what a killed process of this run left half written. The caller holds the run's lock.

    Only files and folders with the names that this program uses for them are touched. A checkpoint
    that was being replaced when the process was killed gets its name back.
    """
    with writing(f"run {run} (to delete what a killed process left)"):
        for path in (run / "checkpoints").glob(".update-*.replaced"):
            match = REPLACED.fullmatch(path.name)
            if match is None:
                continue
            place = path.with_name(match[1])
            if place.exists():
                _delete(path)
            else:
                os.replace(path, place)
        for folder, names in LEFTOVERS.items():
            for path in run.glob(f"{folder}/*"):
                if re.fullmatch(names, path.name) and not path.is_symlink():
                    _delete(path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. `state` and `optimizer` belong to the weights in `folder`."""

    folder: Path
    state: dict[str, Any]
    optimizer: dict[str, torch.Tensor]

    @property
    def model(self) -> Path:
        """The folder of the weights."""
        return self.folder / "model"


def read_checkpoint(folder: Path, advice: str = "") -> Checkpoint:
    """Read a checkpoint. ValueError that names the file, with `advice` (by default that for a run
    to resume), if a part is missing, incomplete or not written by this program."""
    advice = advice or f"delete {folder} to resume from the checkpoint before it"
    try:
        state = read_json(folder / "state.json")
    except ValueError as error:
        raise ValueError(f"{folder / 'state.json'} cannot be read as JSON; {advice}") from error
    if not _is_state(state):
        raise ValueError(
            f"{folder} is not a checkpoint of this program or of this version (the format of its "
            f"state.json is not {FORMAT}): move it away to resume from the checkpoint before it"
        )
    if not _is_of(folder, state):
        raise ValueError(
            f"{folder} is a copy of the checkpoint of update {state['update']}: give it a name "
            "that does not look like a checkpoint, or move it away"
        )
    for name, size in state["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if found != size:
            raise ValueError(
                f"{folder / name} has {max(found, 0)} bytes instead of {size}; {advice}"
            )
    try:
        return Checkpoint(folder, state, load_file(folder / "optimizer.safetensors"))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / 'optimizer.safetensors'} is damaged ({error}); {advice}"
        ) from error


def resumed(config: Any) -> tuple[Any, Checkpoint | None]:
    """(config, newest checkpoint) of the run `config.resume`. There is no checkpoint for a new run,
    and none for a run that was killed before its first one, which starts over.

    Every rank reads the run folder, so all machines must see it. The main rank holds its lock.
    """
    if not config.resume:
        return config, None
    run = Path(config.resume)
    check_unchanged(config, run)
    newest = newest_checkpoint(run)
    begun = read_checkpoint(newest) if newest else None
    if begun is not None:
        require_updates_left(config, begun.state["update"], config.resume)
    if newest is None and has_updates(run):
        raise ValueError(
            f"resume {config.resume}: metrics.jsonl has updates, but there is no checkpoint of "
            "them: put the folder checkpoints back, or start a new run"
        )
    return replace(config, run=config.resume), begun


def has_updates(run: Path) -> bool:
    """Whether metrics.jsonl has a line of an RL update. The first checkpoint is written before the
    first update."""
    file = run / "metrics.jsonl"
    return file.is_file() and '"stage": "rl"' in read_text(file)


def check_unchanged(config: Any, run: Path) -> None:
    """ValueError for a changed key that a resumed run may not change. `inputs.check_files` compares
    the content of files that have another path now."""
    saved = flat(read_yaml(run / "config.yaml"))
    now = flat(to_dict(config))
    free = moved_keys(run)
    if getattr(config, "select_by", None) in (None, "none"):
        free.add("eval_turns")  # otherwise EX on different turns would select the model
    new_run = f"--from {run} --run NEW" if hasattr(config, "from_run") else NEW_RUN
    # Keys that the run does not have come first: with one, no flag makes it the same run.
    for key in sorted(saved.keys() | now.keys(), key=lambda key: (key in saved, key)):
        is_free = key.startswith(MAY_CHANGE) or key in free
        if saved.get(key) != now.get(key) and not is_free:
            before = f"with {saved[key]!r}: leave it, or " if key in saved else OLDER_SOURCE
            raise ValueError(
                f"{key} is {now.get(key)!r}, but {run} was started {before}"
                f"start a new run: {new_run if key in saved else NEW_RUN}"
            )


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The best of the checkpoints that are kept, with its held-out EX (mean over splits). None if
    none was written at an evaluation."""
    scores = {place: ex for place, ex in _scored(run).items() if ex is not None}
    return max(scores.items(), key=lambda item: item[1], default=None)


def _scored(run: Path) -> dict[Path, float | None]:
    """The checkpoints of this program in a run, with their held-out EX (mean over splits) if they
    were written at an evaluation."""
    found: dict[Path, float | None] = {}
    for place in checkpoints(run):
        try:
            state = read_json(place / "state.json")
        except ValueError:
            continue
        if _is_state(state) and _is_of(place, state) and not place.is_symlink():
            ex = state.get("ex")
            found[place] = sum(ex.values()) / len(ex) if ex else None
    return found


def _prune(run: Path, config: CheckpointConfig) -> None:
    """Delete the checkpoints that need not be kept. Folders of other programs stay."""
    found = _scored(run)
    scores = {place: ex for place, ex in found.items() if ex is not None}
    best = sorted(scores, key=lambda place: scores[place], reverse=True)[: config.keep_best]
    newest = list(found)[-config.keep_last :]
    for place in set(found) - set(newest) - set(best):
        # Renamed first, so that no incomplete folder has the name of a checkpoint.
        gone = place.with_name(f".{place.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(place, gone)
        shutil.rmtree(gone)


def _is_state(state: Any) -> bool:
    """Whether the content of a state.json is one that `save_checkpoint` has written."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return False
    files = state.get("files")
    ex = state.get("ex") or {}
    has_sizes = isinstance(files, dict) and all(type(size) is int for size in files.values())
    has_scores = isinstance(ex, dict) and all(type(x) in (int, float) for x in ex.values())
    return has_sizes and has_scores and type(state.get("update")) is int


def _is_of(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the name of a checkpoint's folder has the number of its update. A renamed copy with a
    higher number would always be taken for the newest checkpoint."""
    match = NAME.fullmatch(folder.name)
    return match is None or int(match[1]) == state["update"]


def _sizes(folder: Path) -> dict[str, int]:
    """The size of each file in a folder, by its path relative to the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
