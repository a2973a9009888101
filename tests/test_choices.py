"""A configuration that is built in Python has its choices checked, as flags have."""

import pytest

from mtsql.agent.env import EnvConfig
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
