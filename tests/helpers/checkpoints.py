"""Checkpoints without a model, and a disk that is full."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from mtsql.run.checkpoint import CheckpointConfig, save_checkpoint


def make_folder(folder: Path) -> None:
    """Save an empty model folder."""
    folder.mkdir()


def save_too_much(folder: Path) -> None:
    """Save a model of some 8,000 bytes, more than `full_disk(1000)` takes."""
    folder.mkdir()
    save_file({"w": torch.ones(2000)}, folder / "model.safetensors")


def write(
    run: Path,
    update: int,
    ex: dict[str, float] | None = None,
    config: CheckpointConfig | None = None,
    save_model: Callable[[Path], None] = make_folder,
) -> Path:
    """Write a checkpoint as a run does, and return its folder."""
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").touch()
    tensors = {"step/w": torch.ones(3)}
    save_checkpoint(run, update, save_model, tensors, {"ex": ex}, config or CheckpointConfig())
    return run / "checkpoints" / f"update-{update:05d}"


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Inside the `with` no file grows beyond `num_bytes`. A writer sees it as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
