"""What a run of train_rl.py keeps of its evaluations, and its last lines."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from helpers.checkpoints import write
from mtsql import rl_run
from mtsql.rl.curriculum import Curriculum
from mtsql.rl_run import Progress, draw, report
from mtsql.run.checkpoint import best_checkpoint
from mtsql.run.launch import NothingLearned
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog
from mtsql.sql.datasets import DataConfig

BEFORE = {"dev_seen": {"ex": 41.3, "em": 81.7}, "dev": {"ex": 31.7, "em": 63.7}}
AFTER = {"dev_seen": {"ex": 52.3, "em": 74.0}, "dev": {"ex": 40.7, "em": 59.3}}


@dataclass(frozen=True)
class Config:
    run: str = "runs/rl"
    resume: str | None = None
    data: DataConfig = DataConfig()


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session of a run of two updates, whose figure is an empty file."""
    monkeypatch.setattr(rl_run, "plot_training", lambda file, png: png.touch())
    monkeypatch.setattr(rl_run, "took", lambda config: "9 min 12 s")
    monkeypatch.setattr("mtsql.run.runlog.save_config", lambda *_: None)
    data = DataConfig(train="t.csv", dev="d.csv", databases="my data")
    config = Config(run=str(tmp_path / "run"), data=data)
    log = RunLog(tmp_path / "run", config)
    log.metrics({"stage": "eval", "update": 0, "eval_secs": 30.0})
    for update, warning in ((1, "no_step, entropy"), (2, None)):
        endings = {"outcome/answered": 0.875, "outcome/max_replies": 0.125, "outcome/bad_call": 0.0}
        done = {"stage": "rl", "update": update, "num_steps": 1, "warning": warning}
        shares = {"sql_wait_frac": 0.25, "accepted_frac": None, "drafted": 0, "learn_mfu": None}
        log.metrics({**done, **endings, **shares, "rollout_secs": 40.0})
    return SimpleNamespace(config=config, log=log, ranks=Ranks())


def test_the_last_lines_say_what_has_changed_and_where_things_are(session, capsys):
    write(session.log.folder, 2, ex={"dev_seen": 52.3, "dev": 40.7})
    report(session, 2, BEFORE, AFTER, LAST)
    out = capsys.readouterr().out
    assert "dev_seen: held-out EX 41.3 -> 52.3 (+11.0), EM 81.7 -> 74.0 (-7.7)\n" in out
    assert "dev: held-out EX 31.7 -> 40.7 (+9.0), EM 63.7 -> 59.3 (-4.4)\n" in out
    run = session.config.run
    for line in (
        "took             9 min 12 s\n",
        "evaluation 0:30, probe 0:00, rollouts 1:20, learning 0:00\n",
        "efficiency       waiting for SQL 25%\n",
        "episodes ended   answered 87.5%, max_replies 12.5% (last 2 updates)\n",
        "warnings         no_step (update 1), entropy (update 1)\n",
    ):
        assert line in out
    for path in (
        f"{run}/model",
        f"{run}/checkpoints/update-00002 (held-out EX 46.5)",
        f"{run}/training.png",
        f"python eval.py --model.path {run}/model --data.dev d.csv --data.databases 'my data'",
    ):
        assert path in " ".join(out.split())
    assert (session.log.folder / "training.png").is_file()


def test_a_best_checkpoint_from_before_training_is_called_so(session, capsys):
    write(session.log.folder, 0, ex={"dev": 40.0})
    report(session, 2, BEFORE, AFTER, LAST)
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/update-00000 (held-out EX 40.0, before training)" in out


def test_a_run_without_a_step_still_says_where_things_are(session, capsys):
    for row in session.log.rows:
        row["num_steps"] = 0
    with pytest.raises(NothingLearned, match="no optimizer step was taken in 2 updates"):
        report(session, 2, BEFORE, BEFORE, LAST)
    assert "next " in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [OSError("No space left"), KeyError("reward"), TypeError("None\n" * 999)]
)
def test_a_figure_that_cannot_be_drawn_is_a_warning(error, session, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(rl_run, "plot_training", fail)
    draw(session.log)
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("warning: figure: training.png was not drawn, the run goes on")
    assert type(error).__name__ in out and len(out) < 600


def test_the_curriculum_is_a_line():
    curriculum = Curriculum([["a", "b"], []], (0.5, 0.5), seed=1, num_dropped=4)
    line = "curriculum: 2 turns in stage 1, 0 turns in stage 2; 4 solved turns left out"
    assert Progress(curriculum, BEFORE, None).describe() == line


def test_progress_survives_a_checkpoint():
    curriculum = Curriculum([["a"], []], (0.5, 0.5), seed=1)
    for scores in (AFTER, None):
        progress = Progress(curriculum, BEFORE, scores, 7)
        state = {"update": 7, **progress.state()}
        assert Progress.from_state(state) == progress
        assert state["ex"] == (scores and {"dev_seen": 52.3, "dev": 40.7})


def test_the_best_checkpoint_is_that_of_the_highest_mean_ex(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert best_checkpoint(tmp_path) is None
    write(tmp_path, 1, ex=None)
    assert best_checkpoint(tmp_path) is None
    write(tmp_path, 2, ex={"a": 50.0, "b": 20.0})
    write(tmp_path, 3, ex={"a": 40.0, "b": 20.0})
    assert best_checkpoint(tmp_path) == (tmp_path / "checkpoints/update-00002", 35.0)
