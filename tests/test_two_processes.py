"""Two processes started as a user starts them take the step of one, whatever share of the work each has."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_episodes import refilled
from test_learner import one_update, several_steps

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
RANK = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from mtsql.launch import leave_group, make_accelerator, start_missing_ranks
start_missing_ranks()
from test_learner import one_update, several_steps
accelerator = make_accelerator("no")
result = (several_steps if len(sys.argv) > 3 else one_update)(json.loads(sys.argv[1]), accelerator)
Path(sys.argv[2], f"{{accelerator.process_index}}.json").write_text(json.dumps(result))
accelerator.free_memory()
leave_group()
"""


def launch(flags, script, *args, cwd):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    return subprocess.run([*ACCELERATE, *flags, str(script), *args], cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=900)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "share"),
    [("--num_processes 2", [[0], [1, 2, 3, 4]]), ("--num_processes 2 --cpu", [[0, 1, 2, 3, 4], []])],
    ids=("uneven", "one rank idle"),
)
def test_two_processes_take_the_step_of_one(flags, share, tmp_path):
    alone = one_update([range(5)])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = launch(flags.split(), script, json.dumps(share), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("share", [[[4], [0, 1, 2, 3]], [[], [0, 1, 2, 3, 4]]], ids=("uneven", "one rank idle"))
def test_two_processes_take_the_several_steps_of_one(share, tmp_path):
    """Whole groups in the same steps, each with its own denominator, however they lie on the ranks; in some steps one
    rank has nothing, in one nobody."""
    alone = several_steps([range(5)])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = launch(["--num_processes", "2"], script, json.dumps(share), str(tmp_path), "several", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-4, abs=1e-5)


REFILL = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from mtsql.launch import leave_group, make_accelerator, start_missing_ranks
start_missing_ranks()
from test_episodes import refilled
accelerator = make_accelerator("no")
mine, noted = refilled(9, ["t1", "t2", "t4", "t5", "t7"], accelerator=accelerator)
Path(sys.argv[1], f"{{accelerator.process_index}}.json").write_text(json.dumps([mine, noted]))
accelerator.free_memory()
leave_group()
"""


def test_two_processes_refill_as_one(tmp_path):
    """The same turns, each on one rank; both play every round, the one without a turn too."""
    (tmp_path / "rank.py").write_text(REFILL)
    done = launch(["--num_processes", "2"], tmp_path / "rank.py", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone, noted = refilled(9, ["t1", "t2", "t4", "t5", "t7"])
    (one, noted_one), (two, noted_two) = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(one) == len(two) == len(alone) > 1 and noted_one == noted_two == noted
    for turns, mine, theirs in zip(alone, one, two, strict=True):
        assert mine == turns[::2] and theirs == turns[1::2]


def test_a_crash_of_one_rank_ends_all_and_shows_its_own_traceback(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "from mtsql.launch import make_accelerator, start_missing_ranks\nstart_missing_ranks()\n"
        "accelerator = make_accelerator('no')\n"
        "if accelerator.process_index == 1:\n    raise RuntimeError('the reward of rank 1 is broken')\n"
        "accelerator.wait_for_everyone()\nimport time; time.sleep(100)\n"
    )
    start = time.monotonic()
    done = launch(["--num_processes", "2"], script, cwd=tmp_path)
    assert done.returncode != 0 and time.monotonic() - start < 90
    assert "RuntimeError: the reward of rank 1 is broken" in done.stderr
