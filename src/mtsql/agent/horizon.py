"""The short horizon: a question and its answer in one reply, as the paper's baselines work.

    accelerate launch train_rl.py --env.horizon short --run runs/rl-short

`env.horizon: short` in a recipe or as a flag implies the values below, in the same place. A recipe
or a flag that sets one of these keys itself wins, and what contradicts is an error. The model's
mtsql.json keeps the switch, so eval.py follows it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # env.py imports this module
    from mtsql.agent.env import EnvConfig

REPLY_TOKENS = 1000
"""The paper's budget of a short-horizon answer, in tokens."""
PROCESS = ("propose", "exec_verify", "memory_verify")
"""The terms of the reward that look at tool calls. Without tools they are 0."""
SHORT = {
    "env.tools": [],
    "env.max_replies": 1,
    "sampling.max_reply_tokens": REPLY_TOKENS,
    "sampling.max_trajectory_tokens": REPLY_TOKENS,
    **{f"reward.weights.{name}": 0.0 for name in PROCESS},
}
"""Dotted key -> what `env.horizon: short` implies. Keys that a script does not have are left
out."""


def implied(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the values of `env` in a recipe, or those of its flags, imply: values by dotted key of
    the whole configuration."""
    return SHORT if values.get("horizon") == "short" else {}


class EpisodeConfig(Protocol):
    """What the configurations of all scripts say of an episode."""

    @property
    def env(self) -> "EnvConfig": ...


def require_horizon(config: EpisodeConfig) -> None:
    """ValueError that names a weight of the reward which has no effect in a short horizon.
    `EnvConfig` checks its own keys."""
    reward = getattr(config, "reward", None)
    if config.env.horizon == "long" or reward is None:
        return
    for name in PROCESS:
        weight = getattr(reward.weights, name)
        if weight:
            raise ValueError(
                f"reward.weights.{name} is {weight}, but env.horizon is short: without tools there "
                "is nothing to reward; set it to 0"
            )
