"""The configuration of a dry run: that of the real run, with about one per cent of everything."""

from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from mtsql.branch import KEPT

AT_MOST: dict[str, int | float] = {
    "num_updates": 3,
    "schedule_updates": 3,
    "turns_per_update": 4,
    "group_size": 4,
    "num_passes": 2,
    "minibatches": 2,
    "curriculum.probe_samples": 4,
    "reward.process_from": 1,
    "selftaught.rounds": 2,
    "selftaught.samples_per_turn": 4,
    "sft.epochs": 1.0,
    "sft.samples_per_update": 4,
    "sampling.max_reply_tokens": 32,
    "engine.max_rows": 64,
    "engine.cache_bytes": 64 << 20,
    "num_samples": 2,
    "timed_turns": 1,
}
"""Key -> its greatest value in a dry run."""
INSTEAD_OF_ALL = {
    "eval_turns": 8,
    "curriculum.max_probe_turns": 12,
    "max_turns": 24,
    "selftaught.eval_turns": 8,
    "sft.max_samples": 32,
    "max_dialogues": 4,
}
"""The same for keys whose 0 means all."""
NEEDS_OTHER_SOURCE = ("sft.max_samples",)
"""Keys that have no effect if the model learns from its own rollouts."""
IF_ON = {"eval_every": 2, "checkpoint.every": 1, "checkpoint.keep_last": 2}
"""Key -> its value in a dry run, unless it is 0, which means off."""


def small(config: Any, run: Path, model: Path) -> Any:
    """The configuration of a dry run in the folder `run`, with the stand-in `model`. Keys that the
    script does not have are left out."""
    values: dict[str, Any] = {
        "run": str(run),
        "dry_run": False,
        "preset": None,
        "from_run": None,  # its weights do not fit the stand-in
        "keep": KEPT,
        "trackers": (),
        "model.path": str(model),
        "model.shape_from": None,
        "sft.whole_text_frac": None,  # only a model without a path learns whole texts
    }
    if hasattr(config, "keep"):
        values["keep"] = type(config).keep  # without from_run it has no effect
    for key, most in AT_MOST.items():
        now = value_of(config, key)
        if now is not None:
            values[key] = min(now, most)
    is_self = value_of(config, "source") == "self"
    for key, most in INSTEAD_OF_ALL.items():
        now = value_of(config, key)
        if now is not None and not (is_self and key in NEEDS_OTHER_SOURCE):
            values[key] = min(now or most, most)
    values |= {key: value for key, value in IF_ON.items() if value_of(config, key)}
    return with_values(config, values)


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is no such key."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """A copy of nested dataclasses with other values by dotted key, all set at once. Unknown keys
    are ignored."""
    own = {key: value for key, value in values.items() if "." not in key and hasattr(config, key)}
    for section in {key.partition(".")[0] for key in values if "." in key}:
        inner = getattr(config, section, None)
        if is_dataclass(inner):
            start = f"{section}."
            of_section = {
                k.removeprefix(start): v for k, v in values.items() if k.startswith(start)
            }
            own[section] = with_values(inner, of_section)
    return replace(config, **own)
