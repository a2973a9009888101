"""What a plan needs to know of a recipe: which script it is for, its model's sizes, its turns."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from mtsql.choices import ReferencePlace
from mtsql.engine.config import EngineConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.model.policy import EmbeddedConfig, ModelConfig, policy_shape
from mtsql.model.processor import DTYPES
from mtsql.model.shapes import SHAPES, shape_named
from mtsql.rl.checks import with_evaluation
from mtsql.run.config import parse_config
from mtsql.run.recipes import nested
from mtsql.run.recipes import read_recipe as read_file
from mtsql.sql.datasets import DataConfig
from mtsql.sql.held_out import SHARE, held_out_databases

ROOT = Path(__file__).parents[3]
"""The repository, where the scripts are."""
Stage = Literal["sft", "rl"]
TURNS = {"cosql": (9337, 1007), "sparc": (11_905, 1203)}
"""Training and dev turns of the official data sets (training: as the paper counts)."""
NUM_DATABASES = 140
"""Databases of their training splits."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as a plan reads it."""

    stage: Stage
    config: Any
    """The configuration of the script (which imports this package, not the other way round)."""
    model: str
    """What the sizes are those of."""
    shape: PreTrainedConfig
    turns: int
    """Training turns, without the held-out ones."""
    dev_turns: int
    held_out_turns: int
    """Turns of the training databases that are held out."""
    counted: str
    """Where these numbers come from."""

    @property
    def engine(self) -> EngineConfig | None:
        """The engine's limits; None if nothing is generated."""
        source = getattr(self.config, "source", "self")
        return self.config.engine if source == "self" else None

    @property
    def learning(self) -> Any:
        """The section with the settings of learning."""
        return self.config if self.stage == "rl" else self.config.sft

    @property
    def optim(self) -> OptimConfig:
        """The optimizer."""
        found: OptimConfig = self.learning.optim
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type that the run computes in on a GPU."""
        name = self.config.model.dtype
        return torch.bfloat16 if name == "auto" else DTYPES[name]

    @property
    def reference(self) -> ReferencePlace | None:
        """Where the reference policy is kept; None if the run needs no copy of the policy."""
        if self.stage == "sft" or self.config.model.lora.rank:
            return None
        has_reference = self.config.loss.kl_coef or self.config.advantage.kl_coef
        return self.config.reference if has_reference else None

    @property
    def evaluated(self) -> int:
        """The turns of an evaluation during the run."""
        section = self.config if self.stage == "rl" else self.config.selftaught
        splits = section.eval_splits if self.stage == "rl" else (section.eval_split,)
        num_turns = {"held_out": self.held_out_turns, "dev": self.dev_turns}
        found = [num_turns.get(split, 0) for split in splits]
        return sum(min(num, section.eval_turns or num) for num in found)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sample."""
        total: int = self.config.max_prompt_tokens + self.config.sampling.max_trajectory_tokens
        return total


def read_recipe(
    file: str, flags: Sequence[str], shape: str | None, turns: int, dev_turns: int
) -> Recipe:
    """The recipe with `flags` of its script, which win over it. `shape`, `turns` and `dev_turns`
    are 0 or None where the recipe decides. ValueError that names what is missing."""
    stage = stage_of(file)
    config = parse_config(_script(stage).Config, ["--config", file, *flags], "")
    if stage == "rl":
        config = with_evaluation(config)
    model, sizes = _shape(config.model, Path(file), shape)
    counted = _counts(config)
    if counted is None and not (turns and dev_turns):
        raise ValueError(
            f"recipe {file}: its data.train is not there, and its name is not that of SParC or "
            "CoSQL: give --turns and --dev_turns"
        )
    found_train, found_dev, held_out, where = counted or (
        0,
        0,
        round(_share(config.data) * turns),
        "",
    )
    of_flags = "--turns" if turns else "--dev_turns" if dev_turns else ""
    return Recipe(
        stage,
        config,
        model,
        sizes,
        turns or found_train,
        dev_turns or found_dev,
        held_out,
        of_flags or where,
    )


