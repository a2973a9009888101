"""A run folder: which checkpoints are its own, what a kill leaves in it, and a full disk."""

import json
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtsql.files import WriteError
from mtsql.run.checkpoint import (
    CheckpointConfig,
    checkpoints,
    clean,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from mtsql.run.launch import run_folder
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite, RunLog, check_free, git_commit, writing

GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]


EDITED = [
    {"files": None},
    {"files": []},
    {"files": {"x": "3"}},
    {"ex": 3},
    {"ex": {"dev": "x"}},
    {"update": None},
]


@dataclass(frozen=True)
class Config:
    run: str = "x"


def write(
    run, update, ex=None, config=CheckpointConfig(), save_model=lambda folder: folder.mkdir()
):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").touch()
    tensors = {"step/w": torch.ones(3)}
    save_checkpoint(run, update, save_model, tensors, {"ex": ex}, config)
    return run / "checkpoints" / f"update-{update:05d}"


@pytest.fixture
def full_disk():
    """full_disk(bytes): from then on no file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
        ".inputs.json.partial",
        ".model.partial/w",
        ".model.old/w",
        ".versions-00003.json.partial",
        "checkpoints/.update-00020.partial/model/w",
        "checkpoints/.update-00003.old/w",
        "checkpoints/.update-00007.replaced/w",
        "checkpoints/update-00007/w",
        "eval/.dev-00003.json.partial",
        "rounds/.round0.json.partial",
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


def too_much(folder):
    folder.mkdir()
    save_file({"w": torch.ones(2000)}, folder / "model.safetensors")


RECORD = {
    "reward": 1.0,
    "components": {},
    "turn_id": "t",
    "outcome": "answered",
    "gold_sql": "SELECT 1",
    "transcript": "x" * 2000,
}
WRITERS = {
    "metrics.jsonl": lambda run, log: log.metrics({"stage": "rl", "text": "x" * 2000}),
    "eval/dev-00000.json": lambda run, log: log.write_json("eval/dev-00000.json", ["x" * 2000]),
    "trajectories/update-00002.txt": lambda run, log: log.trajectories(2, [RECORD]),
    "config-00007.yaml": lambda run, log: go_on(run),
    "checkpoints/update-00002": lambda run, log: write(run, 2, save_model=too_much),
    "model": lambda run, log: save_in(run / "model"),
}


def go_on(run):
    size = (run / "metrics.jsonl").stat().st_size
    RunLog(run, Config("x" * 2000), resume_at=(7, size))


def save_in(folder):
    with writing(folder):
        too_much(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_line_that_says_what_is_kept(name, tmp_path, full_disk):
    run = tmp_path / "run"
    with (
        pytest.raises(ValueError) as error,  # noqa: PT011  the text is compared below
        run_folder(Ranks(), run),
    ):
        log = RunLog(run, Config())
        log.metrics({"stage": "rl", "update": 0})
        write(run, 1)
        whole = (run / "metrics.jsonl").read_text()
        full_disk(1000)
        WRITERS[name](run, log)
    full_disk(resource.RLIM_INFINITY)
    kept = f"{run}/checkpoints/update-00001 is kept: go on with --resume {run}"
    line = str(error.value).removeprefix("checkpoint ")
    assert line == f"{run / name}: cannot be written: File too large; {kept}" or (
        line.startswith(f"{run / name}: cannot be written: ") and line.endswith(f"; {kept}")
    )
    assert "\n" not in line and (run / "metrics.jsonl").read_text() == whole  # no half line
    assert read_checkpoint(newest_checkpoint(run)).state["update"] == 1
    with run_folder(Ranks(), run):
        assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("is_blocked", [False, True], ids=["free", "blocked"])
@pytest.mark.parametrize("name", list(WRITERS)[:3])
def test_a_deleted_run_folder_is_a_line(name, is_blocked, tmp_path):
    run = tmp_path / "run"
    log = RunLog(run, Config())
    shutil.rmtree(run)
    if is_blocked:
        run.write_text("a file in its place")
    with pytest.raises(WriteError, match=f"{run}/.*: cannot be written: "):
        WRITERS[name](run, log)
    assert not run.is_dir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda run: RunLog(run, Config()),
            "no checkpoint was written yet: --resume .* starts over",
        ),
        (lambda run: write(run, 3), "update-00003 is kept: go on with --resume"),
        (lambda run: None, "nothing is kept: start it again"),
    ],
    ids=["begun", "checkpoint", "nothing"],
)
def test_a_run_that_ends_before_its_time_says_how_to_go_on(make, words, tmp_path):
    for error in (NotFinite("loss is not finite"), KeyboardInterrupt()):
        run = tmp_path / type(error).__name__
        with (
            pytest.raises((ValueError, KeyboardInterrupt), match=words),
            run_folder(Ranks(), run),
        ):
            make(run)
            raise error


def test_a_value_that_is_not_finite_is_named(tmp_path):
    log = RunLog(tmp_path / "run", Config())
    with pytest.raises(NotFinite, match="grad_norm is not finite in rl update 3"):
        log.metrics({"stage": "rl", "update": 3, "grad_norm": float("nan")})


def repository(folder):
    folder.mkdir(parents=True)
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", "x"], cwd=folder, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


@pytest.fixture
def no_git_variables(monkeypatch):
    """A hook that runs the tests sets some."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


def test_the_commit_is_that_of_the_program(tmp_path, monkeypatch, no_git_variables):
    usual, foreign = git_commit(), repository(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert git_commit() == usual and foreign not in usual


def test_an_installed_program_has_no_commit(tmp_path, monkeypatch, no_git_variables):
    commit = repository(tmp_path / "project")
    package = tmp_path / "project/venv/site-packages/mtsql"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert git_commit(package) == "unknown"  # the repository around it is another one
    subprocess.run([*GIT, "add", "-f", str(package)], cwd=tmp_path / "project", check=True)
    assert git_commit(package) == f"{commit} (changed)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(package) == "unknown"  # there is no git


def test_the_provenance_of_a_run_is_json(tmp_path):
    RunLog(tmp_path / "run", Config())
    assert json.loads((tmp_path / "run/versions.json").read_text())["git"] == git_commit()


def test_a_folder_that_holds_a_run_is_refused_with_advice_that_the_script_can_follow(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"already holds a run: .* --run, or --resume "):
        check_free(tmp_path)
    with pytest.raises(ValueError, match="already holds a run: .* --run or remove it$"):
        check_free(tmp_path, can_resume=False)
