"""Experiment trackers: what they are given, and what a resumed run does. The packages of the real
ones are not needed, except for one test with TensorBoard's own files."""

import html
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import train_rl
import train_sft
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration

from helpers.collecting import scored
from helpers.runs import clean_environment
from mtsql.rl.scored import Scored
from mtsql.rl.trajectory_table import trajectory_table
from mtsql.run import trackers
from mtsql.run.checkpoint import Checkpoint
from mtsql.run.config import parse_config
from mtsql.run.launch import make_accelerator
from mtsql.run.runlog import RunLog
from mtsql.run.trackers import log_table, markdown_table, start_trackers, tracked_numbers
from mtsql.session import check_folder

ROW = {"time": 1.5, "stage": "rl", "update": 3, "reward": 0.5, "loss": None, "outcome/answered": 1}
NUMBERS = {"rl/reward": 0.5, "rl/outcome/answered": 1}


@dataclass(frozen=True)
class Optim:
    lr: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.99)


@dataclass(frozen=True)
class Config:
    run: str = "x"
    resume: str | None = None
    optim: Optim = Optim()
    trackers: Sequence[str] = ("tensorboard",)


class ListTracker(GeneralTracker):
    """Keeps what it is given."""

    name = "list"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.configurations: list[dict] = []
        self.logged: list[tuple[dict, int]] = []

    @property
    def tracker(self) -> list:
        return self.logged

    def store_init_configuration(self, values: dict) -> None:
        self.configurations.append(values)

    def log(self, values: dict, step: int, **_: object) -> None:
        self.logged.append((values, step))


@dataclass
class Recorded:
    """An Accelerator that keeps the arguments of init_trackers."""

    is_main_process: bool = True
    process_index: int = 0
    num_processes: int = 1
    options: list[dict] = field(default_factory=list)
    trackers: list = field(default_factory=list)

    def init_trackers(self, project: str, init_kwargs: dict) -> None:
        self.options.append(init_kwargs)


def test_a_row_is_logged_as_numbers_below_its_stage():
    assert tracked_numbers(ROW | {"is_any": True, "word": "x"}) == NUMBERS


def test_trackers_get_the_configuration_and_each_row(tmp_path):
    accelerator = Accelerator(cpu=True, log_with=[ListTracker()])
    start_trackers(accelerator, tmp_path, Config(), 0)
    log = RunLog(tmp_path, Config(), track=accelerator.log)
    log.metrics(ROW)
    [tracker] = accelerator.trackers
    assert tracker.configurations == [
        {
            "run": "x",
            "resume": "None",
            "optim.lr": 0.5,
            "optim.betas": "[0.9, 0.99]",
            "trackers": "['tensorboard']",
        }
    ]
    [(numbers, step)] = tracker.logged
    assert numbers.items() >= NUMBERS.items() and step == 3  # and times, which the log adds
    assert json.loads(log.metrics_file.read_text())["reward"] == 0.5


def test_a_row_with_a_number_that_is_not_finite_is_not_tracked(tmp_path):
    logged = []
    log = RunLog(tmp_path / "run", Config(), track=lambda *given: logged.append(given))
    with pytest.raises(ValueError, match="reward is not finite"):
        log.metrics(ROW | {"reward": float("inf")})
    assert not logged


def test_a_tracker_that_fails_is_one_warning_and_later_rows_are_logged(tmp_path, capsys):
    logged = []

    def track(numbers, step):
        if step < 5:
            raise ConnectionError("the server is gone\n" * 99)
        logged.append(step)

    log = RunLog(tmp_path / "run", Config(), track=track)
    for step in (3, 4, 5):
        log.metrics(ROW | {"update": step})
    out = " ".join(capsys.readouterr().out.split())
    assert (
        out.count("warning: tracker: a row was not logged, the run goes on (ConnectionError: ") == 1
    )
    assert logged == [5] and len(log.rows) == 3 and len(out) < 600


