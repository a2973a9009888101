"""What the rounds of stage 1 keep, and that a killed run goes on where it was."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_sft

from helpers.rounds import ScriptedRounds, tiny_rounds
from helpers.runs import assert_same_tensors, metrics
from helpers.small_world import SMALL
from mtsql import rounds
from mtsql.learner.step import Learner
from mtsql.rl import sweep
from mtsql.run.checkpoint import what_is_kept

SOLVED = {"train:136:0": 0, "train:9:3": 0, "train:1:2": 1}
"""The turns that are solved, with the round in which they are. Six turns are played."""
HELD_OUT = {"eval_split": "dev", "eval_turns": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a straight run has printed, which chunks it played, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtsql.sql.datasets.WorldConfig", lambda: SMALL)
        patch.chdir(tmp_path_factory.mktemp("rounds"))
        world = scripted(patch)
        printed = []
        patch.setattr("mtsql.run.runlog.print_line", printed.append)
        train_sft.main(tiny_rounds("runs/straight", **HELD_OUT).completed())
        text = " ".join(" ".join(printed).split())
        yield SimpleNamespace(text=text, asked=list(world.asked), folder=Path.cwd())


def scripted(patch):
    """The rollouts of this page's runs."""
    return ScriptedRounds(patch, lambda turn_id, number: SOLVED.get(turn_id) == number)


@pytest.fixture
def world(straight, monkeypatch, small_world):
    """The folder of the straight run, with scripted rollouts."""
    monkeypatch.chdir(straight.folder)
    return scripted(monkeypatch)


def files(run):
    """The files of the rounds, except for weights."""
    kept = [path for path in Path(run, "rounds").rglob("*.json*") if path.parent.name != "model"]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def assert_same(one, other):
    assert metrics(Path(one)) == metrics(Path(other))
    assert files(one) == files(other) and len(files(one)) == 6
    for folder in ("model", "rounds/round0/model", "rounds/round1/model"):
        assert_same_tensors(*(Path(run, folder, "model.safetensors") for run in (one, other)))


def run_until_it_dies(config, resume=None):
    with pytest.raises(ZeroDivisionError):
        train_sft.main(replace(config, resume=resume).completed())


def die_in_step(patch, number):
    """Let the process die in its optimizer step of this number."""
    steps, optimizer_step = iter(range(99)), Learner.optimizer_step

    def step(*args, **named):
        return optimizer_step(*args, **named) if next(steps) < number else 1 / 0

    patch.setattr(Learner, "optimizer_step", step)


def test_rounds_keep_right_rollouts_and_say_what_they_have_solved(straight):
    for text in (
        "round 0: 6 turns, 2 rollouts of each round 0: solved 2 of 6 turns, added 2 trajectories",
        "solved so far 33.3% of 6 turns: easy 50.0%, medium 100.0%, hard 0.0%, extra "
        "0.0%; by turn: 1 50.0%, 3 0.0%, 4 50.0%; whole dialogues 33.3%",
        "rollouts: 16.7% right; 1.0 replies and 9 tokens on average; ended: answered 100.0%",
        "round 0: dev EX 0.0 EM 0.0 (2 turns) round 1: 4 turns, 2 rollouts of each",
        "round 1: solved 1 of 4 turns, added 1 trajectories",
        "solved so far 50.0% of 6 turns",
    ):
        assert text in straight.text, text
    asked = {
        number: [t for n, ids in straight.asked if n == number for t in ids] for number in (0, 1)
    }
    assert set(asked[1]) == {turn for turn in asked[0] if SOLVED.get(turn) != 0}


def test_each_round_leaves_its_pool_coverage_scores_and_model(straight):
    run = straight.folder / "runs/straight"
    rows = metrics(run)
    first, second = ["collect", "round0", "eval"], ["collect", "round1", "round1", "eval"]
    assert [row["stage"] for row in rows] == first + second
    assert rows[0]["solved_frac"] == pytest.approx(1 / 3)
    assert rows[3]["solved_frac/hard"] == pytest.approx(1 / 2) and rows[3]["num_turns"] == 4
    assert rows[0]["num_episodes"] == 12 and rows[0]["num_sampled"] == 60
    for number in (0, 1):
        folder = run / f"rounds/round{number}"
        names = {path.name for path in folder.iterdir()}
        expected = {"pool.jsonl", "chat_template.jinja", "coverage.json", "dev.json", "model"}
        assert names == expected
        pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
        solved = {turn_id for turn_id, when in SOLVED.items() if when == number}
        assert {one["turn_id"] for one in pool} == solved
        assert {one["round"] for one in pool} == {number}
        content = json.loads((folder / "coverage.json").read_text())
        successes = content["rollouts"]["successes"]
        assert {turn_id for turn_id, count in successes.items() if count == [1, 2]} == solved
        assert content["so_far"]["solved"] == (2, 3)[number]
        assert (folder / "model/mtsql.json").is_file()
        scores = json.loads((folder / "dev.json").read_text())
        assert len(scores["turns"]) == scores["all"]["count"] == 2


