"""Demonstrations from the gold SQL of SParC and CoSQL are paid and claim only what is seen."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from helpers.demos import play_demo, require_full_reward, require_true_thoughts
from mtsql.agent.env import EnvConfig
from mtsql.demos.config import GoldConfig
from mtsql.demos.gold import demonstrations
from mtsql.judge.sql_parser import parse_sql
from mtsql.rl.replay import read_demonstrations
from mtsql.rl.rewards import RewardConfig
from mtsql.sql.datasets import DataConfig, load_split

NUM_DIALOGUES = 150
"""Number of dialogues that are sampled from each file."""
OFTEN = GoldConfig(0.2, 0.15, 0.1, 0.15, 0.1, 0.15, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparc", "cosql"])
def test_demonstrations_of_real_turns_are_paid_and_true(shared, name, tmp_path):
    data = shared / "data"
    files = DataConfig(
        train=str(data / name / "train.json"),
        dev=str(data / name / "dev.json"),
        tables=str(data / "tables.json"),
        databases=str(data / "database"),
    )
    corpus = load_split(files, "train")
    sample = random.Random(0).sample(corpus.dialogues, NUM_DIALOGUES)
    corpus = replace(corpus, dialogues=sample)
    made = demonstrations(corpus, OFTEN, EnvConfig(), seed=0)
    assert len(made.demonstrations) > 0.8 * made.num_turns
    kinds = Counter(demo.first for demo in made.demonstrations)
    assert kinds[""] < 0.95 * len(made.demonstrations) and len(kinds) > 5

    file = tmp_path / "demonstrations.jsonl"
    file.write_text("".join(f"{json.dumps(demo.record)}\n" for demo in made.demonstrations))
    replies = read_demonstrations(file)
    num_paid = 0
    for turn in corpus.turns:
        if turn.turn_id not in replies:
            continue
        database = corpus.databases[turn.db_id]
        for style in ("brief", "full"):
            env, shown = play_demo(turn, database, replies[turn.turn_id], style)
            require_true_thoughts(env, shown)
        if parse_sql(turn.sql, database.schema) is not None:  # the others earn no em at all
            require_full_reward(env, RewardConfig())
            num_paid += 1
    assert num_paid > 0.9 * len(made.demonstrations)
