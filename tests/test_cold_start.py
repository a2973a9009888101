"""train_sft.py --source gold: its files, resumed, on two ranks; its flags."""

import itertools
import json
import signal
from dataclasses import replace

import pytest
import train_sft

from helpers.runs import FLAGS, SMALL_SFT, TWO, assert_same_tensors, finish, metrics, start
from mtsql.demos.config import GoldConfig
from mtsql.model.policy import EmbeddedConfig, ModelConfig
from mtsql.rl.replay import read_demonstrations
from mtsql.run.signals import no_interrupt
from mtsql.sql.datasets import DataConfig

SMALL = ModelConfig(embedded=EmbeddedConfig(num_layers=1, hidden_size=32, intermediate_size=32))


@pytest.mark.slow
def test_a_cold_start_is_resumed_with_its_file_and_two_ranks_make_the_same(
    tmp_path, monkeypatch, capsys, small_world, fresh_accelerate
):
    def run(name: str, is_resumed: bool = False) -> None:
        folder = str(tmp_path / name)
        config = train_sft.Config(
            run=folder,
            resume=folder if is_resumed else None,
            source="gold",
            model=SMALL,
            data=DataConfig(toy_folder=str(tmp_path / "world")),
            sft=replace(train_sft.SftConfig(), max_samples=32, epochs=2),
        )
        train_sft.main(config.completed())

    run("straight")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    notes = json.loads((straight / "gold.json").read_text())
    printed = capsys.readouterr().out
    assert all(line in printed for line in notes["lines"])
    file = straight / "demonstrations.jsonl"
    assert len(read_demonstrations(file)) == int(notes["lines"][0].split()[0]) > 300

    calls = itertools.count()

    def stop_after_five():
        if next(calls) == 5:
            raise KeyboardInterrupt
        return no_interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "no_interrupt", stop_after_five)
        try:
            with pytest.raises(KeyboardInterrupt):
                run("killed")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run("killed", is_resumed=True)
    assert metrics(killed) == metrics(straight) and len(metrics(killed)) == 8
    weights = "model/model.safetensors"
    assert_same_tensors(straight / weights, killed / weights)

    two = "--run runs/two --source gold --sft.max_samples 8 --sft.epochs 1".split()
    finish(start(*FLAGS[:6], *two, cwd=tmp_path, script=SMALL_SFT, launcher=TWO))
    for other in (killed, tmp_path / "runs/two"):
        assert (other / "demonstrations.jsonl").read_text() == file.read_text()


def test_keys_without_effect_are_errors_before_anything_is_loaded():
    def check(**values: object) -> None:
        train_sft.check(train_sft.Config(**values))

    check(source="gold", gold=GoldConfig(kept=0))
    with pytest.raises(ValueError, match="gold has no effect with source=self"):
        check(source="self", gold=GoldConfig(kept=0))
    with pytest.raises(ValueError, match="gold has no effect with source=demonstrations"):
        check(gold=GoldConfig(kept=0))
    with pytest.raises(ValueError, match="demonstrations has no effect with source=gold"):
        check(source="gold", demonstrations="some.jsonl")
