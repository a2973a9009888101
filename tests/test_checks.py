"""The splits that a run is evaluated on, the one that selects its model, and further flags that do
not go together."""

import json
from dataclasses import replace

import pytest
from train_rl import Config

from mtsql.learner.losses import LossConfig
from mtsql.model.adapters import AdapterConfig
from mtsql.model.policy import ModelConfig
from mtsql.rl.checks import check_config, with_evaluation
from mtsql.run.checkpoint import CheckpointConfig
from mtsql.sql.datasets import DataConfig

REAL = DataConfig(train="train.json", dev="dev.json", databases="database")
SEEN = replace(REAL, dev_seen="seen.json", hold_out=0)


@pytest.mark.parametrize(
    ("data", "splits", "select_by"),
    [
        (DataConfig(), ("dev_seen", "dev"), "none"),
        (DataConfig(hold_out=3), ("held_out",), "held_out"),
        (REAL, ("held_out",), "held_out"),
        (replace(REAL, hold_out=0), ("dev",), "none"),
        (SEEN, ("dev_seen", "dev"), "none"),
    ],
)
def test_a_model_is_selected_on_held_out_databases_and_else_not(data, splits, select_by):
    config = with_evaluation(Config(data=data))
    assert (config.eval_splits, config.select_by) == (splits, select_by)
    assert with_evaluation(config) == config


def test_the_test_data_are_used_only_if_asked():
    config = with_evaluation(Config(data=REAL, eval_splits=("held_out", "dev")))
    assert config.select_by == "held_out"
    config = with_evaluation(Config(data=REAL, eval_splits=("dev",)))
    assert config.select_by == "none"
    config = with_evaluation(Config(data=REAL, eval_splits=("dev",), select_by="dev"))
    assert config.select_by == "dev"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval_splits": ()}, "eval_splits is empty"),
        ({"eval_splits": ("dev", "dev")}, "eval_splits names dev twice"),
        ({"data": REAL, "eval_splits": ("dev_seen",)}, "but data.dev_seen is not set"),
        ({"eval_splits": ("held_out",)}, "data.hold_out holds no database out"),
        ({"data": SEEN, "eval_splits": ("held_out",)}, "data.hold_out holds no database out"),
        ({"select_by": "held_out"}, "select_by is held_out, but only dev_seen, dev is evaluated"),
        ({"data": REAL, "select_by": "dev"}, "select_by is dev, but only held_out is evaluated"),
        (
            {"data": REAL, "checkpoint": CheckpointConfig(keep_best=0)},
            "checkpoint.keep_best is 0, but the model is selected by held_out",
        ),
    ],
)
def test_what_contradicts_itself_is_named(keys, words):
    with pytest.raises(ValueError, match=words):
        with_evaluation(Config(**keys))


def test_new_adapters_need_no_copy_of_the_reference(tmp_path):
    lora = ModelConfig(path=str(tmp_path), lora=AdapterConfig(rank=4))
    config = Config(reference="host", loss=LossConfig(), model=lora)
    with pytest.raises(ValueError, match="reference is host, but new adapters need no copy"):
        check_config(config)
    base = tmp_path / "base"
    base.mkdir()
    saved = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    check_config(config)  # they are trained further: the reference is a copy


def test_a_seed_that_draws_nothing_is_refused():
    for data in (SEEN, DataConfig()):
        with pytest.raises(ValueError, match="data.hold_out_seed has no effect"):
            replace(data, hold_out_seed=1)
    replace(REAL, hold_out_seed=1)
