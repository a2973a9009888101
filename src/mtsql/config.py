"""Recipes <-> nested dataclasses <-> dotted flags. jsonargparse does the work."""

import os
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

MAX_MESSAGE = 400  # of the parser's complaints, which list every type a value could have had


def parse_config(
    kind: type, argv: list[str], description: str, presets: dict[str, dict] | None = None
) -> Any:
    """The configuration `kind` from `--config recipe.yaml` and dotted flags (`--optim.lr 1e-4`).

    `--preset NAME` stands for the flags of `presets[NAME]`: it wins over recipes, and flags after
    it win over it; named in a recipe, it gives way to the recipe's own keys. `--resume RUN` stands
    for `--config RUN/config.yaml`, and whatever else is given wins. If `kind` has a static method
    `first_recipe(model_path)`, the file that it names, if any, is read before all recipes.

    ValueError, in a line that names it, for an unknown key, an ill-typed value or a recipe that
    cannot be read.
    """
    parser = _parser(kind, description)
    parser.add_argument("--config", action="config", help="a YAML recipe; flags after it win")
    try:
        parsed = parser.parse_args(argv)
        first_recipe = getattr(kind, "first_recipe", lambda _: None)(parsed.get("model.path"))
        if first_recipe is not None:
            parsed = parser.parse_args(["--config", str(first_recipe), *argv])
        if implied := _implied_flags(parsed.get("preset"), parsed.get("resume"), presets or {}):
            at = 0
            if parsed.get("resume") is None and any(word.split("=")[0] == "--preset" for word in argv):
                ends = [i + 2 - ("=" in word) for i, word in enumerate(argv) if word.split("=")[0] == "--config"]
                at = max(ends, default=0)  # behind the last recipe
            parsed = parser.parse_args([*argv[:at], *implied, *argv[at:]])
    except ArgumentError as error:
        recipes = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--config"]
        where = f" (recipe {', '.join(recipes)})" if recipes else ""
        raise ValueError(_in_a_line(error) + where) from error
    for recipe in parsed.get("config") or []:
        if recipe is not None:  # a file, not YAML on the command line
            _check_values(kind, yaml.safe_load(recipe.read_text()), f"recipe {recipe}")
    values = parser.instantiate(parsed).as_dict()
    values.pop("config", None)
    return kind(**values)


def parse_values(kind: type, values: dict, where: str) -> Any:
    """An instance of `kind` from nested plain values, as a JSON file has them. Missing keys keep
    their defaults.

    ValueError, naming `where` and the key, for an unknown key or an ill-typed value.
    """
    parser = _parser(kind, "")
    _check_values(kind, values, where)
    try:
        return kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {_in_a_line(error)}") from error


def _parser(kind: type, description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=True)
    return parser


def _check_values(kind: type, values: dict, where: str, prefix: str = "") -> None:
    """ValueError, naming `where` and the key, for what jsonargparse takes in silence: a number
    where nested keys belong (it is ignored; a text names a file with them), and null where a value
    belongs."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        name, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        if name not in hints:
            continue  # the parser rejects it
        kinds = [hints[name], *get_args(hints[name])]
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if value is None and NoneType not in kinds:
            raise ValueError(f"{where}: {prefix}{name} is null, but it needs a value")
        if section is not None and isinstance(value, dict):
            _check_values(section, value, where, f"{prefix}{name}.")
        elif section is not None and not isinstance(value, (str, NoneType)):
            raise ValueError(f"{where}: {prefix}{name} is {value!r}, but it has keys of its own")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_MESSAGE]


def _implied_flags(preset: str | None, resume: str | None, presets: dict[str, dict]) -> list[str]:
    if resume is not None:
        if not (file := Path(resume) / "config.yaml").is_file():
            raise ValueError(f"resume {resume}: no config.yaml there, so no run to go on with")
        return ["--config", str(file)]
    if preset is None:
        return []
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, not {preset!r}")
    return [f"--{key}={'null' if value is None else value}" for key, value in presets[preset].items()]


def to_dict(config: Any) -> Any:
    """A configuration as plain YAML values."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def save_config(config: Any, path: Path) -> None:
    """Write the whole configuration as YAML that `--config` reads back."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)


def config_diff(config: Any, default: Any) -> dict[str, Any]:
    """Dotted key -> value, for every value that is not the default's."""
    return {key: value for key, value in flat(to_dict(config)).items() if flat(to_dict(default)).get(key) != value}


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    out = {}
    for key, value in values.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
