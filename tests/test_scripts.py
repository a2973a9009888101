"""The scripts as a user starts them: files written, errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    f"--model.embedded.{name}={value}"
    for name, value in {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32}.items()
]

SHORT = (
    "--warm_start.max_samples 32 --warm_start.epochs 1 --num_updates 2 --turns_per_update 2"
    " --group_size 2 --eval_turns 4 --curriculum.max_probe_turns 4 --curriculum.probe_samples 1"
    " --sampling.max_reply_tokens 8 --reward.overlong_buffer 640 --advantage.baseline none"
    " --advantage.scale none"
).split()
"""Length is punished and nothing is subtracted, so every update takes a step."""


def start(script, *flags, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_warm_start_rl_and_eval_on_the_embedded_world(tmp_path):
    done = start("train_rl.py", *SMALL, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out EX" in done.stdout
    run = tmp_path / "runs" / "rl"
    for name in (
        "config.yaml",
        "versions.json",
        "training.png",
        "model/config.json",
        "eval/dev-00000.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "trajectories").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if line["stage"] == "rl"] == [1, 2]
    remembered = json.loads((run / "model/mtsql.json").read_text())
    for folder in (run / "checkpoints").glob("update-*"):
        assert json.loads((folder / "model/mtsql.json").read_text()) == remembered
        assert "model/mtsql.json" in json.loads((folder / "state.json").read_text())["files"]
    flags = "--model.path runs/rl/model --history predicted --max_dialogues 2 --env.max_replies 3"
    scored = start("eval.py", *flags.split(), cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    changed = "differs from the training of runs/rl/model: env.max_replies 3 (was 6)\n"
    assert changed in scored.stdout
    scores = json.loads((tmp_path / "runs/eval/scores.json").read_text())
    assert scores["config"]["style"] == "brief" == remembered["style"]
    assert remembered["sampling"]["max_reply_tokens"] == 8
    assert scores["config"]["sampling"]["max_reply_tokens"] == 8
    assert scores["config"]["sampling"]["max_trajectory_tokens"] == 640
    assert [one["data"] for one in scores["results"]] == ["toyworld dev_seen", "toyworld dev"]
    for one in scores["results"]:
        assert one["history"] == "predicted" and one["interaction"]["count"] == 2
        name = f"{one['data'].replace(' ', '-')}-predicted.sql"
        predictions = (tmp_path / "runs/eval/predictions" / name).read_text()
        assert [len(part.splitlines()) for part in predictions.rstrip("\n").split("\n\n")] == [
            len([t for t in one["turns"] if t["dialogue_id"] == f"{one['split']}:{i}"])
            for i in range(2)
        ]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        pytest.param("train_rl.py", "--nonsense 3", "nonsense", marks=pytest.mark.slow),
        pytest.param("train_sft.py", "--data.dev x.json", "data.dev", marks=pytest.mark.slow),
        ("eval.py", "--model.path nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(script, flags, words, tmp_path):
    done = start(script, *flags.split(), cwd=tmp_path)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
