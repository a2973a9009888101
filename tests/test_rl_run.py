"""What a run of train_rl.py keeps of its evaluations, and its last lines."""

import json
import shlex
import shutil
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import eval as eval_script
import pytest
import train_rl

from helpers.checkpoints import write
from mtsql import rl_run
from mtsql.lines import same_flags
from mtsql.rl.curriculum import Curriculum
from mtsql.rl_run import (
    TRAINING_DATA,
    Progress,
    Selection,
    draw,
    report,
    save_selected,
    selecting_split,
)
from mtsql.run.checkpoint import best_checkpoint
from mtsql.run.config import parse_config
from mtsql.run.launch import NothingLearned
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog
from mtsql.session import Session
from mtsql.sql.datasets import DataConfig
from mtsql.sql.held_out import require_whole

LAST = Selection(2, 2, None)
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


def test_eval_takes_the_data_flags_that_the_last_lines_name():
    data = DataConfig(
        train="t.json", dev="d.json", databases="db", goals=True, leave_out="l.tsv", hold_out=3
    )
    words = shlex.split(same_flags(train_rl.Config(data=data), without=TRAINING_DATA))
    config = parse_config(eval_script.Config, words, "")
    require_whole(config.data, "eval.py")
    assert config.data == DataConfig(dev="d.json", databases="db")


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


def save_text(folder, text):
    folder.mkdir()
    (folder / "weights").write_text(text)


@pytest.fixture
def selecting(session):
    """A session whose run was evaluated after 0, 1 and 2 updates, and whose weights are `last`."""
    session.folder = session.log.folder
    session.copy_model = partial(Session.copy_model, session)
    session.save_model = lambda notes: save_text(session.folder / "model", f"last {notes}")
    for update, held_out, dev in ((0, 30.0, 55.0), (1, 50.0, 40.0), (2, 50.0, 60.0)):
        scores = {"held_out_ex": held_out, "held_out_em": 1.0, "dev_ex": dev}
        session.log.metrics({"stage": "eval", "update": update, **scores})
        save = partial(save_text, text=str(update))
        write(session.folder, update, {"held_out": held_out}, save_model=save)
    return session


def test_the_model_is_the_best_on_the_selecting_split_and_the_first_of_equals(selecting, capsys):
    (selecting.folder / "model").mkdir()
    (selecting.folder / "model/older").touch()
    selection = save_selected(selecting, 2, "held_out")
    assert selection == Selection(1, 2, "held_out")
    model = selecting.folder / "model"
    assert (model / "weights").read_text() == "1" and not (model / "older").exists()
    assert not list(selecting.folder.glob(".model*"))
    assert json.loads((model / "selected.json").read_text()) == {
        "run": str(selecting.folder),
        "update": 1,
        "num_updates": 2,
        "select_by": "held_out",
        "ex": {
            "0": {"held_out": 30.0, "dev": 55.0},
            "1": {"held_out": 50.0, "dev": 40.0},
            "2": {"held_out": 50.0, "dev": 60.0},
        },
    }
    report(selecting, 2, BEFORE, AFTER, selection)
    out = " ".join(capsys.readouterr().out.split())
    selected = "(update 1 of 2, selected by held_out: held_out EX 50.0, dev EX 40.0)"
    assert f"model {model} {selected} last weights" in out
    last = f"{selecting.folder}/checkpoints/update-00002/model (held_out EX 50.0, dev EX 60.0)"
    assert f"last weights {last}" in out and "best checkpoint" not in out


def test_a_model_that_training_did_not_improve_is_said_to_be_the_first(selecting, capsys):
    write(selecting.folder, 0, {"held_out": 70.0})
    report(selecting, 2, BEFORE, AFTER, save_selected(selecting, 2, "held_out"))
    out = " ".join(capsys.readouterr().out.split())
    assert "model (before training, update 0, selected by held_out: held_out EX 30.0" in out


def test_a_checkpoint_that_would_be_selected_but_was_deleted_is_named(selecting, capsys):
    shutil.rmtree(selecting.folder / "checkpoints/update-00001")
    assert save_selected(selecting, 2, "held_out").update == 2
    assert "warning" not in capsys.readouterr().out  # the next one is as good
    shutil.rmtree(selecting.folder / "checkpoints/update-00002")
    save = partial(save_text, text="0")
    write(selecting.folder, 0, {"held_out": 30.0}, save_model=save)
    assert save_selected(selecting, 2, "held_out").update == 0
    words = "update 1 had a higher EX on held_out than update 0, which is selected, but its"
    assert words in " ".join(capsys.readouterr().out.split())


def test_without_a_selection_the_model_has_the_last_weights(selecting):
    assert save_selected(selecting, 2, None) == LAST
    text = (selecting.folder / "model/weights").read_text()
    assert text.startswith("last") and "'update': 2" in text


def test_progress_keeps_the_ex_that_selects():
    scores = {"held_out": {"ex": 5.0, "em": 1.0}, "dev": {"ex": 9.0, "em": 2.0}}
    progress = Progress(Curriculum([["a"]], (1.0,), 0), scores, scores, 3, "held_out")
    state = {"update": 3, **progress.state()}
    assert state["ex"] == {"held_out": 5.0}
    assert Progress.from_state(state, "held_out") == progress


def test_a_split_that_is_not_there_selects_nothing_and_is_named(session, capsys):
    session.workbench = SimpleNamespace(corpora={"train": None, "dev": None})
    assert selecting_split(session, "dev") == "dev" and selecting_split(session, "none") is None
    assert not capsys.readouterr().out
    assert selecting_split(session, "held_out") is None
    assert "of fewer than 10 training databases none is held out" in capsys.readouterr().out
