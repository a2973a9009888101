"""train_sft.py --source file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import train_sft

from helpers.models import tiny_tokenizer
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.learner.step import Learner
from mtsql.model.policy import EmbeddedConfig, ModelConfig
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import pool_record, record_line
from mtsql.rl.replay import read_demonstrations, replay
from mtsql.run.checkpoint import CheckpointConfig
from mtsql.sql.datasets import DataConfig, load_split

TINY = EmbeddedConfig(hidden_size=32, num_layers=1, intermediate_size=32)


def write_pool_of_world(file):
    """Records of five training turns of the embedded world, and then one that claims to be of a
    held-out turn, made with a tokenizer that is not the run's."""
    corpus, dev = (load_split(DataConfig(), split) for split in ("train", "dev"))
    demonstrations = read_demonstrations(Path("data/toyworld/demonstrations.jsonl"))
    renderer = Renderer(tiny_tokenizer())
    records = []
    for turn in corpus.turns[:5]:
        env = SqlEnv(turn, corpus.databases[turn.db_id], EnvConfig(max_replies=6), "brief")
        played = replay(turn, demonstrations[turn.turn_id], env, renderer)
        records.append(pool_record(played, renderer, 0))
    records.append(records[0] | {"turn_id": dev.turns[0].turn_id})
    file.write_text("".join(f"{record_line(record)}\n" for record in records))


@pytest.mark.slow
def test_a_model_learns_from_a_pool_and_not_from_held_out_turns(
    tmp_path, monkeypatch, capsys, small_world
):
    monkeypatch.chdir(tmp_path)
    pool = tmp_path / "pool.jsonl"
    write_pool_of_world(pool)
    config = train_sft.Config(
        source="file",
        pool=str(pool),
        run="runs/file",
        model=ModelConfig(embedded=TINY),
        sft=train_sft.SftConfig(epochs=1, samples_per_update=2),
        checkpoint=CheckpointConfig(every=1, keep_best=0),
    )
    text = pool.read_text()
    with monkeypatch.context() as patch:
        steps, optimizer_step = iter(range(9)), Learner.optimizer_step
        patch.setattr(
            Learner,
            "optimizer_step",
            lambda *args, **named: optimizer_step(*args, **named) if next(steps) < 1 else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            train_sft.main(config.completed())
    out = " ".join(capsys.readouterr().out.split())
    assert "pool: 5 trajectories, 5 of them rendered" in out
    assert "pool: 1 left out: its turn is held out (first: pool" in out and "line 6, dev:" in out
    assert "another prompt" not in out

    resumed = replace(config, resume="runs/file")
    pool.write_text(text.replace('"round":0', '"round":1'))
    with pytest.raises(ValueError, match="the pool changed since the run was started"):
        train_sft.main(resumed.completed())
    pool.write_text(text)
    train_sft.main(resumed.completed())
    rows = [json.loads(line) for line in Path("runs/file/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == ["sft"] * 3
    assert Path("runs/file/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"source": "file"}, "pool is not set"),
        ({"pool": "a.jsonl"}, "pool has no effect with source=demonstrations"),
        ({"source": "file", "pool": ("none.jsonl",)}, "pool none.jsonl: cannot be read"),
        ({"source": "file", "pool": "bad.jsonl"}, "pool bad.jsonl, line 2: messages: expected a"),
        (
            {"source": "file", "pool": "bad.jsonl", "demonstrations": "d.jsonl"},
            "demonstrations has no effect with source=file",
        ),
    ],
)
def test_flags_and_files_are_checked_before_anything_is_loaded(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    good = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    Path("bad.jsonl").write_text(f"{json.dumps(good)}\n{{}}\n")
    with pytest.raises(ValueError, match=words):
        train_sft.Config(**flags).completed()
