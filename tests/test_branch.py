"""A run that starts from another run's checkpoint: its flags, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_rl
from safetensors.torch import save_file
from train_rl import Config

from helpers.checkpoints import write
from mtsql.branch import KEPT, check_origin, checkpoint_of, keep_past_stages, read_origin
from mtsql.dry.small import small
from mtsql.learner.optimizer import OptimConfig
from mtsql.rl.curriculum import Curriculum, CurriculumConfig
from mtsql.run.config import parse_config, save_config
from mtsql.run.inputs import changed_inputs, keep_inputs
from mtsql.run.length import with_kept_schedule

OLD = Config(
    run="old", seed=7, num_updates=40, optim=OptimConfig(schedule="constant"), group_size=3
)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder `old` of a run of 40 updates, with checkpoints after 10 and 20 of them."""
    monkeypatch.chdir(tmp_path)
    for update in (10, 20):
        write(Path("old"), update)
    save_config(OLD, Path("old/config.yaml"))
    return Path("old")


def branch(**keys):
    return replace(OLD, **{"run": "new", "from_run": "old", **keys})


def test_the_old_run_is_the_first_recipe_and_its_checkpoint_is_named(old):
    flags = ["--from", "old", "--run", "new", "--preset", "dr_grpo", "--group_size", "4"]
    config = parse_config(Config, flags, "", train_rl.PRESETS)
    assert (config.seed, config.group_size, config.run) == (7, 4, "new")
    assert config.preset == "dr_grpo" and config.advantage.scale == "none"
    assert checkpoint_of(config) == "old/checkpoints/update-00020"
    Path("mine.yaml").write_text("seed: 9\n")
    flags = ["--config", "mine.yaml", "--from=old/checkpoints/update-00010"]
    config = parse_config(Config, flags, "")
    assert (config.seed, config.group_size) == (9, 3)
    assert config.from_run == "old/checkpoints/update-00010"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"from_run": None, "keep": ()}, "keep has no effect without --from"),
        ({"run": "./old"}, "from old: name the folder of the new run with --run"),
        ({"from_run": "nowhere"}, "from nowhere: no config.yaml in nowhere: name the folder"),
        (
            {"from_run": "old/checkpoints/update-00011"},
            "there is no checkpoint old/checkpoints/update-00011",
        ),
        ({"keep": ("optimizer", "optimizer")}, "keep names optimizer twice"),
        (
            {"curriculum": CurriculumConfig(probe_samples=9)},
            "curriculum.probe_samples has no effect, because the curriculum of old is kept",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_loaded(keys, words, old):
    with pytest.raises(ValueError, match=words):
        checkpoint_of(branch(**keys))


def test_another_curriculum_is_built_only_without_the_old_one(old):
    other = CurriculumConfig(probe_samples=9)
    assert checkpoint_of(branch(curriculum=other, keep=("optimizer",)))
    resampling = replace(OLD.curriculum, resample_rounds=2)
    assert checkpoint_of(branch(curriculum=resampling))  # it has an effect on each update


def test_what_the_old_run_kept_and_its_schedules_are_no_choice_of_the_new_one(old):
    saved = replace(OLD, schedule_updates=30, keep=(), from_run="older")
    save_config(saved, Path("old/config.yaml"))

    def parsed(*flags):
        return parse_config(Config, ["--from", "old", "--run", "new", *flags], "")

    config = parsed()
    assert config.keep == ("curriculum", "optimizer") and config.schedule_updates == 30
    afresh = ["--keep", "[optimizer]"]
    config = parsed(*afresh)
    assert config.keep == ("optimizer",) and config.num_scheduled == 40
    assert parsed(*afresh, "--schedule_updates", "30").num_scheduled == 30
    assert checkpoint_of(small(parsed(*afresh), Path("dry"), Path("model"))) is None


def test_a_run_of_stage_one_is_no_origin(old):
    (old / "config.yaml").write_text("source: self\n")
    with pytest.raises(ValueError, match="not a run of train_rl.py; .* --model.path old/model"):
        checkpoint_of(branch())


def test_a_checkpoint_that_is_no_origin_is_named(old):
    state = "update: 20"
    config = branch(from_run="old/checkpoints/update-00020")
    with pytest.raises(ValueError, match="update-00020: not a checkpoint of train_rl.py"):
        read_origin(config, None)
    (old / "checkpoints/update-00020/state.json").write_text(state)
    with pytest.raises(ValueError, match="read as JSON; start from another checkpoint"):
        read_origin(config, None)
    assert read_origin(config, SimpleNamespace()) is None  # it has a checkpoint of its own
    assert read_origin(OLD, None) is None


def test_a_kept_place_needs_updates_to_come_and_keeps_the_schedule(old, monkeypatch):
    origin = SimpleNamespace(state={"curriculum": {}, "update": 20})
    monkeypatch.setattr("mtsql.branch.read_checkpoint", lambda *_: origin)
    assert read_origin(branch(), None) is origin
    with pytest.raises(ValueError, match="num_updates is 20, and from old has done 20 updates"):
        read_origin(branch(num_updates=20), None)
    assert read_origin(branch(num_updates=20, keep=()), None) is origin
    assert with_kept_schedule(branch(num_updates=60)).schedule_updates == 40
    assert with_kept_schedule(branch(num_updates=60, keep=())).schedule_updates is None


def test_weights_and_turns_must_fit_before_anything_is_written(tmp_path):
    curriculum = Curriculum([["a", "b"], ["c"]], (0.5, 0.5), seed=1)
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    turns = [SimpleNamespace(turn_id=turn_id) for turn_id in "abc"]
    workbench = SimpleNamespace(
        policy=torch.nn.Linear(3, 2, bias=False), corpora={"train": SimpleNamespace(turns=turns)}
    )
    origin = SimpleNamespace(model=tmp_path, state={"curriculum": curriculum.state()})
    check_origin(workbench, origin, KEPT)
    turns.pop()
    with pytest.raises(ValueError, match="1 of its turns are not in the training data, such as c"):
        check_origin(workbench, origin, KEPT)
    check_origin(workbench, origin, ("optimizer",))
    workbench.policy = torch.nn.Linear(4, 2)
    words = r"weight is of shape \(2, 3\), the model has it as \(2, 4\)"
    with pytest.raises(ValueError, match=words):
        check_origin(workbench, origin, ())


def test_past_stages_are_kept_only_for_another_schedule():
    curriculum = Curriculum([["a"], ["b"]], (0.5, 0.5), seed=1)
    state = {"update": 3, "config": {"num_updates": 4, "schedule_updates": None}}
    keep_past_stages(curriculum, state, 4)
    assert curriculum.past == []
    keep_past_stages(curriculum, state, 8)
    assert curriculum.past == [0, 0, 1]


def test_the_inputs_that_differ_are_named(tmp_path):
    def files(train, tables):
        return {
            "data.train": {"path": "a/train.json", "hashes": {"train.json": train}},
            "data.tables": {"path": "a/tables.json", "hashes": {"tables.json": tables}},
        }

    before, now = tmp_path / "before", tmp_path / "now"
    keep_inputs(before, {"the turns": "1", "the text": "2", "files": files("3", "4")})
    keep_inputs(now, {"the turns": "1", "the text": "9", "files": files("9", "4")})
    assert changed_inputs(now, before) == ["the text", "the files of data.train"]
    assert changed_inputs(before, before) == []