def test_only_the_main_rank_tracks(tmp_path):
    logged = []
    other = Recorded(is_main_process=False)
    start_trackers(other, tmp_path, Config(), 0)
    log = RunLog(tmp_path, Config(), is_main=False, track=lambda *given: logged.append(given))
    log.metrics(ROW)
    assert not other.options and not logged and not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_under_its_name_after_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("mtsql.session.check_files", lambda *_: None)
    run, accelerator = tmp_path / "run", Recorded()
    check_folder(Config(str(run)), None, accelerator)
    begun = Checkpoint(run, {"update": 7}, {})
    check_folder(Config(str(run), resume=str(run)), begun, accelerator)
    check_folder(Config(str(tmp_path / "other")), None, accelerator)
    first, resumed, other = accelerator.options
    assert first["tensorboard"] == {"purge_step": 0}
    assert resumed["tensorboard"] == {"purge_step": 8}
    for name, key in (("wandb", "id"), ("trackio", "name")):
        assert resumed[name] == first[name] and first[name]["resume"] == "allow"
        assert other[name][key] != first[name][key]


class MlflowTracker(ListTracker):
    """What our code knows of Accelerate's tracker for MLflow."""

    name = "mlflow"

    @property
    def tracker(self) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id="chosen by mlflow"))


def test_mlflow_goes_on_under_its_own_name_and_parameters(tmp_path):
    first, resumed = (Recorded(trackers=[MlflowTracker()]) for _ in range(2))
    for accelerator in (first, resumed):
        start_trackers(accelerator, tmp_path, Config(), 0)
    assert [one.options[0]["mlflow"]["run_id"] for one in (first, resumed)] == [
        None,
        "chosen by mlflow",
    ]
    # MLflow refuses a parameter that has changed, such as `resume`.
    assert [len(one.trackers[0].configurations) for one in (first, resumed)] == [1, 0]


HOSTILE = "a | b\n<script>alert(1)</script> [x](y) `** & '#1' \"q\" _"


def test_a_markdown_table_keeps_hostile_text_as_text():
    lines = markdown_table(["x", "y", "z"], [[HOSTILE, 0.123456, None]]).split("\n")
    assert len(lines) == 3 and lines[2].count("|") == 4 and "<" not in lines[2]
    assert html.unescape(lines[2]) == f"| {' '.join(HOSTILE.split())} | 0.1235 | - |"


@dataclass
class TableTracker:
    """Keeps the tables that it is given, as Accelerate's trackers take them."""

    name: str
    tables: list[tuple] = field(default_factory=list)

    @property
    def writer(self) -> SimpleNamespace:
        return SimpleNamespace(add_text=lambda *given: self.tables.append(given))

    def log_table(self, name: str, columns: list, data: list, step: int) -> None:
        self.tables.append((name, columns, data, step))


def test_trackers_get_a_table_each_in_its_own_way(tmp_path):
    board, wandb, other = (TableTracker(name) for name in ("tensorboard", "wandb", "list"))
    accelerator = Recorded(trackers=[board, wandb, other])
    log = RunLog(tmp_path / "run", Config(), track_table=partial(log_table, accelerator))
    log.table("trajectories", ["turn", "reward"], [["t", 1.0]], 3)
    log.table("trajectories", ["turn", "reward"], [], 4)
    text = "| turn | reward |\n| --- | --- |\n| t | 1 |"
    assert board.tables == [("trajectories", text, 3)]
    assert wandb.tables == [("trajectories", ["turn", "reward"], [["t", 1.0]], 3)]
    assert not other.tables


def test_a_table_that_fails_is_a_warning(tmp_path, capsys):
    def fail(*_):
        raise ConnectionError("gone")

    log = RunLog(tmp_path / "run", Config(), track_table=fail)
    for update in (1, 2):
        log.table("trajectories", ["x"], [["y"]], update)
    assert capsys.readouterr().out.count("warning: tracker: a table was not logged") == 1


def test_the_table_of_an_update_has_the_siblings_of_a_few_groups():
    def one(reward: float, sql: str | None, turn: int = 0) -> Scored:
        made = scored(reward, turn_id=f"t{turn}")
        made.trajectory.turn = SimpleNamespace(turn_id=f"t{turn}", question="q?\x1b", sql="GOLD")
        made.trajectory.env.final_sql = sql
        made.components = {"ex": reward}
        return made

    groups = [[one(0.0, None, n), one(1.0 + n, "SELECT 1", n)] for n in range(9)]
    groups[8][1].advantages = [0.5, 0.5]
    columns, rows = trajectory_table(groups)
    assert len(rows) == 8 and len({row[0] for row in rows}) == 4
    first = dict(zip(columns, rows[0], strict=True))
    assert first["answer"] == "SELECT 1" and first["question"] == "q?\\x1b"
    assert first["reward"] == first["reward/ex"] == 9.0 and first["advantages"] == "+0.500"
    assert dict(zip(columns, rows[1], strict=True))["answer"] == ""


