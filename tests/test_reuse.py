"""What is kept and used again is keyed by all that went into it: warm starts, runs to resume, the
embedded world."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_sft

from helpers.models import EMBEDDED
from mtsql import workbench
from mtsql.agent import env as env_module
from mtsql.agent import prompts
from mtsql.agent.env import EnvConfig
from mtsql.model.policy import ModelConfig
from mtsql.run.checkpoint import CheckpointConfig
from mtsql.run.inputs import check_inputs, keep_inputs
from mtsql.sql import datasets
from mtsql.sql.datasets import DataConfig
from mtsql.toyworld import world as toyworld
from mtsql.toyworld.world import WorldConfig, write_toy_world
from mtsql.warm_start import warm_start_key

WORLD = WorldConfig(num_train_databases=3, num_dev_databases=1, train_dialogues=3)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small embedded world, which the scripts use from here on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "WorldConfig", lambda: WORLD)
    return tmp_path / "data/toyworld"


def key(**changed):
    return warm_start_key(replace(train_sft.Config(style="full"), **changed))


def test_the_key_of_a_warm_start_depends_on_all_that_it_learns_from(world, monkeypatch):
    usual = key()
    assert key() == usual == key(env=EnvConfig(max_replies=6, num_sql_workers=1))
    others = [
        key(env=EnvConfig(max_observation_rows=2)),
        key(env=EnvConfig(tools=("exec_sql",))),
        key(style="brief"),
        key(seed=1),
        key(max_prompt_tokens=10),
        key(sft=train_sft.SftConfig(epochs=3)),
    ]

    def patched(owner, name, value):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            others.append(key())

    patched(prompts, "TASK", prompts.TASK + " ")
    patched(prompts, "AFTER_EXEC", prompts.AFTER_EXEC.replace("Judge", "Look at"))
    patched(env_module, "tool_schemas", lambda *_: [])
    patched(prompts, "show_result", lambda *_: "a row")
    patched(workbench, "format_reply", lambda reply: reply.think)
    patched(ModelConfig, "compute_dtype", torch.bfloat16)
    patched(workbench.rendering, "__file__", prompts.__file__)
    assert len({usual, *others}) == 1 + len(others) and key() == usual


def test_the_key_of_a_warm_start_depends_on_the_content_of_its_files(world):
    usual = key()
    demonstrations = world / "demonstrations.jsonl"
    text = demonstrations.read_text()
    demonstrations.write_text(text.replace("SELECT count(*)", "SELECT COUNT(*)"))
    assert demonstrations.read_text() != text and key() != usual
    demonstrations.write_text(text)
    assert key() == usual
    out = world.parent / "out.tsv"
    keys = []
    for turn in ("train:0:0", "train:1:0"):
        out.write_text(f"{turn}\tno reason\n")
        keys.append(key(data=DataConfig(leave_out=str(out))))
    assert len({usual, *keys}) == 3


def change_prompt(patch, world):
    patch.setattr(prompts, "TASK", "Answer.")


def change_observation(patch, world):
    patch.setattr(prompts, "AFTER_MEMORY", "Go on.")


def change_turns(patch, world):
    file = world / "train.json"
    file.write_text(file.read_text().replace('"SELECT count(*)', '"SELECT COUNT(*)'))


def change_demonstrations(patch, world):
    file = world / "demonstrations.jsonl"
    file.write_text(file.read_text().replace('"no_pass"', '"pass"'))


def change_weights(patch, world):
    build = workbench.build_embedded
    patch.setattr(
        workbench, "build_embedded", lambda tokenizer, size, seed: build(tokenizer, size, seed + 1)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_prompt, "the text of the prompts changed"),
        (change_observation, "the text or tokens of an episode changed"),
        (change_turns, "data.toy_folder data/toyworld/train.json changed"),
        (change_demonstrations, "demonstrations data/toyworld/demonstrations.jsonl changed"),
        (change_weights, "the weights to start from changed"),
    ],
)
def test_a_run_is_not_resumed_with_other_inputs(change, words, world, monkeypatch):
    config = train_sft.Config(
        model=ModelConfig(embedded=EMBEDDED),
        style="full",
        sft=train_sft.SftConfig(epochs=1, max_samples=4, samples_per_update=2),
        checkpoint=CheckpointConfig(every=1, keep_best=0),
    )
    train_sft.main(config.completed())
    shutil.rmtree("runs/sft/model")  # as if it was killed after its last step
    train_sft.main(replace(config, resume="runs/sft").completed())
    shutil.rmtree("runs/sft/model")
    with monkeypatch.context() as patch:
        change(patch, world)
        with pytest.raises(ValueError, match=f"resume runs/sft: .*{words}"):
            train_sft.main(replace(config, resume="runs/sft").completed())


def test_inputs_are_written_once_and_compared(tmp_path):
    check_inputs(tmp_path, {"the turns": "1"})  # killed before it wrote the file, or an older run
    keep_inputs(tmp_path, {"the turns": "2"})
    keep_inputs(tmp_path, {"the turns": "1"})
    check_inputs(tmp_path, {"the turns": "2", "something new": "3"})
    with pytest.raises(ValueError, match="the turns changed"):
        check_inputs(tmp_path, {"the turns": "1"})
    for damaged in ("{", "[1]"):
        (tmp_path / "inputs.json").write_text(damaged)
        with pytest.raises(ValueError, match="inputs.json: not "):
            check_inputs(tmp_path, {"the turns": "1"})


def test_a_toy_world_that_other_code_wrote_is_not_used(tmp_path, monkeypatch):
    folder, advice = tmp_path / "world", "remove it, or set data.toy_folder"
    write_toy_world(folder, 3, WORLD)
    write_toy_world(folder, 3, WORLD)
    with pytest.raises(ValueError, match=f"holds another world: {advice}"):
        write_toy_world(folder, 4, WORLD)
    edited = tmp_path / "toydialogues.py"
    edited.write_text(Path(toyworld.SOURCES[1]).read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(toyworld, "SOURCES", (toyworld.SOURCES[0], str(edited), toyworld.SOURCES[2]))
        with pytest.raises(ValueError, match=f"holds this world as other code wrote it: {advice}"):
            write_toy_world(folder, 3, WORLD)
    stamp = json.loads((folder / "toyworld.json").read_text())
    assert stamp.pop("code")
    (folder / "toyworld.json").write_text(
        json.dumps({"version": 2, **stamp})
    )  # the stamp of older code
    with pytest.raises(ValueError, match="as other code wrote it"):
        write_toy_world(folder, 3, WORLD)
    (folder / "toyworld.json").write_text("{")
    with pytest.raises(ValueError, match=f"another world: {advice}"):
        write_toy_world(folder, 3, WORLD)
