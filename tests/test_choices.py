"""A configuration that is built in Python has its choices checked, as flags have."""

import pytest

from mtsql.agent.env import EnvConfig
from mtsql.choices import parse_size
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.model.policy import ModelConfig
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.rewards import RewardConfig


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (LossConfig, "loss.objective", "ppo"),
        (LossConfig, "loss.kl_estimator", "k4"),
        (AdvantageConfig, "advantage.on_truncated", "keep"),
        (RewardConfig, "reward.proposals", "first"),
        (EnvConfig, "env.malformed_call", "ignore"),
        (OptimConfig, "optim.schedule", "step"),
        (ModelConfig, "model.dtype", "float16"),
    ],
)
def test_a_wrong_choice_is_named_with_the_right_ones(kind: type, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is '{value}': expected one of "):
        kind(**{key.split(".")[1]: value})


@pytest.mark.parametrize(
    ("text", "number"), [("8GB", 8 * 10**9), ("1.5 KiB", 1536), ("2TiB", 2 * 2**40), ("3MB", 3e6)]
)
def test_a_size_in_bytes(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["8", "8G", "-1GB", "GB", "1e3GB", "8gb", "8GB x"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 8GB or 512MiB, found"):
        parse_size(text)