def test_a_run_without_trackers_starts_none(tmp_path):
    accelerator = Recorded()
    check_folder(Config(str(tmp_path / "run"), trackers=()), None, accelerator)
    assert not accelerator.options and not list((tmp_path / "run").iterdir())


def test_a_tracker_that_is_not_installed_is_a_line_before_anything_else(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^trackers: wandb is not installed: pip install wandb, "):
        make_accelerator("no", ["wandb"], "runs/x")


def test_a_tracker_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="^trackers: wandb is named twice: name it once"):
        make_accelerator("no", ["wandb", "wandb"], "runs/x")


@pytest.mark.parametrize("script", [train_rl, train_sft])
def test_both_training_scripts_take_a_list_of_trackers(script):
    flags = ["--trackers", "[tensorboard, wandb]"]
    assert list(parse_config(script.Config, flags, "").trackers) == ["tensorboard", "wandb"]
    assert list(script.Config().trackers) == []
    with pytest.raises(ValueError, match="trackers"):
        parse_config(script.Config, ["--trackers", "[tensorbord]"], "")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values in TensorBoard's files, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in names}


def test_tensorboard_shows_each_update_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    for first in (0, 3):  # killed after update 4, resumed from the checkpoint of update 2
        project = ProjectConfiguration(logging_dir=str(tmp_path / "tensorboard"))
        accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=project)
        start_trackers(accelerator, tmp_path, Config(), first)
        for update in range(max(1, first), 5):
            accelerator.log(tracked_numbers({"stage": "rl", "reward": update / 2}), update)
        accelerator.trackers[0].finish()
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert scalars(tmp_path / "tensorboard/mtsql") == {"rl/reward": expected}


TABLE = (["turn", "answer", "reward"], [["dev:0:1", HOSTILE, 1.5], ["dev:0:1", "", 0.0]])


def text_of_tensorboard(folder: Path) -> list[tuple[int, str]]:
    """The steps and texts of the table of trajectories in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = events.Tensors("trajectories/text_summary")
    return [(one.step, one.tensor_proto.string_val[0].decode()) for one in found]


def test_tensorboard_shows_the_table_as_text(tmp_path):
    pytest.importorskip("tensorboard")
    project = ProjectConfiguration(logging_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=project)
    start_trackers(accelerator, tmp_path, Config(), 0)
    log_table(accelerator, "trajectories", *TABLE, 3)
    accelerator.trackers[0].finish()
    assert text_of_tensorboard(tmp_path / "mtsql") == [(3, markdown_table(*TABLE))]


TRACKIO = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from mtsql.run.trackers import log_table, start_trackers, tracked_numbers
from test_trackers import TABLE, Config
accelerator = Accelerator(cpu=True, log_with=["trackio"])
start_trackers(accelerator, Path(sys.argv[1]), Config(), 0)
for update in (1, 2):
    accelerator.log(tracked_numbers({"stage": "rl", "reward": update / 2}), update)
log_table(accelerator, "trajectories", *TABLE, 2)
accelerator.end_training()
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_runs("mtsql")
print(json.dumps([run, SQLiteStorage.get_logs("mtsql", run)]))
"""


@pytest.mark.slow
def test_trackio_keeps_numbers_and_the_table(tmp_path):
    pytest.importorskip("trackio")
    run = tmp_path / "my-run"
    run.mkdir()
    env = {**clean_environment(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = [sys.executable, "-c", TRACKIO, str(run)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Trackio prints, too, also after the end.
    [line] = [line for line in done.stdout.splitlines() if line.startswith('["my-run-')]
    logs = json.loads(line)[1]
    rewards = [(row["step"], row["rl/reward"]) for row in logs if "rl/reward" in row]
    assert rewards == [(1, 0.5), (2, 1.0)]
    [table] = [row["trajectories"] for row in logs if "trajectories" in row]
    columns, rows = TABLE
    assert table["_value"] == [dict(zip(columns, row, strict=True)) for row in rows]
