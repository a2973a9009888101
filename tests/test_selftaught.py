"""A self-taught round: what was right is kept by difficulty and trained on, solved turns leave, the pool stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from mtsql.agent.parser import Reply
from mtsql.checkpoint import CheckpointConfig
from mtsql.llm.model import EmbeddedSize, ModelConfig
from mtsql.rl.selftaught import SelfTaughtConfig, read_demonstrations, replay

WRONG = [Reply(answer="SELECT 1")]


def untimed(line):
    return {k: v for k, v in json.loads(line).items() if k != "time" and not k.endswith("_secs")}


def test_rounds_keep_right_rollouts_and_shrink_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def play(engine, renderer, turns, make_env, *, num_samples, judge, **_):
        """Every second turn of the first round is answered as demonstrated by its first sample, all else wrongly."""
        demonstrations = read_demonstrations(Path("data/toyworld/demonstrations.jsonl"))
        asked.append([turn.turn_id for turn in turns])
        good = set(asked[0][::2])
        return [
            judge(replay(t, demonstrations[t.turn_id] if t.turn_id in good and not i else WRONG, make_env(t), renderer))
            for t in turns
            for i in range(num_samples)
        ]

    monkeypatch.setattr(train_sft, "rollout", play)
    tiny = EmbeddedSize(hidden_size=32, num_layers=1, intermediate_size=32)
    config = train_sft.Config(
        source="self", run="runs/self", max_turns=6, model=ModelConfig(embedded=tiny),
        selftaught=SelfTaughtConfig(rounds=2, samples_per_turn=2), sft=train_sft.SftConfig(epochs=1, samples_per_update=2),
    )  # fmt: skip
    train_sft.main(config)
    out = capsys.readouterr().out
    assert "round 0: solved 3 of 6 turns, pool 3 trajectories" in out
    assert "round 1: solved 0 of 3 turns, pool 3 trajectories" in out
    assert asked[1] == asked[0][1::2]
    stages = [json.loads(line)["stage"] for line in Path("runs/self/metrics.jsonl").read_text().splitlines()]
    assert stages == ["round0"] * 2 + ["round1"] * 2
    assert Path("runs/self/model/model.safetensors").is_file()

    # a run that dies in its second round goes on there, without rolling out again
    config = replace(config, run="runs/died", checkpoint=CheckpointConfig(every=1, keep_best=0))
    with monkeypatch.context() as patch:
        steps, take_step = iter(range(9)), train_sft.take_step
        patch.setattr(train_sft, "take_step", lambda *a, **k: take_step(*a, **k) if next(steps) < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_sft.main(config)
    monkeypatch.delattr(train_sft, "collect")
    train_sft.main(replace(config, resume="runs/died"))
    lines = [Path(f"runs/{run}/metrics.jsonl").read_text().splitlines() for run in ("self", "died")]
    assert [untimed(line) for line in lines[0]] == [untimed(line) for line in lines[1]]
    first, second = (load_file(f"runs/{run}/model/model.safetensors") for run in ("self", "died"))
    assert all(torch.equal(first[key], second[key]) for key in first)
