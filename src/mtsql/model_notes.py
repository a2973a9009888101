"""The notes in a model's folder, mtsql.json: the prompts, tools and budgets of its training.

    {"style": "brief", "env": {"max_replies": 4, ...}, "max_prompt_tokens": 4000,
     "sampling": {"max_reply_tokens": 96, "max_trajectory_tokens": 640}}

The training scripts write the file together with the weights. Its keys are flags of eval.py, which
takes them as defaults, so a model is evaluated as it was trained. A model folder without the file,
such as a downloaded one, is evaluated with the defaults of the script.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.sampling import SamplingConfig
from mtsql.files import read_json
from mtsql.model.policy import ModelConfig
from mtsql.run.config import flat, parse_values, to_dict

FILE_NAME = "mtsql.json"
WITHOUT_EFFECT = "env.num_sql_workers"
"""The only key of `env` that changes no episode. The file does not have it."""


@dataclass(frozen=True)
class Budgets:
    """The keys of `SamplingConfig` that can end an episode."""

    max_reply_tokens: int = SamplingConfig.max_reply_tokens
    """Tokens of a reply."""
    max_trajectory_tokens: int = SamplingConfig.max_trajectory_tokens
    """Tokens of a trajectory after its prompt."""


@dataclass(frozen=True)
class Notes:
    """The content of mtsql.json. A key that the file does not have keeps its default."""

    style: PromptStyle = "full"
    """Wording of the prompts."""
    env: EnvConfig = EnvConfig()
    """Tools and limits of an episode."""
    max_prompt_tokens: int = 4000
    """Turns with a longer prompt end at once."""
    sampling: Budgets = Budgets()
    """Budgets of replies."""


class EpisodeConfig(Protocol):
    """What the configuration of each of the three scripts says about model and episodes. These are
    properties because configurations are frozen."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def env(self) -> EnvConfig: ...

    @property
    def style(self) -> PromptStyle | None: ...

    @property
    def max_prompt_tokens(self) -> int: ...

    @property
    def sampling(self) -> SamplingConfig: ...


def notes_of(config: EpisodeConfig) -> dict[str, dict]:
    """File name -> content, for `save_policy`: the notes of a run with this configuration."""
    sampling = config.sampling
    budgets = Budgets(sampling.max_reply_tokens, sampling.max_trajectory_tokens)
    style = prompt_style(config.style, config.model.path)
    values = to_dict(Notes(style, config.env, config.max_prompt_tokens, budgets))
    del values["env"]["num_sql_workers"]
    return {FILE_NAME: values}


def notes_file(model_path: str | None) -> Path | None:
    """The mtsql.json in a model folder (or beside a .gguf file). None if there is none."""
    if model_path is None:
        return None
    path = Path(model_path)
    file = (path.parent if path.is_file() else path) / FILE_NAME
    return file if file.is_file() else None


def read_notes(file: Path) -> dict[str, Any]:
    """Dotted key -> value of an mtsql.json, for the keys that the file has.

    ValueError, naming the file and the key, if it is malformed or has an unknown key or a value of
    the wrong type.
    """
    values = read_json(file, is_strict=True)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, found {values!r:.80}")
    try:
        known = flat(to_dict(parse_values(Notes, values, str(file))))
    except ValueError as error:
        if "unknown key" not in str(error) and "expected one of" not in str(error):
            raise
        advice = (
            "if another version of mtsql wrote the file, correct it, or remove it and give flags"
        )
        raise ValueError(f"{error}; {advice}") from error
    del known[WITHOUT_EFFECT]
    for key in flat(values):
        if key not in known:
            raise ValueError(f"{file}: {key} is no key of a model's settings")
    return {key: known[key] for key in flat(values)}


def prompt_style(style: PromptStyle | None, model_path: str | None) -> PromptStyle:
    """The wording of the prompts: what a flag or recipe says, else what the model was trained with,
    else brief for the embedded model and full for all others."""
    if style is not None:
        return style
    file = notes_file(model_path)
    saved = read_notes(file) if file is not None else {}
    usual: PromptStyle = "full" if model_path else "brief"
    learned: PromptStyle = saved.get("style", usual)
    return learned


def differences(config: EpisodeConfig) -> str | None:
    """One line with the keys in which a configuration differs from the training of
    `config.model.path`. None if no key differs or the model has no mtsql.json."""
    file = notes_file(config.model.path)
    if file is None:
        return None
    before = read_notes(file)
    now = flat(notes_of(config)[FILE_NAME])
    changed = [
        f"{key} {_shown(now[key])} (was {_shown(value)})"
        for key, value in before.items()
        if value != now[key]
    ]
    if not changed:
        return None
    return f"differs from the training of {config.model.path}: {', '.join(changed)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
