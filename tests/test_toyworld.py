"""The embedded world: the same seed writes the same files, and they are sound training data."""

import hashlib
import json
from pathlib import Path

import pytest

from mtsql.demos import plan
from mtsql.judge.hardness import hardness
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.sandbox import run_query
from mtsql.toyworld.world import SOURCES, WorldConfig, write_toy_world

SIZE = WorldConfig(
    num_train_databases=5,
    num_dev_databases=2,
    train_dialogues=40,
    seen_dialogues=6,
    dev_dialogues=20,
)
FILES = ("tables.json", "train.json", "dev_seen.json", "dev.json", "demonstrations.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(folder, 3, SIZE)
    return folder


def corpus(world, split):
    return load_corpus(world / f"{split}.json", world / "tables.json", world / "database")


def test_the_same_seed_writes_the_same_files(world, tmp_path):
    write_toy_world(tmp_path / "again", 3, SIZE)
    for name in FILES:
        assert (world / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_demonstrations_are_those_of_the_measured_tables(world):
    """The tables of README.md were measured with demonstrations that this code still writes."""
    content = (world / "demonstrations.jsonl").read_bytes()
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "99cabf63e6fc086c"


def test_a_written_world_is_left_alone_and_another_one_is_refused(world):
    times = [(world / name).stat().st_mtime_ns for name in FILES]
    write_toy_world(world, 3, SIZE)
    with pytest.raises(ValueError, match="another world"):
        write_toy_world(world, 4, SIZE)
    assert [(world / name).stat().st_mtime_ns for name in FILES] == times


def test_an_empty_folder_is_filled_and_one_with_other_files_is_refused(tmp_path):
    size = WorldConfig(1, 1, 1, 0, 0)
    (tmp_path / "empty").mkdir()
    write_toy_world(tmp_path / "empty", 0, size)
    assert (tmp_path / "empty" / "toyworld.json").is_file()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(ValueError, match="holds another world"):
            write_toy_world(tmp_path / name, 0, size)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "number", "least"),
    [("num_train_databases", 0, 1), ("num_dev_databases", -3, 1), ("train_dialogues", -1, 0)],
)
def test_a_size_that_cannot_be_is_refused_by_name(name, number, least):
    with pytest.raises(ValueError, match=f"{name} is {number}: it must be at least {least}"):
        WorldConfig(**{name: number})


def test_the_stamp_of_a_world_covers_every_file_of_its_code():
    folder = Path(SOURCES[0]).parent
    own = {str(path) for path in folder.glob("*.py") if path.stem != "__init__"}
    assert set(SOURCES) == own | {plan.__file__}


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
    assert all(2 <= len(dialogue.turns) <= 6 for dialogue in data.dialogues)


def test_held_out_databases_and_dialogues_are_not_in_training(world):
    told = {}
    databases = {}
    for split in ("train", "dev_seen", "dev"):
        dialogues = corpus(world, split).dialogues
        databases[split] = {dialogue.db_id for dialogue in dialogues}
        told[split] = set()
        for dialogue in dialogues:
            questions = tuple(turn.question for turn in dialogue.turns)
            told[split].add((dialogue.db_id, questions))
    assert not told["train"] & told["dev_seen"]
    assert databases["dev_seen"] <= databases["train"]
    assert not databases["dev"] & databases["train"]


def test_the_verdicts_of_demonstrations_agree_with_the_databases(world):
    data = corpus(world, "train")
    turns = {turn.turn_id: turn for turn in data.turns}
    shapes = set()
    for line in (world / "demonstrations.jsonl").read_text().splitlines():
        record = json.loads(line)
        turn = turns.pop(record["turn_id"])
        steps = record["steps"]
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
