"""A run folder under its lock: what a full disk, a stop or a deleted folder leaves, and what the
error says."""

import shutil
from dataclasses import dataclass

import pytest

from helpers.checkpoints import full_disk, save_too_much, write
from mtsql.files import WriteError
from mtsql.run.checkpoint import newest_checkpoint, read_checkpoint
from mtsql.run.launch import run_folder
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite, RunLog, check_free, writing


@dataclass(frozen=True)
class Config:
    run: str = "x"


WRITERS = {
    "metrics.jsonl": lambda run, log: log.metrics({"stage": "rl", "text": "x" * 2000}),
    "eval/dev-00000.json": lambda run, log: log.write_json("eval/dev-00000.json", ["x" * 2000]),
    "trajectories/update-00002.txt": lambda run, log: log.trajectories(
        "update-00002.txt", "x" * 2000
    ),
    "config-00007.yaml": lambda run, log: go_on(run),
    "checkpoints/update-00002": lambda run, log: write(run, 2, save_model=save_too_much),
    "model": lambda run, log: save_in(run / "model"),
}


def go_on(run):
    size = (run / "metrics.jsonl").stat().st_size
    RunLog(run, Config("x" * 2000), resume_at=(7, size))


def save_in(folder):
    with writing(folder):
        save_too_much(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_line_that_says_what_is_kept(name, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError) as error, run_folder(Ranks(), run):
        log = RunLog(run, Config())
        log.metrics({"stage": "rl", "update": 0})
        write(run, 1)
        text = (run / "metrics.jsonl").read_text()
        with full_disk(1000):
            WRITERS[name](run, log)
    line = str(error.value).removeprefix("checkpoint ")
    assert line.startswith(f"{run / name}: cannot be written: ") and "\n" not in line
    kept = f"{run}/checkpoints/update-00001 is kept: continue with --resume {run}"
    assert line.endswith(f"; {kept}")
    assert (run / "metrics.jsonl").read_text() == text  # without half a line
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
        (lambda run: write(run, 3), "update-00003 is kept: continue with --resume"),
        (lambda run: None, "nothing is kept: start it again"),
    ],
    ids=["begun", "checkpoint", "nothing"],
)
def test_a_run_that_ends_early_says_how_to_continue(make, words, tmp_path):
    for error in (NotFinite("loss is not finite"), KeyboardInterrupt()):
        run = tmp_path / type(error).__name__
        with (
            pytest.raises((ValueError, KeyboardInterrupt), match=words),
            run_folder(Ranks(), run),
        ):
            make(run)
            raise error


def test_a_run_whose_name_is_not_utf_8_does_not_begin(tmp_path):
    with pytest.raises(ValueError, match=r"^run '.*/run\\udcff': the name is not UTF-8"):
        check_free(tmp_path / "run\udcff")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_with_advice_that_the_script_can_follow(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"already holds a run: .* --run, or --resume "):
        check_free(tmp_path)
    with pytest.raises(ValueError, match="already holds a run: .* --run or remove it$"):
        check_free(tmp_path, can_resume=False)


@pytest.mark.parametrize("name", ["checkpoints", "rounds", "inputs.json"])
def test_a_folder_of_a_run_whose_log_was_deleted_is_refused(name, tmp_path):
    (tmp_path / name).mkdir()  # a resumed run would take it for its own
    with pytest.raises(ValueError, match=f"^run {tmp_path} holds {name} of a run whose metrics"):
        check_free(tmp_path)
