"""Databases that are held out of the training: which ones, and that no training sees them."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from helpers.models import tiny_tokenizer
from helpers.small_world import use_small_world
from mtsql import workbench
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.model.rendering import Renderer
from mtsql.rl.replay import demonstration_samples
from mtsql.session import warn_of_known_databases
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Corpus, Dialogue, Turn
from mtsql.sql.held_out import NOTE, held_out_databases, hold_out, names_of, require_whole
from mtsql.workbench import load_corpora

REAL = {"train": "train.json", "dev": "dev.json", "databases": "database"}
NAMES = [f"db{number}" for number in range(140)]


def corpus(num_databases=4):
    """A corpus with a dialogue of one turn for each database."""
    dialogues = [
        Dialogue(f"train:{n}", f"db{n}", (Turn(f"train:{n}:0", 0, f"db{n}", "q", "SELECT 1"),))
        for n in range(num_databases)
    ]
    databases = {dialogue.db_id: object() for dialogue in dialogues}
    return Corpus(dialogues, databases, left_out={"train:9:0": "wrong"})


@pytest.mark.parametrize(
    ("hold_out", "count"), [(None, 7), (0, 0), (0.1, 14), (0.001, 1), (1, 1), (30, 30)]
)
def test_a_number_or_a_fraction_of_the_databases_is_held_out(hold_out, count):
    assert len(held_out_databases(NAMES, DataConfig(**REAL, hold_out=hold_out))) == count


def test_by_default_few_databases_and_the_toy_world_are_all_trained_on():
    assert held_out_databases(NAMES[:9], DataConfig(**REAL)) == set()
    assert len(held_out_databases(NAMES[:10], DataConfig(**REAL))) == 1
    assert held_out_databases(NAMES, DataConfig()) == set()
    assert len(held_out_databases(NAMES, DataConfig(hold_out=0.1))) == 14


def test_goals_are_scored_only_if_asked():
    data = corpus()
    goals = [
        replace(dialogue, dialogue_id=f"{dialogue.dialogue_id}:goal") for dialogue in data.dialogues
    ]
    data.dialogues.extend(goals)
    for held_out_goals in (False, True):
        config = DataConfig(**REAL, goals=True, hold_out=1, held_out_goals=held_out_goals)
        train, held_out = hold_out(data, config)
        assert len(train.dialogues) == 6 and len(held_out.dialogues) == 1 + held_out_goals
        assert len(train.left_out) == 2  # the turn that was left out before, and a held-out one


def test_left_out_turns_may_leave_nothing():
    names = held_out_databases(NAMES[:4], DataConfig(**REAL, hold_out=1))
    for words, is_kept in (("on the held-out databases", False), ("to train on", True)):
        data = corpus()
        data.dialogues[:] = [one for one in data.dialogues if (one.db_id in names) is is_kept]
        with pytest.raises(ValueError, match=f"leave no turn {words}"):
            hold_out(data, DataConfig(**REAL, hold_out=1))


def test_other_databases_in_the_data_hardly_change_which_are_held_out():
    config = DataConfig(**REAL, hold_out=7)
    chosen = held_out_databases(NAMES, config)
    assert chosen == held_out_databases(NAMES[::-1], config)
    fewer = held_out_databases(NAMES[:70], config)
    assert chosen & set(NAMES[:70]) <= fewer
    other = held_out_databases(NAMES, DataConfig(**REAL, hold_out=7, hold_out_seed=1))
    assert len(other) == 7 and other != chosen


@pytest.mark.parametrize(("hold_out", "words"), [(4, "4, but the training"), (0.9, "0.9, but")])
def test_no_database_left_to_train_on_is_named(hold_out, words):
    with pytest.raises(ValueError, match=f"data.hold_out is {words} data has 4 databases|{words}"):
        held_out_databases(NAMES[:4], DataConfig(**REAL, hold_out=hold_out))


@pytest.mark.parametrize("hold_out", [-1, 1.5])
def test_a_share_that_is_none_is_named(hold_out):
    with pytest.raises(ValueError, match="data.hold_out is .*: it must be 0, a fraction"):
        DataConfig(hold_out=hold_out)


def test_a_script_that_reads_whole_files_refuses_the_key():
    require_whole(DataConfig(**REAL), "eval.py")
    with pytest.raises(ValueError, match="data.hold_out has no effect in eval.py"):
        require_whole(DataConfig(**REAL, hold_out=3), "eval.py")


def test_a_database_is_in_one_of_the_two_corpora():
    whole = corpus()
    train, ours = hold_out(whole, DataConfig(**REAL, hold_out=2))
    for part in (train, ours):
        assert len(part.databases) == len(part.dialogues) == 2
        assert {turn.db_id for turn in part.turns} == part.databases.keys()
    assert train.databases.keys() | ours.databases.keys() == whole.databases.keys()
    assert train.left_out.keys() == {"train:9:0", *(turn.turn_id for turn in ours.turns)}
    assert hold_out(whole, DataConfig(**REAL)) == (whole, None)


def test_only_a_training_splits_its_data(monkeypatch, capsys):
    monkeypatch.setattr(workbench, "load_split", lambda data, name: corpus(12))
    data = DataConfig(**REAL)
    found = load_corpora(data, ("train", "held_out"))
    assert {name: len(one.turns) for name, one in found.items()} == {"train": 11, "held_out": 1}
    assert "train: left out 2 turns (1 wrong, 1 held out)" in capsys.readouterr().out
    assert len(load_corpora(data, ("train",), is_training=True)["train"].turns) == 11
    assert len(load_corpora(data, ("train",))["train"].turns) == 12
    few = DataConfig(**REAL, hold_out=0)
    assert list(load_corpora(few, ("train", "held_out"), is_training=True)) == ["train", "dev"]


def test_demonstrations_of_held_out_databases_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("mtsql.sql.datasets.WorldConfig", lambda: None)
    use_small_world()
    data = DataConfig(toy_folder=str(tmp_path / "toy"), hold_out=3)
    train = load_corpora(data, ("train", "held_out"), is_training=True)["train"]
    lines = (tmp_path / "toy/demonstrations.jsonl").read_text().splitlines()
    named = {json.loads(line)["turn_id"] for line in lines}
    known = {turn.turn_id for turn in train.turns}
    assert named & train.left_out.keys() and named <= known | train.left_out.keys()
    assert not known & train.left_out.keys() and len(train.databases) == 9
    kinds = {json.loads(line)["turn_id"] in known: line for line in lines}
    few = tmp_path / "few.jsonl"
    few.write_text(f"{kinds[True]}\n{kinds[False]}\n")

    def make_env(turn):
        return SqlEnv(turn, train.databases[turn.db_id], EnvConfig(max_replies=6), "brief")

    made = partial(demonstration_samples, train, make_env, Renderer(tiny_tokenizer()), few, seed=0)
    samples, said = made(max_samples=1, max_prompt_tokens=9999)
    assert len(samples) == 1
    assert said == ["demonstrations: 1 left out: their turns are left out of the training"]
    with pytest.raises(
        ValueError, match="no demonstration to learn from; .*; .*: 1 left out: .*=1"
    ):
        made(max_samples=0, max_prompt_tokens=1)


def test_a_model_that_was_trained_on_held_out_databases_is_noticed(tmp_path, capsys):
    train, ours = hold_out(corpus(), DataConfig(**REAL, hold_out=2))
    names = sorted(ours.databases)
    assert names_of(train) == names and names_of(corpus()) == []
    log = SimpleNamespace(print=print)
    bench = SimpleNamespace(corpora={"train": train})

    def said(databases):
        (tmp_path / NOTE).write_text(json.dumps({"databases": databases}))
        warn_of_known_databases(bench, str(tmp_path), log)
        return capsys.readouterr().out

    assert not said(["other", *names])
    assert f"1 of the 2 databases that are held out here, such as {names[1]}" in said(names[:1])
    assert "trained on 2 of the 2" in said([])
    (tmp_path / NOTE).unlink()
    warn_of_known_databases(bench, str(tmp_path), log)
    assert not capsys.readouterr().out
