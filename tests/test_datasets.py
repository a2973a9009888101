"""Splits from named files, and turns that a file leaves out of training."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.databases import make_database, tables_json
from mtsql.run.signals import stoppable
from mtsql.sql import datasets
from mtsql.sql.datasets import DataConfig, describe_skipped, load_split, read_leave_out, toy_files
from mtsql.sql.dialogues import Corpus, Skip
from mtsql.workbench import load_corpora


@pytest.fixture
def config(tmp_path):
    """config(text) gives a configuration whose leave-out file holds the text. The training split
    has three dialogues of two turns."""
    interaction = [{"utterance": f"q{i}", "query": f"SELECT {i}"} for i in range(2)]
    dialogues = []
    for db_id in ("one", "one", "two"):
        dialogues.append({"database_id": db_id, "interaction": interaction})
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text(json.dumps(dialogues))
    (tmp_path / "tables.json").write_text(tables_json("one", "two"))
    for db_id in ("one", "two"):
        make_database(tmp_path / db_id / f"{db_id}.sqlite")

    def config(text):
        (tmp_path / "out.tsv").write_text(text, encoding="utf-8")
        names = {key: str(tmp_path / f"{key}.json") for key in ("train", "dev", "tables")}
        return DataConfig(**names, databases=str(tmp_path), leave_out=str(tmp_path / "out.tsv"))

    return config


def test_turns_that_are_left_out_stay_in_the_history_of_later_turns(config):
    corpus = load_split(config("train:0:0\tgold fails: a\ntrain:2:0\tgold fails: b\n"), "train")
    assert [turn.turn_id for turn in corpus.turns] == [
        "train:0:1",
        "train:1:0",
        "train:1:1",
        "train:2:1",
    ]
    assert corpus.turns[0].history == (("q0", "SELECT 0"),)
    assert corpus.left_out == {"train:0:0": "gold fails: a", "train:2:0": "gold fails: b"}
    assert describe_skipped(corpus) == "left out 2 turns (2 gold fails)"


def test_a_dialogue_is_left_out_with_its_last_turn(config):
    corpus = load_split(config("train:1:0\tx\ntrain:1:1\ty\n"), "train")
    assert [dialogue.dialogue_id for dialogue in corpus.dialogues] == ["train:0", "train:2"]
    assert describe_skipped(corpus) == "left out 2 turns (1 x, 1 y)"


def test_skipped_turns_are_counted_by_reason():
    reasons = [("no file a", 3, 0), ("no file a", 1, 0), ("no file b", 2, 1), ("x", 2, 2)]
    skipped = [Skip("t.json", index, reason, num) for reason, num, index in reasons]
    skipped += [Skip("t.json", 3 + index, f"rare {index}", 1) for index in range(2)]
    assert describe_skipped(Corpus([], {}, skipped)) == (
        "skipped 10 unusable turns of 5 dialogues (4 no file a, 2 no file b, 2 x, "
        "2 for other reasons)"
    )


def test_the_first_rank_prints_what_is_left_out(config, capsys, monkeypatch):
    load_corpora(config("train:1:0\tduplicate: of train:0:0\n"), ("train", "dev"))
    assert capsys.readouterr().out == "train: left out 1 turns (1 duplicate)\n"
    monkeypatch.setenv("RANK", "1")
    load_corpora(config("train:1:0\tduplicate: of train:0:0\n"), ("train", "dev"))
    assert capsys.readouterr().out == ""


def test_turns_are_left_out_of_the_training_split_only(config):
    corpus = load_split(config("train:0:0\tx\n"), "dev")
    assert len(corpus.turns) == 6 and describe_skipped(corpus) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:0:0\n", r"out.tsv, line 1: expected turn id<TAB>reason, found 'train:0:0'"),
        ("train:0:0\tx\ntrain:0:1\t \n", r"out.tsv, line 2: expected"),
        ("train:0:0\tx\n\ntrain:0:1\tx\n", r"out.tsv, line 2: expected"),
        ("\tx\n", r"out.tsv, line 1: expected"),
        ("train:0:0\tx\ntrain:0:0\ty\n", r"out.tsv, line 2: turn train:0:0 was named before"),
        ("dev:0:0\tx\ntrain:9:0\tx\n", r"out.tsv: 2 turns are not in this split, such as dev:0:0"),
        (
            "".join(f"train:{d}:{t}\tx\n" for d in range(3) for t in range(2)),
            r"out.tsv: no turn is left",
        ),
    ],
)
def test_bad_leave_out_files_are_named(config, text, words):
    with pytest.raises(ValueError, match=words):
        load_split(config(text), "train")


def test_unreadable_leave_out_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.leave_out .*none.tsv: cannot be read"):
        read_leave_out(tmp_path / "none.tsv")
    (tmp_path / "odd.tsv").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"odd.tsv: not UTF-8"):
        read_leave_out(tmp_path / "odd.tsv")


def test_leave_out_without_training_data_is_an_error():
    with pytest.raises(ValueError, match="data.leave_out is set, but data.train is not"):
        DataConfig(dev="d", tables="t", databases="b", leave_out="x")
    with pytest.raises(ValueError, match="data.train is not set"):
        load_split(DataConfig(dev="d", tables="t", databases="b"), "train")


@pytest.fixture
def goals(config):
    """The configuration of the same files, with goals in the training split."""
    with_leave_out = config("")
    for name in ("train", "dev"):
        file = Path(getattr(with_leave_out, name))
        entries = json.loads(file.read_text())
        for entry in entries:
            entry["final"] = {"utterance": "goal", "query": "SELECT 9"}
        file.write_text(json.dumps(entries))
    return replace(with_leave_out, leave_out=None, goals=True)


def test_goals_are_added_to_the_training_split_or_to_the_held_out_ones(goals):
    assert len(load_split(goals, "train").turns) == 9 and len(load_split(goals, "dev").turns) == 6
    held_out = replace(goals, goals=False, held_out_goals=True)
    assert len(load_split(held_out, "train").turns) == 6
    assert load_split(held_out, "dev").turns[-1].turn_id == "dev:2:goal:0"


def test_a_goal_can_be_left_out(goals, tmp_path):
    (tmp_path / "out.tsv").write_text("train:1:goal:0\tx\n")
    corpus = load_split(replace(goals, leave_out=str(tmp_path / "out.tsv")), "train")
    assert len(corpus.turns) == 8 and "train:1:goal" not in {
        d.dialogue_id for d in corpus.dialogues
    }


def test_goals_without_a_file_are_an_error():
    with pytest.raises(ValueError, match="data.goals is set, but data.train names no file"):
        DataConfig(dev="d", databases="b", goals=True)
    with pytest.raises(ValueError, match="data.held_out_goals is set, but data.dev names no file"):
        DataConfig(held_out_goals=True)
    with pytest.raises(ValueError, match="data.ex is 'bird': expected one of auto, official, set"):
        DataConfig(ex="bird")


def test_a_run_says_that_ex_compares_sets(config, capsys):
    load_corpora(replace(config(""), ex="set"), ("dev",))
    assert capsys.readouterr().out == "dev: EX compares sets of rows, as BIRD does\n"


def test_the_first_rank_says_that_the_world_is_written(tmp_path, capsys, monkeypatch):
    def write(*_):
        raise KeyboardInterrupt

    def said(folder):
        with pytest.raises(KeyboardInterrupt):
            load_corpora(DataConfig(toy_folder=str(folder)), ("dev",))
        return capsys.readouterr().out

    monkeypatch.setattr(datasets, "write_toy_world", write)
    new = tmp_path / "toy"
    assert said(new) == f"writing the embedded world to {new} (some ten seconds)\n"
    assert said(tmp_path) == ""
    monkeypatch.setenv("RANK", "1")
    assert said(new) == ""


def test_two_processes_that_write_the_toy_world_at_once_use_one_folder(tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    calls = []

    def write(place, *_):
        calls.append(place)
        if len(calls) == 1:
            folder.with_name(f"toy.partial-{os.getpid()}").mkdir()
            folder.mkdir()  # the other process, just before this one renames its own
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(datasets, "write_toy_world", write)
    assert toy_files(DataConfig(toy_folder=str(folder))).train == str(folder / "train.json")
    assert calls == [folder, folder] and [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_an_interrupted_toy_world_leaves_no_file(tmp_path, monkeypatch):
    def write(place, *_):
        place.with_name(f"toy.partial-{os.getpid()}").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "write_toy_world", write)
    with pytest.raises(KeyboardInterrupt):
        toy_files(DataConfig(toy_folder=str(tmp_path / "toy")))
    assert not list(tmp_path.iterdir())


def test_the_launchers_late_sigterm_does_not_tear_the_removal(tmp_path, monkeypatch):
    """Half a removed folder stayed for ever, and the line said SIGTERM where Ctrl-C was pressed."""
    partial = tmp_path / f"toy.partial-{os.getpid()}"

    def write(*_):
        partial.mkdir()
        signal.raise_signal(signal.SIGINT)

    def rmtree(folder, **options):
        signal.raise_signal(signal.SIGTERM)
        removed(folder, **options)

    removed = shutil.rmtree
    monkeypatch.setattr("mtsql.run.signals.REPEAT_SECS", 0.0)
    monkeypatch.setattr(datasets, "write_toy_world", write)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        toy_files(DataConfig(toy_folder=str(tmp_path / "toy")))
    assert type(stop.value) is KeyboardInterrupt and not partial.exists()
