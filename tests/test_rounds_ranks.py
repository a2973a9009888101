"""Rounds of stage 1 on two processes, with whole and with sharded weights."""

import json
from functools import partial

import pytest

from helpers import runs
from helpers.runs import FLAGS, FSDP, SCRIPTS, TWO, finish, metrics

start = partial(runs.start, script=SCRIPTS / "scripted_sft.py")
ROUNDS = (
    "--source self --max_turns 12 --selftaught.rounds 3 --selftaught.samples_per_turn 2"
    " --selftaught.start first --selftaught.eval_turns 3 --sft.epochs 2 --sft.samples_per_update 2"
    " --sampling.max_reply_tokens 8 --sampling.max_trajectory_tokens 64"
).split()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of one process in runs/one."""
    folder = tmp_path_factory.mktemp("ranks")
    finish(start(*FLAGS[:6], *ROUNDS, "--run", "runs/one", cwd=folder))
    return folder


@pytest.mark.parametrize("launcher", [TWO, FSDP], ids=["copies", "shards"])
def test_two_processes_share_the_chunks_and_collect_the_same_pool(launcher, folder):
    name = f"runs/two{len(launcher)}"
    finish(start(*FLAGS[:6], *ROUNDS, "--run", name, cwd=folder, launcher=launcher))
    one, two = folder / "runs/one", folder / name
    for number in range(3):
        for file in ("pool.jsonl", "coverage.json"):
            place = f"rounds/round{number}/{file}"
            assert (one / place).read_bytes() == (two / place).read_bytes()
        assert not (two / f"rounds/round{number}/chunks").exists()
        scores = json.loads((two / f"rounds/round{number}/dev.json").read_text())
        assert len(scores["turns"]) == 3
    rows = [metrics(run) for run in (one, two)]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["stage"] == theirs["stage"]
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
