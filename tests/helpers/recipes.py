"""The recipes of configs/, each with its script and as it is read."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mtsql.run.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS = {"sft": "train_sft", "rl": "train_rl", "eval": "eval"}
"""The beginning of a recipe's name, and the script that reads it."""
SHAPES = {
    "4B": dict(num_hidden_layers=36, num_key_value_heads=8, head_dim=128),
    "1.7B": dict(num_hidden_layers=28, num_key_value_heads=8, head_dim=128),
    "Llama-3.2-3B": dict(num_hidden_layers=28, num_key_value_heads=8, head_dim=128),
    "smollm2": dict(num_hidden_layers=30, num_key_value_heads=3, head_dim=64),
}
"""Of the models that recipes name: what the cache depends on."""


def script_of(file: Path) -> ModuleType:
    """The script that a recipe is for."""
    return importlib.import_module(SCRIPTS[file.name.partition("_")[0]])


@cache
def config_of(file: Path) -> Any:
    """The configuration of a recipe."""
    return parse_config(script_of(file).Config, ["--config", str(file)], "")


def model_of(config: Any) -> str | None:
    """The key in SHAPES of the model that a recipe begins with; None for the embedded model."""
    path = config.model.shape_from or config.model.path
    if path is None:
        return None
    [name] = [name for name in SHAPES if name.lower() in path.lower()]
    return name
