"""Which flags of train_rl.py do not go together. `config` is its configuration."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mtsql.agent.horizon import require_horizon
from mtsql.model.policy import trains_new_adapters
from mtsql.model.sizes import require_room_in_batch

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    from train_rl import Config


EvalSplit = Literal["held_out", "dev", "dev_seen"]
"""Splits on which a run of train_rl.py is evaluated."""


def with_evaluation(config: "Config") -> "Config":
    """The configuration with the splits to evaluate, and the one that selects the model, in place
    of null."""
    data = config.data
    holds_out = bool(data.hold_out) or (data.hold_out is None and not data.is_toy)
    rest: tuple[EvalSplit, ...] = ("dev_seen", "dev") if data.is_toy or data.dev_seen else ("dev",)
    splits = config.eval_splits
    if splits is None:
        splits = ("held_out",) if holds_out else rest
    for split in splits:
        if splits.count(split) > 1:
            raise ValueError(f"eval_splits names {split} twice: name it once")
        if split not in (*rest, "held_out"):
            raise ValueError(f"eval_splits has {split}, but data.{split} is not set")
    if not splits:
        raise ValueError("eval_splits is empty: name at least one split, such as held_out")
    if "held_out" in splits and not holds_out:
        raise ValueError("eval_splits has held_out, but data.hold_out holds no database out")
    select_by = config.select_by or ("held_out" if "held_out" in splits else "none")
    if select_by != "none":
        if select_by not in splits:
            raise ValueError(
                f"select_by is {select_by}, but only {', '.join(splits)} is evaluated: add it to "
                "eval_splits"
            )
        if not config.checkpoint.keep_best:
            raise ValueError(
                f"checkpoint.keep_best is 0, but the model is selected by {select_by}: set it to "
                "at least 1, or select_by to none"
            )
    return replace(config, eval_splits=splits, select_by=select_by)


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
    if config.schedule_updates is not None and config.schedule_updates < 1:
        raise ValueError(f"schedule_updates is {config.schedule_updates}: it must be at least 1")
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
            "model.path is not set: the embedded model knows only the embedded world, "
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
    if config.reference == "host" and not (config.advantage.kl_coef or config.loss.kl_coef):
        raise ValueError(
            "reference is host, but there is no reference policy: loss.kl_coef and "
            "advantage.kl_coef are 0"
        )
    if config.reference == "host" and trains_new_adapters(config.model):
        raise ValueError(
            "reference is host, but new adapters need no copy of the policy: the reference is the "
            "policy without them; leave it out"
        )
    if config.loss.tis_cap is not None and config.old_logprobs == "sampled":
        raise ValueError(
            "loss.tis_cap has no effect with old_logprobs=sampled, whose ratio corrects for the "
            "engine already: set old_logprobs to recomputed"
        )
    if config.advantage.credit == "reply" and config.env.max_replies == 1:
        raise ValueError("advantage.credit=reply has no effect with env.max_replies=1")
    # A run that is resumed may be shortened.
    if config.reward.process_from >= config.num_updates and not config.resume:
        raise ValueError(
            f"reward.process_from is {config.reward.process_from}, but the run has num_updates="
            f"{config.num_updates}: set the weights of the process reward to 0 instead"
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
