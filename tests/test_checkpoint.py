"""Checkpoints on disk: what is written, kept and deleted, and what is refused."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import train_rl
import yaml

from helpers.checkpoints import full_disk, save_too_much, write
from mtsql.run.checkpoint import (
    CheckpointConfig,
    check_unchanged,
    checkpoints,
    clean,
    newest_checkpoint,
    read_checkpoint,
)
from mtsql.run.config import as_yaml, to_dict


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
    folder = write(tmp_path / "run", 3)
    assert read_checkpoint(folder).optimizer["step/w"].tolist() == [1, 1, 1]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(folder)


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    write(run, 1)
    with (
        full_disk(1000),
        pytest.raises(ValueError, match="update-00002: cannot be written: .*File too large"),
    ):
        write(run, 2, save_model=save_too_much)
    assert newest_checkpoint(run).name == "update-00001" and read_checkpoint(newest_checkpoint(run))
    assert write(run, 2) == newest_checkpoint(run)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for update, ex in enumerate([None, {"dev": 5.0}, {"dev": 9.0}, {"dev": 1.0}, None, None]):
        write(tmp_path, update, ex, CheckpointConfig(keep_last=2, keep_best=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"update-0000{n}" for n in (2, 4, 5)
    ]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for update in (99999, 100000, 20):
        write(tmp_path, update, config=CheckpointConfig(keep_last=9))
    names = ["update-00020", "update-99999", "update-100000"]
    assert [path.name for path in checkpoints(tmp_path)] == names
    write(tmp_path, 100001, config=CheckpointConfig(keep_last=2, keep_best=0))
    assert [path.name for path in checkpoints(tmp_path)] == ["update-100000", "update-100001"]


NEIGHBOURS = (
    "update-best",
    "update-00020.bak",
    "update-00020 (copy)",
    "update-",
    "update-0x30",
    "update--5",
    "update-٣",
    "Update-00030",
    "my-notes",
    "update-00030\n",
    ".update-00002.partial.txt",
)


EDITED = [
    {"files": None},
    {"files": []},
    {"files": {"x": "3"}},
    {"ex": 3},
    {"ex": {"dev": "x"}},
    {"update": None},
]


@pytest.mark.parametrize("change", EDITED)
def test_a_state_that_was_edited_is_named_and_left_alone(change, tmp_path):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match="update-00001 is not a checkpoint of this program"):
        read_checkpoint(folder)
    write(tmp_path, 2, config=CheckpointConfig(keep_last=1, keep_best=0))
    assert folder.is_dir()


def test_a_copy_with_a_higher_number_is_not_taken_for_the_newest(tmp_path):
    copy = tmp_path / "checkpoints/update-00900"
    shutil.copytree(write(tmp_path, 1), copy)
    with pytest.raises(ValueError, match="update-00900 is a copy of the checkpoint of update 1"):
        read_checkpoint(newest_checkpoint(tmp_path))
    keeps_one = CheckpointConfig(keep_last=1, keep_best=0)
    assert write(tmp_path, 2, config=keeps_one).is_dir() and copy.is_dir()
    assert not (tmp_path / "checkpoints/update-00001").exists()


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_is_neither_read_nor_deleted(name, tmp_path):
    own = write(tmp_path, 2)
    shutil.copytree(own, own.with_name(name))
    (own.parent / "update-00040").write_text("a plain file")
    for update in (3, 4, 5):
        write(tmp_path, update, config=CheckpointConfig(keep_last=1, keep_best=0))
    clean(tmp_path)
    assert newest_checkpoint(tmp_path).name == "update-00005"
    found = {path.name for path in own.parent.iterdir()}
    assert found == {name, "update-00005", "update-00040"}
    assert (own.parent / name / "state.json").is_file()


@pytest.mark.parametrize("state", [None, "{", "[]", '{"format": "other"}'])
def test_a_folder_of_that_name_without_our_state_is_not_deleted(state, tmp_path):
    foreign = tmp_path / "checkpoints/update-00001"
    foreign.mkdir(parents=True)
    if state is not None:
        (foreign / "state.json").write_text(state)
    for update in (2, 3, 4):
        write(tmp_path, update, config=CheckpointConfig(keep_last=1, keep_best=0))
    names = sorted(path.name for path in foreign.parent.iterdir())
    assert names == ["update-00001", "update-00004"]


def test_leftovers_of_a_kill_are_deleted_and_nothing_else(tmp_path):
    ours = [
        ".config.yaml.partial",
        ".config-00020.yaml.partial",
        ".demonstrations.jsonl.partial",
        ".gold.json.partial",
        ".inputs.json.partial",
        ".model.partial/w",
        ".model.old/w",
        ".report.md.partial",
        ".versions-00003.json.partial",
        "checkpoints/.update-00020.partial/model/w",
        "checkpoints/.update-00003.old/w",
        "checkpoints/.update-00007.replaced/w",
        "checkpoints/update-00007/w",
        "eval/.dev-00003.json.partial",
        "predictions/.dev-gold.sql.partial",
        "rounds/.base.partial/w",
        "rounds/round0/.model.partial/w",
        "rounds/round0/.chat_template.jinja.partial",
        "rounds/round12/.coverage.json.partial",
        "rounds/round12/.pool.jsonl.partial",
        "trajectories/.update-00002.txt.partial",
    ]
    others = [
        ".notes.json.partial",
        ".model.partial.bak",
        "model.partial",
        "checkpoints/.update-best.partial/w",
        "checkpoints/.update-00003.old.bak/w",
        "eval/.my-dev.json.partial",
        ".gitignore",
        "model/w",
        "wandb/.inputs.json.partial",
    ]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".scores.json.partial").symlink_to(tmp_path / "model")
    clean(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*others, "checkpoints/update-00007/w"}
    assert (tmp_path / ".scores.json.partial").is_symlink()
    clean(tmp_path / "nowhere")


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    """Ctrl-C right after a checkpoint writes the same one again; a kill in between loses
    neither."""
    place = write(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies_at(place, os.replace))
        with pytest.raises(Killed):
            write(tmp_path, 3)
    assert newest_checkpoint(tmp_path) is None
    clean(tmp_path)
    assert newest_checkpoint(tmp_path) == place and read_checkpoint(place).state["update"] == 3
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def dies_at(place, replace):
    def replace_or_die(source, target):
        if Path(target) == place:
            raise Killed
        replace(source, target)

    return replace_or_die


class Killed(BaseException):  # noqa: N818
    """Stands for SIGKILL: nothing is tidied up after it."""


def test_a_changed_key_is_named_when_a_run_is_resumed(tmp_path):
    started = train_rl.Config()
    (tmp_path / "config.yaml").write_text(as_yaml(started))
    check_unchanged(started, tmp_path)
    check_unchanged(replace(started, checkpoint=CheckpointConfig(every=7)), tmp_path)
    check_unchanged(replace(started, num_updates=9, schedule_updates=40), tmp_path)
    check_unchanged(replace(started, eval_turns=9), tmp_path)
    selecting = replace(started, eval_splits=("dev",), select_by="dev")
    (tmp_path / "config.yaml").write_text(as_yaml(selecting))
    with pytest.raises(ValueError, match="eval_turns is 9, but .* was started with 300: leave it"):
        check_unchanged(replace(selecting, eval_turns=9), tmp_path)
    (tmp_path / "config.yaml").write_text(as_yaml(started))
    changed = replace(started, group_size=9)
    words = f"group_size is 9, but {tmp_path} was started with {started.group_size}: leave it, or"
    with pytest.raises(ValueError, match=re.escape(f"{words} start a new run: --from {tmp_path}")):
        check_unchanged(changed, tmp_path)
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    without = [line for line in lines if not line.startswith("group_size:")]
    (tmp_path / "config.yaml").write_text("".join(without))
    words = "was started by a source without this key, which cannot be resumed: start a new run"
    with pytest.raises(ValueError, match=words):
        check_unchanged(started, tmp_path)


def test_a_run_of_an_older_source_is_refused_for_the_key_that_it_does_not_have(tmp_path):
    """Not for one whose value has another form now, which no flag can undo."""
    older = to_dict(train_rl.Config())
    del older["model"]["few_rows"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    with pytest.raises(ValueError, match="^model.few_rows is .* which cannot be resumed"):
        check_unchanged(train_rl.Config().completed(), tmp_path)
