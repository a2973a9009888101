import json

import pytest

from mtsql.judge.hardness import hardness
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.sandbox import run_query
from mtsql.toyworld.world import WorldConfig, write_toy_world

SIZE = WorldConfig(
    num_train_databases=5,
    num_dev_databases=2,
    train_dialogues=40,
    seen_dialogues=6,
    dev_dialogues=20,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(folder, 3, SIZE)
    return folder


def corpus(world, split):
    return load_corpus(world / f"{split}.json", world / "tables.json", world / "database")


def test_the_same_seed_writes_the_same_files(world, tmp_path):
    write_toy_world(tmp_path / "again", 3, SIZE)
    for name in ("tables.json", "train.json", "dev_seen.json", "dev.json", "demonstrations.jsonl"):
        assert (world / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    write_toy_world(world, 3, SIZE)  # already there: nothing happens
    with pytest.raises(ValueError, match="another world"):
        write_toy_world(world, 4, SIZE)


@pytest.mark.parametrize("split", ("train", "dev_seen", "dev"))
def test_every_gold_query_parses_runs_and_returns_something(world, split):
    data = corpus(world, split)
    levels = set()
    assert not data.skipped
    for turn in data.turns:
        levels.add(hardness(turn.sql, data.databases[turn.db_id].schema))
        result = run_query(data.databases[turn.db_id].path, turn.sql)
        assert result.is_ok and not result.is_empty, turn
    assert levels == {"easy", "medium", "hard", "extra"}
    assert all(2 <= len(dialogue.turns) <= 5 for dialogue in data.dialogues)


def test_held_out_databases_and_dialogues_are_not_in_training(world):
    told = {
        s: {(d.db_id, *(t.question for t in d.turns)) for d in corpus(world, s).dialogues}
        for s in ("train", "dev_seen", "dev")
    }
    assert not told["train"] & told["dev_seen"]
    databases = {split: {entry[0] for entry in entries} for split, entries in told.items()}
    assert databases["dev_seen"] <= databases["train"] and not databases["dev"] & databases["train"]


def test_demonstrations_are_what_an_agent_would_have_seen(world):
    data = corpus(world, "train")
    turns = {turn.turn_id: turn for turn in data.turns}
    shapes = set()
    for line in (world / "demonstrations.jsonl").read_text().splitlines():
        record = json.loads(line)
        turn, steps = turns.pop(record["turn_id"]), record["steps"]
        shapes.add(tuple(step["action"] for step in steps))
        assert len(steps) <= 4 and steps[-1]["action"] == "answer" and steps[-1]["sql"] == turn.sql
        for step, after in zip(steps, steps[1:], strict=False):
            result = run_query(data.databases[turn.db_id].path, step["sql"])
            if step["action"] == "exec_sql":
                is_nothing = not result.is_ok or result.is_empty or result.rows == ((0,),)
                assert (after["exec_verdict"] == "no_pass") == is_nothing
            else:
                assert result.is_ok and after["memory_verdict"] is not None
    assert not turns and len(shapes) >= 4
