"""The table of step costs: its shape, its values, and how the configuration holds it."""

import pytest
import torch
from transformers import LlamaConfig

from helpers.engine import SHAPE, tiny
from mtsql.engine.config import EngineConfig, block_bytes
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig
from mtsql.engine.step_costs import Costs, default_costs, measure, num_multiplied
from mtsql.model.policy import EmbeddedConfig
from mtsql.run.config import parse_config


def test_costs_are_linear_between_the_points_and_after_them():
    costs = Costs(((1, 2.0), (3, 4.0), (5, 10.0)))
    assert costs.between(1, 7).tolist() == [2, 3, 4, 7, 10, 13, 16]
    assert Costs(((4, 2.0),)).between(1, 9).tolist() == [2] * 9


@pytest.mark.parametrize("shape", [EmbeddedConfig(), LlamaConfig(**SHAPE)], ids=["own", "folder"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_table_is_one_that_the_configuration_accepts(shape, device, dtype):
    table = default_costs(shape, dtype, device)
    assert EngineConfig(step_costs=table).step_costs == table


def test_each_token_is_multiplied_with_all_matrices_of_the_model():
    model = tiny("llama")
    layers = [w.numel() for w in model.model.layers.parameters() if w.ndim == 2]
    assert num_multiplied(model.config) == sum(layers) + model.lm_head.weight.numel()


def test_a_measured_table_is_one_that_the_configuration_accepts():
    table = measure(tiny(), torch.float32, num_tokens=(1, 3, 20), context=40, num_runs=1)
    assert [num for num, _ in table] == [1, 3, 20]
    config = parse_config(EngineConfig, [f"--step_costs={[list(pair) for pair in table]}"], "")
    assert config.step_costs == table
    model = tiny()
    limits = EngineConfig(
        step_costs=table, cache_bytes=9 * block_bytes(model.config, 32, torch.float32)
    )
    engine = Engine(model, (), SamplingConfig(), limits)
    assert engine.drafter is not None
    assert engine.drafter.costs.between(3, 3) == [table[1][1]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(step_costs=()), "engine.step_costs has the tokens"),
        (dict(step_costs=((2, 1.0), (2, 1.0))), "engine.step_costs has the tokens"),
        (dict(step_costs=((0, 1.0),)), "engine.step_costs has the tokens"),
        (dict(step_costs=((1, 0.0),)), "engine.step_costs has the costs"),
        (dict(step_costs=((1, 2.0), (2, 1.0))), "engine.step_costs has the costs"),
        (dict(max_draft=-1), "engine.max_draft is -1"),
    ],
)
def test_what_the_configuration_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)