def stage_of(file: str) -> Stage:
    """Which script a recipe is for, by its keys, or else by its name. ValueError if it could be
    either."""
    if not Path(file).is_file():
        raise ValueError(f"recipe {file}: no such file")
    keys = _all_keys(Path(file))
    stages: tuple[Stage, Stage] = ("sft", "rl")
    names = {stage: set(_script(stage).Config.__dataclass_fields__) for stage in stages}
    only = {"sft": keys & names["sft"] - names["rl"], "rl": keys & names["rl"] - names["sft"]}
    found = [stage for stage in stages if only[stage]]
    if not found:
        found = [stage for stage in stages if Path(file).name.startswith(stage)]
    if len(found) != 1:
        raise ValueError(
            f"recipe {file}: it is for neither train_sft.py nor train_rl.py, or could be for both: "
            "name its file sft_... or rl_..."
        )
    return found[0]


def _all_keys(file: Path) -> set[str]:
    """The first parts of a recipe's keys."""
    return set(nested(read_file(file).values))


def _script(stage: Stage) -> ModuleType:
    """The script's module. It lies beside the package's `src`."""
    if not (ROOT / "train_rl.py").is_file():
        raise ValueError("mtsql plan reads train_sft.py and train_rl.py: install with pip -e")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"train_{stage}")


def _shape(model: ModelConfig, recipe: Path, name: str | None) -> tuple[str, PreTrainedConfig]:
    """The sizes of the recipe's model, and what they are those of."""
    if name is not None:
        return f"{name} (published sizes)", SHAPES[name]
    if model.path is None:
        raise ValueError(
            f"recipe {recipe}: model.path is not set: the embedded model fits everywhere"
        )
    for path in (model.path, model.shape_from):
        if path is not None and Path(path).exists():
            shape = policy_shape(replace(model, path=path))
            assert not isinstance(shape, EmbeddedConfig)
            return path, shape
    known = shape_named(model.path) or shape_named(model.shape_from or "")
    if known is None:
        raise ValueError(
            f"model.path {model.path}: no such folder, and its name is that of no published model: "
            f"give --shape, one of {', '.join(SHAPES)}"
        )
    return f"{known} (published sizes)", SHAPES[known]


def _counts(config: Any) -> tuple[int, int, int, str] | None:
    """Turns of training, of dev and of the held-out databases: those in the files, else the
    official ones. None if neither is known."""
    data = config.data
    if data.train and data.dev and Path(data.train).is_file() and Path(data.dev).is_file():
        train = _count(Path(data.train), data.goals)
        names = held_out_databases(sorted(train), data)
        held_out = sum(train[name] for name in names)
        num_dev = _count(Path(data.dev)).total()
        return train.total() - held_out, num_dev, held_out, "the files"
    for name, (num_train, num_dev) in TURNS.items():
        if data.train and name in data.train.lower():
            held_out = round(_share(data) * num_train)
            where = f"the official {name.upper()}, since {data.train} is not there"
            return num_train - held_out, num_dev, held_out, where
    return None


def _share(data: DataConfig) -> float:
    """About which share of the turns is held out of a data set whose databases are not known."""
    if data.hold_out is None:
        return SHARE
    return data.hold_out if data.hold_out < 1 else min(1.0, data.hold_out / NUM_DATABASES)


def _count(file: Path, has_goals: bool = False) -> Counter[str]:
    """The turns in a JSON file of dialogues or questions, by database, with the dialogues' goals if
    they count."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file: give --turns and --dev_turns") from error
    found: Counter[str] = Counter()
    for entry in entries:
        name = entry.get("database_id") or entry.get("db_id") or ""
        found[name] += len(entry.get("interaction", [entry]))
        if has_goals and "query" in entry.get("final", {}):
            found[name] += 1
    return found


def with_flags(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other values of dotted keys, such as `engine.cache_bytes`."""
    config = recipe.config
    for key, value in changes.items():
        config = _replaced(config, key.split("."), value)
    return replace(recipe, config=config)


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    name, *rest = names
    inner = _replaced(getattr(section, name), rest, value) if rest else value
    return replace(section, **{name: inner})
