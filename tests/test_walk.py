"""docs/walk.py runs, leaves nothing behind, and names files that exist.

The page asserts its own equalities. These tests read the numbers that it prints.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "walk.py"
STEPS = (
    "A dialogue",
    "Render",
    "A policy with four habits",
    "Sample",
    "Parse",
    "Execute",
    "Reward",
    "Advantage",
    "Batch and log-probs",
    "Loss",
    "Gradient",
    "One optimizer step",
    "The same samples again",
)


@dataclass
class Walked:
    """What the page has printed, and the working and temporary folders in which it ran."""

    text: str
    folders: tuple[Path, Path]

    def step(self, number: int) -> str:
        """What a step has printed."""
        return re.split(r"^==== .*\n", self.text, flags=re.M)[number]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Walked:
    folders = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folders[1])}
    done = subprocess.run(
        [sys.executable, str(PAGE)], cwd=folders[0], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Walked(done.stdout, folders)


def numbers(text: str) -> list[list[float]]:
    """The rows of a table: lines of numbers only, apart from a word at the end."""
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d", line)]
    return [[float(word) for word in row if re.fullmatch(r"[-+.\d]+", word)] for row in rows]


def test_it_prints_its_steps_for_a_terminal_and_leaves_nothing(walked):
    headings = re.findall(r"^==== (\d+)\. (.+?): ([\w/]+\.py) =+$", walked.text, flags=re.M)
    assert [(int(number), step) for number, step, _ in headings] == [*enumerate(STEPS, 1)]
    assert max(map(len, walked.text.splitlines())) <= 80
    here, temporary = walked.folders
    assert not list(here.iterdir())
    left = [path.name for path in temporary.iterdir()]
    # torch makes an empty folder for its compiler in any program with an optimizer.
    assert all(name.startswith("torchinductor_") for name in left)
    assert not [path for path in temporary.rglob("*") if path.is_file()]


def test_the_shown_tokens_are_five_a_line_and_have_a_log_prob_where_the_mask_is_1(walked):
    _, _, table = walked.step(4).partition("log-prob\n")
    tokens = [re.findall(r"(\d+) ([01]) (\S+)", line) for line in table.splitlines()[1::2]]
    assert {len(line) for line in tokens[:-1]} == {5}
    flat = [token for line in tokens for token in line]
    for _, mask, logprob in flat:
        assert re.fullmatch(r"-\d+\.\d\d" if mask == "1" else "-", logprob)
    masks = "".join(mask for _, mask, _ in flat)
    assert re.fullmatch("1{20,}0{15}", masks)  # a whole reply, then what the environment wrote


def test_the_masks_add_up_to_the_trained_positions(walked):
    rows = numbers(walked.step(4).partition("\n\n")[0])
    [num_trained] = re.findall(r"^P = (\d+)", walked.step(9), flags=re.M)
    assert len(rows) == 6 and sum(row[3] for row in rows) == int(num_trained)


def test_the_advantages_are_those_by_hand_and_add_up_to_0(walked):
    pairs = re.findall(r"= (\S+), the function: (\S+)$", walked.step(8), flags=re.M)
    assert len(pairs) == 6 and all(by_hand == function for by_hand, function in pairs)
    assert abs(sum(float(function) for _, function in pairs)) < 0.01
    assert any(float(function) > 0 for _, function in pairs)


def test_the_loss_by_hand_is_that_of_the_function_with_and_without_clipping(walked):
    for number in (10, 13):
        losses = re.findall(r"(\S+) / (\d+) tokens = (\S+)$", walked.step(number), flags=re.M)
        assert len(losses) == 2 and losses[0] == losses[1]
    rows = re.findall(r"(\d\.\d+) +(\d\.\d+) +[-+]\d\.\d+$", walked.step(10), flags=re.M)
    assert len(rows) == 8 and set(rows) == {("1.000", "0.000")}  # ratio and KL
    [above, below] = re.findall(r"(\d+) (?:tokens above|below)", walked.step(13))
    assert int(above) > 0 and int(below) > 0


def test_the_gradient_is_the_slope_of_the_loss(walked):
    [(gradient, slope)] = re.findall(r"autograd (\S+), by differences (\S+)", walked.step(11))
    assert float(gradient) == pytest.approx(float(slope), rel=1e-3) and float(gradient)


def test_the_step_makes_the_best_sample_likelier_and_the_worst_less_likely(walked):
    rows = numbers(walked.step(12))
    assert len(rows) == 6
    best = max(rows, key=lambda row: row[1])
    worst = min(rows, key=lambda row: row[1])
    assert best[2] > 0 and best[4] > best[3] and best[5] > 0
    assert worst[2] < 0 and worst[4] < worst[3] and worst[5] < 0


def test_every_step_names_files_of_the_trainer_that_exist():
    text = PAGE.read_text()
    cells = text.split("# %% [markdown]\n")[2:]  # the first is the introduction
    assert len(cells) == len(STEPS)
    for cell, step in zip(cells, STEPS):
        notes = cell.partition("# %%\n")[0]
        assert notes.splitlines()[0].endswith(f". {step}")
        named = re.findall(r"`([\w/]+\.py)`", notes.partition("In the trainer:")[2])
        [shown] = re.findall(r'^title\(".+", "(.+)"\)$', cell, flags=re.M)
        assert shown in named, step
    for name in re.findall(r"[\w/]+\.py\b", text):
        assert (ROOT / name).is_file() or name == "rewards.py", name
