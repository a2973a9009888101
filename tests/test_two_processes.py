"""Two processes, started as a user starts them, take the step of one, however the work is
shared."""

import json
import time

import pytest

from helpers.collecting import resampled
from helpers.learning import one_update, several_steps
from helpers.runs import SCRIPTS, launch

EQUAL = ["t1", "t2", "t4", "t5", "t7"]
RESAMPLED = {"turns": [f"t{i}" for i in range(8)], "rounds": 9, "equal": EQUAL}
ALL_GROUPS = [[0, 1, 2, 3, 4]]
"""One rank has all five groups."""


def ranks(flags, work, folder):
    """What each of two ranks returns for the named calls in `work`, made one after another."""
    flags = ["--num_processes", "2", *flags]
    done = launch(flags, SCRIPTS / "learning_rank.py", json.dumps(work), str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """One launch for all, because starting takes longer than the work."""
    work = {
        "uneven step": ("one_update", {"share": [[0], [1, 2, 3, 4]]}),
        "uneven steps": ("several_steps", {"share": [[4], [0, 1, 2, 3]]}),
        "idle steps": ("several_steps", {"share": [[], [0, 1, 2, 3, 4]]}),
        "resampled": ("resampled", RESAMPLED),
    }
    return ranks([], work, tmp_path_factory.mktemp("together"))


def test_two_processes_take_the_step_of_one(together):
    alone = one_update(ALL_GROUPS)
    for rank in together:
        assert rank["uneven step"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_two_processes_of_which_one_is_idle_take_the_step_of_one(tmp_path):
    alone = one_update(ALL_GROUPS)
    work = {"step": ("one_update", {"share": [[0, 1, 2, 3, 4], []]})}
    for rank in ranks(["--cpu"], work, tmp_path):
        assert rank["step"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("share", ["uneven", "idle"])
def test_two_processes_take_the_several_steps_of_one(share, together):
    """The same steps hold the same whole groups with one denominator, whichever rank has them. In
    some steps one rank has no group; in one step no group has an advantage."""
    alone = several_steps(ALL_GROUPS)
    keys = ("loss", "grad_norm", "num_tokens", "ratio")
    for rank in together:
        found = rank[f"{share} steps"]
        assert found["gap"] == pytest.approx(alone["gap"], rel=1e-4, abs=1e-5)
        assert found["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-5)
        for mine, expected in zip(found["steps"], alone["steps"], strict=True):
            assert bool(mine) == bool(expected)
            numbers = [mine[key] for key in keys if mine]
            assert numbers == pytest.approx([expected[k] for k in keys if mine], rel=1e-4, abs=1e-5)


def test_two_processes_resample_as_one(together):
    """The same turns, each on one rank. Both play in every round, with or without a turn."""
    alone, metrics = resampled(**RESAMPLED)
    (one, metrics_one), (two, metrics_two) = [rank["resampled"] for rank in together]
    assert len(one) == len(two) == len(alone) > 1
    assert metrics == metrics_one == metrics_two
    for turns, mine, theirs in zip(alone, one, two, strict=True):
        assert mine == turns[::2] and theirs == turns[1::2]


@pytest.mark.slow
def test_a_crash_of_one_rank_ends_all_and_shows_its_own_traceback(tmp_path):
    start = time.monotonic()
    done = launch(["--num_processes", "2"], SCRIPTS / "crashing_rank.py", cwd=tmp_path)
    assert done.returncode != 0 and time.monotonic() - start < 90
    assert "RuntimeError: the reward of this rank is broken" in done.stderr
