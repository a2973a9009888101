"""What the rounds of stage 1 keep, and that a killed run goes on where it was."""

from pathlib import Path

import pytest
import train_sft

from helpers.rounds import ScriptedRounds, tiny_rounds
from helpers.runs import metrics
from mtsql.learner.step import Learner


@pytest.fixture
def world(tmp_path, monkeypatch, small_world):
    """A folder with the small toy world. Half of the turns are solved in the first round."""
    monkeypatch.chdir(tmp_path)
    return ScriptedRounds(monkeypatch, lambda turn_id, number: hash_of(turn_id) % 2 == 0)


def hash_of(turn_id):
    return sum(map(ord, turn_id))


def files(run):
    """The files of the rounds, except for weights."""
    kept = [path for path in Path(run, "rounds").rglob("*") if path.suffix in (".json", ".jsonl")]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def die_in_step(monkeypatch, number):
    """Let the process die in its optimizer step of this number."""
    steps, optimizer_step = iter(range(99)), Learner.optimizer_step
    monkeypatch.setattr(
        Learner,
        "optimizer_step",
        lambda *args, **named: optimizer_step(*args, **named) if next(steps) < number else 1 / 0,
    )


def test_rounds(world, capsys):
    config = tiny_rounds("runs/self")
    train_sft.main(config.completed())
    out = capsys.readouterr().out
    print(out)
    print(files("runs/self").keys())
    print(metrics(Path("runs/self")))
    print(Path("runs/self/rounds/round0/coverage.json").read_text())
    assert 0
