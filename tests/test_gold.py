"""Demonstrations from gold SQL: what they earn and claim, what is left out, the same every time."""

import json
import random
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from helpers.databases import make_database
from helpers.demos import (
    FRENCH,
    JOINED,
    make_scene,
    music,
    play_demo,
    require_full_reward,
    require_true_thoughts,
)
from helpers.episodes import BOTH, EXEC, MEMORY
from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Answer
from mtsql.demos.config import KINDS, GoldConfig
from mtsql.demos.gold import FIRST_TRIES, LEFT_OUT, NOTHING_FOUND, demonstrate, demonstrations
from mtsql.demos.scene import Scene
from mtsql.rl.replay import read_demonstrations, write_gold_demonstrations
from mtsql.rl.rewards import RewardConfig
from mtsql.run.ranks import Ranks
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.query import QueryConfig, QueryStatus
from mtsql.toyworld.world import WorldConfig, write_toy_world

RECIPES = RewardConfig(process_after="any", proposals="all")
"""The rewards of the recipes. `proposals` is all there, so only demonstrations without a wrong or
another query earn the whole of it."""
SIZE = WorldConfig(8, 1, train_dialogues=15, seen_dialogues=1, dev_dialogues=1)
OFTEN = GoldConfig(0.2, 0.15, 0.1, 0.1, 0.05, 0.2, 0.2)
PATHS = [
    ("SELECT name FROM singer WHERE country = 'Netherlands'", "who is Dutch ?", ()),
    ("SELECT name FROM singer WHERE country = 'France'", "who is french ?", ()),
    (f"SELECT T1.name , T2.genre {JOINED} WHERE T2.genre = 'Rock'", "who sings Rock ?", ()),
    ("SELECT genre FROM song GROUP BY genre HAVING count(*) > 1", "what genres ?", (FRENCH,)),
    ("SELECT name FROM singer WHERE country = 'France' AND age > 30", "over 30 ?", (FRENCH,)),
    ("SELECT name FROM singer WHERE age > 30", "who of all is over 30 ?", (FRENCH,)),
]
"""(gold, question, history) of turns on which each kind of first try is possible."""


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return music(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(some dialogues of the small embedded world, their demonstrations from gold SQL)."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(folder, 0, SIZE)
    corpus = load_corpus(folder / "train.json", folder / "tables.json", folder / "database")
    return corpus, demonstrations(corpus, OFTEN, EnvConfig(), seed=0)


def replies_of(demos, folder):
    """The demonstrations as their file is read."""
    file = folder / "demonstrations.jsonl"
    file.write_text("".join(f"{json.dumps(demo.record)}\n" for demo in demos))
    return read_demonstrations(file)


def all_of(database, **config) -> list[tuple[Scene, object]]:
    """A demonstration of every kind, and without a first try, on each of PATHS."""
    found = []
    for number, (gold, question, history) in enumerate(PATHS):
        for kind in ("", *KINDS):
            scene = make_scene(database, gold, question, history, seed=number, **config)
            found.append((scene, demonstrate(scene, kind)))
    return found


def test_every_kind_is_played_earns_the_honest_reward_and_claims_only_what_is_seen(
    database, tmp_path
):
    kinds = Counter()
    num_claims = 0
    for scene, demo in all_of(database):
        kinds[demo.first] += 1
        [replies] = replies_of([demo], tmp_path).values()
        for style in get_args(PromptStyle):
            env, shown = play_demo(scene.turn, database, replies, style)
            num_claims += require_true_thoughts(env, shown)
        require_full_reward(env, RewardConfig())
        if not demo.first:
            require_full_reward(env, RECIPES)
    assert kinds.keys() == {"", *FIRST_TRIES} and num_claims > 100


def test_the_toy_world_is_demonstrated_within_four_replies_and_without_a_false_claim(toy, tmp_path):
    corpus, made = toy
    turns = {turn.turn_id: turn for turn in corpus.turns}
    assert [demo.turn_id for demo in made.demonstrations] == list(turns)
    kinds = Counter(demo.first for demo in made.demonstrations)
    assert kinds[""] < 0.9 * len(turns)
    assert min(kinds[kind] for kind in ("literal", "look_up", "column", "join", "dropped")) > 3
    replies = replies_of(made.demonstrations, tmp_path)
    paid = set(random.Random(0).sample(sorted(turns), 25))
    for turn_id, turn in turns.items():
        assert len(replies[turn_id]) <= 4 and replies[turn_id][-1].action == Answer(turn.sql)
        env, shown = play_demo(turn, corpus.databases[turn.db_id], replies[turn_id], "brief")
        assert require_true_thoughts(env, shown)
        if turn_id in paid:
            require_full_reward(env, RewardConfig())


@pytest.mark.parametrize("tools", [BOTH, EXEC, MEMORY, ()])
def test_they_fit_fewer_tools_and_make_no_mistake_that_these_cannot_show(database, tools, tmp_path):
    kinds = set()
    for scene, demo in all_of(database, tools=tools):
        [replies] = replies_of([demo], tmp_path).values()
        fitted = fit(replies, tools, scene.turn)
        env, shown = play_demo(scene.turn, database, fitted, "full", EnvConfig(tools=tools))
        require_true_thoughts(env, shown)
        require_full_reward(env, RewardConfig())
        calls = [record.sql for record in env.records if record.sql]
        assert len(calls) == len(fitted) - 1 and (tools or not calls)
        kinds.add(demo.first)
        if tools == MEMORY and not demo.first:
            assert calls == [scene.turn.sql] * bool(scene.turn.history)
    by_memory = {"dropped", "kept"}
    possible = (set(KINDS) - by_memory if "exec_sql" in tools else set()) | (
        by_memory if "memory_retrieve" in tools else set()
    )
    assert kinds == {"", *possible}


@pytest.mark.parametrize(
    ("max_replies", "first_turn", "later_turn"),
    [
        (1, ["answer"], ["answer"]),
        (2, ["exec_sql", "answer"], ["exec_sql", "answer"]),
        (3, ["exec_sql", "exec_sql", "answer"], ["exec_sql", "memory_retrieve", "answer"]),
        (9, ["exec_sql", "exec_sql", "answer"], ["exec_sql"] * 2 + ["memory_retrieve", "answer"]),
    ],
)
def test_they_fit_the_limit_of_replies(database, max_replies, first_turn, later_turn):
    gold = "SELECT name FROM singer WHERE age > 30"
    for history, expected in ((), first_turn), ((FRENCH,), later_turn):
        scene = make_scene(database, gold, "?", history, max_replies=max_replies)
        steps = demonstrate(scene, "column").steps
        assert [step["action"] for step in steps] == expected
        assert all(step["think"] for step in steps)


@pytest.mark.parametrize(
    ("gold", "why", "limits"),
    [
        ("SELECT nope FROM singer", LEFT_OUT[QueryStatus.ERROR], {}),
        ("DELETE FROM singer", LEFT_OUT[QueryStatus.DENIED], {}),
        ("SELECT name FROM singer WHERE age > 99", NOTHING_FOUND, {}),
        ("SELECT max(age) FROM singer WHERE age > 99", NOTHING_FOUND, {}),
        ("SELECT name FROM singer", LEFT_OUT[QueryStatus.TOO_LARGE], {"max_rows": 3}),
        (
            "SELECT count(*) FROM song a, song b, song c, song d, song e, song f",
            LEFT_OUT[QueryStatus.TIMEOUT],
            {"max_vm_steps": 1000},
        ),
    ],
)
def test_gold_queries_that_cannot_be_played_are_left_out_by_reason(database, gold, why, limits):
    scene = make_scene(database, gold, query=QueryConfig(**limits))
    assert demonstrate(scene, "") == demonstrate(scene, "column") == why


def test_what_is_left_out_is_counted_and_no_demonstration_at_all_is_an_error(tmp_path):
    make_database(tmp_path / "database" / "one.sqlite")
    rows = ["db_id,question,sql", "one,a ?,SELECT a FROM t", "one,b ?,SELECT b FROM t"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    corpus = load_corpus(tmp_path / "train.csv", None, tmp_path / "database")
    made = demonstrations(corpus, GoldConfig(), EnvConfig(), seed=0)
    assert made.lines()[0] == "1 of 2 turns have a demonstration"
    assert made.lines()[-1] == "  1 left out: the gold query fails"
    failing = replace(corpus, dialogues=corpus.dialogues[1:])
    with pytest.raises(ValueError, match="no turn has a demonstration: 1 times the gold query fai"):
        demonstrations(failing, GoldConfig(), EnvConfig(), seed=0)


def test_a_share_is_a_share_of_the_turns_on_which_its_kind_is_possible(database):
    assert GoldConfig(1, 0, 0, 0, 0, 0, 0).draw(0.999) == "literal"
    config = GoldConfig(0.5, 0.25, 0, 0, 0, 0, 0.125)
    drawn = [config.draw(number / 16) for number in range(16)]
    assert Counter(drawn) == {"literal": 8, "look_up": 4, "kept": 2, "": 2}
    with pytest.raises(ValueError, match="gold: the shares are 1.5 together; at most 1"):
        GoldConfig(literal=1, column=0.5, look_up=0, join=0, aggregate=0, dropped=0, kept=0)
    with pytest.raises(ValueError, match="gold.kept is -0.1: it must be between 0 and 1"):
        GoldConfig(kept=-0.1)
    GoldConfig()  # the defaults are shares


def test_demonstrations_depend_on_the_seed_and_the_turn_and_on_nothing_else(toy, tmp_path):
    corpus, made = toy
    first = Ranks()
    args = (OFTEN, EnvConfig(), 0, first)
    file = tmp_path / "demonstrations.jsonl"
    lines = write_gold_demonstrations(file, corpus, *args, False)
    assert file.read_text() == made.text() and lines == made.lines()
    few = replace(corpus, dialogues=corpus.dialogues[7:9])
    alone = demonstrations(few, OFTEN, EnvConfig(), seed=0)
    assert set(alone.text().splitlines()) < set(made.text().splitlines())
    assert alone.text() != demonstrations(few, OFTEN, EnvConfig(), seed=1).text()


def test_ranks_share_the_turns_and_write_the_file_of_one(toy, tmp_path, monkeypatch):
    corpus = replace(toy[0], dialogues=toy[0].dialogues[:2])
    sent = []

    def gather(self, items):
        sent.append(items)
        return [item for part in sent for item in part]

    monkeypatch.setattr(Ranks, "gather", gather)
    file = tmp_path / "demonstrations.jsonl"
    args = (corpus, OFTEN, EnvConfig(), 0)
    with pytest.raises(ValueError, match="shorter"):  # the other rank has sent nothing yet
        write_gold_demonstrations(file, *args, Ranks(0, 2), False)
    other = write_gold_demonstrations(file, *args, Ranks(1, 2), False)
    assert not file.exists()
    alone = demonstrations(*args)
    assert other == alone.lines()


def test_a_resumed_run_keeps_its_file_and_refuses_a_changed_one(toy, tmp_path):
    corpus = replace(toy[0], dialogues=toy[0].dialogues[:2])
    file = tmp_path / "demonstrations.jsonl"
    make = (corpus, OFTEN, EnvConfig(), 0, Ranks())
    lines = write_gold_demonstrations(file, *make, True)  # it was stopped before the file was there
    before = file.stat().st_mtime_ns
    assert write_gold_demonstrations(file, *make, True) == lines
    assert file.stat().st_mtime_ns == before
    file.write_text(file.read_text().replace("pass", "no_pass", 1))
    with pytest.raises(ValueError, match="demonstrations.jsonl changed since the run was started"):
        write_gold_demonstrations(file, *make, True)
    assert write_gold_demonstrations(file, *make, False) == lines
