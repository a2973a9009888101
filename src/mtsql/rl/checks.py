"""Which flags of train_rl.py do not go together. `config` is its configuration."""

from typing import TYPE_CHECKING

from mtsql.agent.horizon import require_horizon
from mtsql.model.sizes import require_room_in_batch

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    from train_rl import Config


def max_tokens(config: "Config") -> int:
    """Tokens of the longest sample: its prompt and its trajectory."""
    return config.max_prompt_tokens + config.sampling.max_trajectory_tokens


def check_config(config: "Config") -> None:
    """ValueError that names the flags of an impossible combination, before anything is loaded."""
    if config.group_size < 2 and config.advantage.compares:
        raise ValueError(
            f"group_size is {config.group_size}, but the advantage compares within a group: set "
            "it to at least 2"
        )
    at_least_one = ("group_size", "num_updates", "turns_per_update", "num_passes", "minibatches")
    for name in (*at_least_one, "max_batch_tokens", "max_prompt_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be at least 1")
    require_horizon(config)
    require_room_in_batch("max_batch_tokens", config.max_batch_tokens, max_tokens(config))
    if config.warm_start and not config.model.path:
        room = config.warm_start.max_batch_tokens
        least = config.max_prompt_tokens + 1
        what = "max_prompt_tokens and a reply"
        require_room_in_batch("warm_start.max_batch_tokens", room, least, what)
    if config.eval_every < 0 or config.eval_turns < 0:
        raise ValueError("eval_every and eval_turns must not be negative")
    if not config.model.path and not config.data.is_toy:
        raise ValueError(
            "model.path is not set: the embedded model only knows the toy world, "
            "name a model folder"
        )
    if config.sampling.temperature <= 0:
        raise ValueError(
            "sampling.temperature must be above 0: greedy samples of one turn would all be equal"
        )
    if config.sampling.top_p < 1 or config.sampling.top_k:
        raise ValueError(
            "sampling.top_p and sampling.top_k must be off: "
            "the learner scores the whole distribution"
        )
    if config.minibatches > config.turns_per_update:
        raise ValueError(
            f"minibatches is {config.minibatches}, more than turns_per_update: a group is not split"
        )
    if config.advantage.kl_coef and config.loss.kl_coef:
        raise ValueError(
            "advantage.kl_coef and loss.kl_coef penalise the same KL twice: set one of them to 0"
        )
    if config.reward.overlong_buffer > config.sampling.max_trajectory_tokens:
        raise ValueError(
            "reward.overlong_buffer is more than sampling.max_trajectory_tokens: "
            "every trajectory would be punished"
        )
    if config.curriculum.resample_rounds:
        if config.advantage.zero_variance != "drop":
            raise ValueError(
                "curriculum.resample_rounds replaces zero-variance groups: "
                "set advantage.zero_variance to drop"
            )
        if config.advantage.baseline in ("batch", "none") or config.advantage.kl_coef:
            raise ValueError(
                "curriculum.resample_rounds needs advantage.baseline mean or leave_one_out and no "
                "advantage.kl_coef: otherwise groups of equal rewards have advantages too"
            )
