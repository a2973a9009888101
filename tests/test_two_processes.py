"""Two processes started as a user starts them take the step of one, whatever share of the work each has."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_collect import refilled
from test_step import one_update, several_steps

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
RANK = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from mtsql.run.launch import leave_group, make_accelerator, start_missing_ranks
start_missing_ranks()
from test_collect import refilled
from test_step import one_update, several_steps
accelerator, results = make_accelerator("no"), {{}}
for name, (what, *inputs) in json.loads(sys.argv[1]).items():
    results[name] = globals()[what](*inputs, accelerator=accelerator)
    accelerator.free_memory()
Path(sys.argv[2], f"{{accelerator.process_index}}.json").write_text(json.dumps(results))
leave_group()
"""
TURNS = ["t1", "t2", "t4", "t5", "t7"]


def launch(flags, script, *args, cwd):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    return subprocess.run(
        [*ACCELERATE, *flags, str(script), *args],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def ranks(flags, work, folder):
    """What each of two ranks returns for the named calls in `work`, made one after another; of five
    samples a step takes, the inner lists say which each rank has."""
    script = folder / "rank.py"
    script.write_text(RANK)
    done = launch(
        ["--num_processes", "2", *flags], script, json.dumps(work), str(folder), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """One launch for all, because starting takes longer than the work."""
    work = {
        "uneven step": ("one_update", [[0], [1, 2, 3, 4]]),
        "uneven steps": ("several_steps", [[4], [0, 1, 2, 3]]),
        "idle steps": ("several_steps", [[], [0, 1, 2, 3, 4]]),
        "refilled": ("refilled", 9, TURNS),
    }
    return ranks([], work, tmp_path_factory.mktemp("together"))


def test_two_processes_take_the_step_of_one(together):
    alone = one_update([range(5)])
    for rank in together:
        assert rank["uneven step"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_two_processes_of_which_one_is_idle_take_the_step_of_one(tmp_path):
    alone = one_update([range(5)])
    for rank in ranks(["--cpu"], {"step": ("one_update", [[0, 1, 2, 3, 4], []])}, tmp_path):
        assert rank["step"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("share", ["uneven", "idle"])
def test_two_processes_take_the_several_steps_of_one(share, together):
    """Whole groups in the same steps, each with its own denominator, however they lie on the ranks;
    in some steps one rank has nothing, in one nobody."""
    alone = several_steps([range(5)])
    for rank in together:
        assert rank[f"{share} steps"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_two_processes_refill_as_one(together):
    """The same turns, each on one rank; both play every round, the one without a turn too."""
    alone, noted = refilled(9, TURNS)
    (one, noted_one), (two, noted_two) = [rank["refilled"] for rank in together]
    assert len(one) == len(two) == len(alone) > 1 and noted_one == noted_two == noted
    for turns, mine, theirs in zip(alone, one, two, strict=True):
        assert mine == turns[::2] and theirs == turns[1::2]


def test_a_crash_of_one_rank_ends_all_and_shows_its_own_traceback(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "from mtsql.run.launch import make_accelerator, start_missing_ranks\nstart_missing_ranks()\n"
        "accelerator = make_accelerator('no')\n"
        "if accelerator.process_index == 1:\n    raise RuntimeError('the reward of rank 1 is broken')\n"
        "accelerator.wait_for_everyone()\nimport time; time.sleep(100)\n"
    )
    start = time.monotonic()
    done = launch(["--num_processes", "2"], script, cwd=tmp_path)
    assert done.returncode != 0 and time.monotonic() - start < 90
    assert "RuntimeError: the reward of rank 1 is broken" in done.stderr
