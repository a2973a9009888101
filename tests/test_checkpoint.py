"""Checkpoints on disk: what is written, kept, and refused when it is damaged."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtsql.run.checkpoint import (
    CheckpointConfig,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def make_folder(folder: Path) -> None:
    folder.mkdir()


def write(run, update=3, ex=None, config=CheckpointConfig(), save_model=None):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").touch()
    save_checkpoint(
        run,
        update,
        save_model or make_folder,
        {"step/w": torch.ones(3)},
        {"ex": ex},
        config,
    )
    return run / "checkpoints" / f"update-{update:05d}"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: os.truncate(f / "optimizer.safetensors", 20),
            "optimizer.safetensors has 20 bytes instead of",
        ),
        (
            lambda f: (f / "optimizer.safetensors").unlink(),
            "optimizer.safetensors has 0 bytes instead of",
        ),
        (lambda f: os.truncate(f / "state.json", 20), "state.json cannot be read"),
        (
            lambda f: (f / "state.json").write_text('{"step": 3}'),
            "not a checkpoint of this program",
        ),
        (lambda f: (f / "state.json").write_text("[]"), "not a checkpoint of this program"),
        (
            lambda f: (f / "optimizer.safetensors").write_bytes(bytes(92)),
            "damaged|bytes instead of",
        ),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_named(damage, words, tmp_path):
    folder = write(tmp_path / "run")
    assert read_checkpoint(folder).optimizer["step/w"].tolist() == [1, 1, 1]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(folder)


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    write(run, 1)

    def too_much(folder):
        folder.mkdir()
        save_file({"w": torch.ones(2000)}, folder / "model.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a writer sees it as a full disk
    try:
        with pytest.raises(ValueError, match="update-00002: cannot be written: .*File too large"):
            write(run, 2, save_model=too_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(run).name == "update-00001" and read_checkpoint(newest_checkpoint(run))
    assert write(run, 2) == newest_checkpoint(run)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for update, ex in enumerate([None, {"dev": 5.0}, {"dev": 9.0}, {"dev": 1.0}, None, None]):
        write(tmp_path, update, ex, CheckpointConfig(keep_last=2, keep_best=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"update-0000{n}" for n in (2, 4, 5)
    ]