def test_a_run_that_is_killed_in_a_round_is_the_straight_run(world):
    config = tiny_rounds("runs/once", **HELD_OUT)
    world.num_left = 4  # of 3 and 2 chunks
    run_until_it_dies(config)
    kept = "runs/once/checkpoints/update-00001 and 1 chunk of rollouts are kept: "
    assert what_is_kept(Path("runs/once")) == f"{kept}continue with --resume runs/once"
    world.num_left = 1
    train_sft.main(replace(config, resume="runs/once").completed())
    assert_same("runs/straight", "runs/once")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_straight_run(world, monkeypatch):
    config = tiny_rounds("runs/killed", **HELD_OUT)
    world.num_left = 2
    run_until_it_dies(config)  # in the third chunk of the first round
    kept = "2 chunks of rollouts are kept: continue with --resume runs/killed"
    assert what_is_kept(Path("runs/killed")) == kept
    file = Path("runs/killed/rounds/round0/chunks/rank0.jsonl")
    file.write_bytes(file.read_bytes()[:-1])  # the second chunk is torn
    world.num_left = 2
    with monkeypatch.context() as patch:
        die_in_step(patch, 0)
        run_until_it_dies(config, "runs/killed")  # before the first step
    assert not world.num_left and not file.exists()
    world.num_left = 1
    run_until_it_dies(config, "runs/killed")  # in the second chunk of the second round
    world.num_left = 1
    with monkeypatch.context() as patch:
        die_in_step(patch, 1)
        run_until_it_dies(config, "runs/killed")  # in the second step of the second round
    world.num_left = 0  # no further rollout
    train_sft.main(replace(config, resume="runs/killed").completed())
    assert_same("runs/straight", "runs/killed")


def test_ctrl_c_while_a_round_samples_says_what_is_kept(world):
    config = tiny_rounds("runs/stopped", **HELD_OUT)
    world.num_left, world.error = 1, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as stop:
        train_sft.main(config.completed())
    said = "0 updates and 1 chunk of rollouts are done; continue with --resume runs/stopped"
    assert str(stop.value) == said


def test_a_model_that_solves_nothing_stops_after_the_first_turns_with_advice(world, monkeypatch):
    monkeypatch.setattr(sweep, "FIRST_TURNS", 3)
    world.is_solved = lambda turn_id, number: False
    with pytest.raises(ValueError, match="none of the first 4 turns right in 2 rollouts") as error:
        train_sft.main(tiny_rounds("runs/none").completed())
    assert str(error.value).endswith("(rollouts ended: answered 100%): " + rounds.ADVICE_TOY)
    assert len(world.asked) == 2  # of three chunks
    counts = {"right": 0, "num": 2, "successes": {"t": [0, 2]}, "endings": {"no_action": 2}}
    real = SimpleNamespace(
        data=SimpleNamespace(is_toy=False), selftaught=SimpleNamespace(samples_per_turn=2)
    )
    with pytest.raises(ValueError, match="--source gold.*--source file"):
        rounds._require_success(counts, real)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["policy", "first", "base"])
def test_a_round_starts_from_the_named_weights_and_with_a_new_adam(start, world, monkeypatch):
    when = {turn_id: number for number, turn_id in enumerate(SOLVED)}
    world.is_solved = lambda turn_id, number: when.get(turn_id) == number
    begun, ended = [], []
    start_afresh, train_on = Learner.start_afresh, train_sft.train_on

    def watched(learner, model=None):
        start_afresh(learner, model)
        assert not learner.optimizer.optimizer.state
        begun.append(weights(learner))

    def train(samples, config, session, learner, progress):
        train_on(samples, config, session, learner, progress)
        assert learner.optimizer.optimizer.state
        ended.append(weights(learner))

    def weights(learner):
        return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])

    monkeypatch.setattr(Learner, "start_afresh", watched)
    monkeypatch.setattr(train_sft, "train_on", train)
    train_sft.main(tiny_rounds(f"runs/{start}", start=start, rounds=3).completed())
    expected = {
        "policy": [begun[0], ended[0], ended[1]],
        "first": [begun[0], ended[0], ended[0]],
        "base": [begun[0]] * 3,
    }[start]
    assert all(torch.equal(one, other) for one, other in zip(begun, expected, strict=True))
    assert not torch.equal(ended[0], ended[1]) and not torch.equal(begun[0], ended[0])
