"""Turn recipes and dotted flags into nested dataclasses and back, with jsonargparse."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from mtsql.choices import Size, parse_size
from mtsql.files import print_page, write_text
from mtsql.run.config_errors import explained, keys_of, make_parser, suggestion
from mtsql.run.help import asked_topic, help_text, section_type
from mtsql.run.implied import (
    COUNTED_FROM_ZERO,
    implied_recipe,
    keep_as_new,
    old_run,
    preset_names,
)
from mtsql.run.recipes import Implied, Recipe, in_a_line, read_recipe

register_type(Size, int, parse_size, type_check=lambda value, _: isinstance(value, int))

OWN_FLAGS = {"help", "config", "print_config"}


def parse_config(
    kind: type,
    argv: list[str],
    description: str,
    presets: Path | None = None,
) -> Any:
    """The configuration `kind` from `--config recipe.yaml` and dotted flags (`--optim.lr 1e-4`).

    - Flags win over recipes, whatever comes first. Of two recipes, the later one wins.
    - `--preset NAME` stands for the recipe `presets/NAME.yaml`. It wins over other recipes, and
      flags after it win over it. If a recipe names a preset, the recipe's own keys win.
    - `--resume RUN` stands for `--config RUN/config.yaml`, and all other flags win over it.
    - `--from RUN`, or a checkpoint of it, stands for the same file before all other recipes.
    - A recipe with the key `base` inherits from the recipe that it names (run/recipes.py).
    - If the type of a section has a static method `implied(values)`, it gives what the section's
      values in a recipe, or those of its flags, imply: values by dotted key of the whole
      configuration. They count as given in the same place, unless they are given there.
    - If `kind` has a static method `first_recipe(model_path)`, the file that it returns, if any, is
      read before all recipes.
    - `--dry_run` stands for `--dry_run true`.
    - `--help` prints `description` and all flags, `--help SECTION` one section, and exits.
    - `--print_config` prints the configuration that would run, and exits. If `kind` has a method
      `completed()`, its result is printed: the configuration, checked, with derived values set.

    ValueError, in a line that names the fault, for an unknown or shortened flag, a value of the
    wrong type, a number that is not finite, or a recipe that cannot be read.
    """
    argv = [re.sub(r"^--from(?=$|=)", "--from_run", word) for word in _spelled_out(argv)]
    argv = _recipes_first(argv)
    names = preset_names(presets)
    topic = asked_topic(argv)
    if topic is not None:
        choices = {"preset": names} if names else {}
        print_page(help_text(kind, description, topic, choices))
        raise SystemExit(0)
    parser = make_parser(kind)
    parser.add_argument("--config", action="config")
    parser.add_argument("--print_config", action="store_true")
    try:
        parsed = _parsed(parser, kind, argv)
        first_recipe = getattr(kind, "first_recipe", lambda _: None)(parsed.get("model.path"))
        if first_recipe is not None:
            parsed = _parsed(parser, kind, ["--config", str(first_recipe), *argv])
        resume = parsed.get("resume")
        run = _words(argv, "--run")
        if run and resume is not None and Path(run[-1][0]) != Path(resume):
            raise ValueError(f"--run has no effect with resume {resume}: leave it out")
        # Later flags win. So the recipe that --resume or a recipe's preset stands for comes first,
        # and the flag --preset and what it stands for come after all recipes.
        place = 0
        preset = parsed.get("preset")
        implied = []
        origin = parsed.get("from_run") if resume is None else None
        if origin is not None:
            own = ["--config", str(old_run(origin).recipe), keep_as_new(kind)]
            parsed = _parsed(parser, kind, [*own, *argv])
            if "curriculum" not in parsed["keep"]:
                own.append(COUNTED_FROM_ZERO)
                parsed = _parsed(parser, kind, [*own, *argv])
            place = len(own)
            argv = [*own, *argv]
        by_flag = _words(argv, "--preset")
        if by_flag and resume is None:
            place = max((end for _, end in _words(argv, "--config")), default=0)
            implied = [f"--preset={by_flag[-1][0]}"]
            preset = _parsed(parser, kind, implied).get("preset")
        recipe = implied_recipe(preset, resume, presets, names)
        if recipe is not None:
            implied += ["--config", str(recipe)]
        if implied:
            argv = [*argv[:place], *implied, *argv[place:]]
            parsed = _parsed(parser, kind, argv)
    except ArgumentError as error:
        recipes = [value for value, _ in _words(argv, "--config")]
        for file in recipes:
            _blame(parser, kind, file)
        where = f" (recipe {', '.join(recipes)})" if recipes else ""
        for resumed, _ in _words(argv, "--resume"):
            where = f" ({resumed}/config.yaml: did another script or version of mtsql start it?)"
        for origin, _ in _words(argv, "--from_run"):
            where = f" (from {origin}: did another version of mtsql start it?)"
        raise ValueError(explained(error, kind) + where) from error
    try:
        values = parser.instantiate(parsed).as_dict()
    except ValueError as error:
        fault = error
        try:
            _build(kind, parsed.as_dict())
        except ValueError as better:
            fault = better
        raise ValueError(in_a_line(fault) + _place(kind, argv, str(fault))) from error
    values.pop("config", None)
    is_printed = values.pop("print_config")
    config = _usable(kind(**values), "")
    if is_printed:
        if hasattr(config, "completed"):
            config = config.completed()
        print_page(as_yaml(config).rstrip())
        raise SystemExit(0)
    return config


def _spelled_out(argv: list[str]) -> list[str]:
    """The flags, with `--dry_run` without a value as `--dry_run=true`."""
    following = [*argv[1:], "--"][: len(argv)]
    return [
        "--dry_run=true" if word == "--dry_run" and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def _recipes_first(argv: list[str]) -> list[str]:
    """The flags with `--config` and its values before all others."""
    recipes: list[str] = []
    others: list[str] = []
    for place, word in enumerate(argv):
        is_value = place > 0 and argv[place - 1] == "--config"
        is_recipe = is_value or word == "--config" or word.startswith("--config=")
        (recipes if is_recipe else others).append(word)
    return [*recipes, *others]


def _parsed(parser: ArgumentParser, kind: type, argv: list[str]) -> Namespace:
    """The parser's result, after checks of ours: that all flags exist (the parser does not check
    nested keys), that it can read the recipes, and that they have values (`_check_values`)."""
    keys = keys_of(kind)
    sections = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 9)}
    known = {*keys, *sections, *(f"{name}.help" for name in sections)} | OWN_FLAGS
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] not in known:
            hint = suggestion(name[2:], keys, "--")
            raise ValueError(f"unknown flag {name}{hint}; --help lists all")
    implied = _implied_by(kind)
    expanded = []
    for place, word in enumerate(argv):
        is_recipe = place > 0 and argv[place - 1] == "--config"
        if not is_recipe and not word.startswith("--config="):
            expanded.append(word)
            continue
        file = word.removeprefix("--config=")
        recipe = _recipe(kind, file, implied)
        if not recipe.is_one_file:
            file = yaml.safe_dump(recipe.values, sort_keys=False)  # the parser reads text, too
        expanded.append(f"--config={file}" if word.startswith("--config=") else file)
    flags = _flags(argv)
    further = {key: value for key, value in implied(flags).items() if key not in flags}
    expanded += [f"--{key}={json.dumps(value)}" for key, value in further.items()]
    return parser.parse_args(expanded)


def _recipe(kind: type, file: str, implied: Implied) -> Recipe:
    """A recipe that a flag names, its files checked as far as the parser does not check them."""
    if not file or not os.path.exists(file):
        raise ValueError(f"--config {file or 'is empty'}: no such file")
    if os.path.isdir(file):
        raise ValueError(f"--config {file}: this is a folder: name a recipe in it")
    recipe = read_recipe(file, implied)
    for name, values in recipe.files.items():
        own = sorted(OWN_FLAGS & set(values))
        if own:
            raise ValueError(
                f"recipe {name}: {own[0]} works only as a flag: remove it from the recipe"
            )
        _check_values(kind, values, f"recipe {name}")
    return recipe


def _implied_by(kind: type) -> Implied:
    """What the sections of `kind` imply, without the keys that `kind` does not have."""
    sections: dict[str, Any] = {n: section_type(hint) for n, hint in get_type_hints(kind).items()}
    sources = {name: one.implied for name, one in sections.items() if hasattr(one, "implied")}
    keys = set(keys_of(kind)) if sources else set()

    def implied(values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, source in sources.items():
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
            found |= {key: value for key, value in source(own).items() if key in keys}
        return found

    return implied


def _flags(argv: list[str]) -> dict[str, Any]:
    """Dotted key -> value of all flags, the last if one is given twice."""
    values: dict[str, Any] = {}
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name != "--config":
            following = argv[place + 1] if place + 1 < len(argv) else ""
            values[name[2:]] = value if equals else following
    return values


def _blame(parser: ArgumentParser, kind: type, file: str) -> None:
    """ValueError that names the file if one of a recipe's several files holds what the parser does
    not read."""
    files = read_recipe(file).files
    for name, values in files.items() if len(files) > 1 else ():
        try:
            parser.parse_object(values)
        except ArgumentError as error:
            if "are required" not in str(error):
                raise ValueError(f"{explained(error, kind)} (recipe {name})") from error


def _place(kind: type, argv: list[str], error: str) -> str:
    """The end of a message: the recipe that sets a key which the error names, unless a flag sets
    it."""
    places: dict[str, str] = {}
    for file, _ in _words(argv, "--config"):
        places |= read_recipe(file, _implied_by(kind)).places
    named = [key for key in re.findall(r"[a-z]\w*(?:\.\w+)*", error) if key in places]
    found = [places[key] for key in named if key not in _flags(argv)]
    return f" (recipe {', '.join(dict.fromkeys(found))})" if found else ""


def _build(kind: type, values: dict, path: str = "") -> Any:
    """The configuration from its plain values, as the parser builds it but with better errors.

    The ValueError of a section names its keys as they are called in most scripts (`optim.lr`). Here
    they get their place in the whole configuration (`sft.optim.lr`).
    """
    hints = get_type_hints(kind)
    given = {}
    for name, hint in hints.items():
        section = section_type(hint)
        value = values[name]
        if section is not None and isinstance(value, dict):
            value = _build(section, value, f"{path}{name}.")
        given[name] = value
    try:
        return kind(**given)
    except ValueError as error:

        def placed(match: re.Match[str]) -> str:
            return path + match[1] if path and match[1] in hints else match[0]

        raise ValueError(re.sub(r"\b\w+(?:\.\w+)*\.(\w+)\b", placed, str(error))) from error


def _words(argv: list[str], flag: str) -> list[tuple[str, int]]:
    """(value, index after it) for each time that a flag is given, as `--flag value` or
    `--flag=value`."""
    found = []
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag and equals:
            found.append((value, place + 1))
        elif name == flag and place + 1 < len(argv):
            found.append((argv[place + 1], place + 2))
    return found


def parse_values(kind: type, values: dict, where: str) -> Any:
    """An instance of `kind` from nested plain values, such as those of a JSON file. Missing keys
    keep their defaults.

    ValueError that names `where` and the key for an unknown key or a value of the wrong type.
    """
    parser = make_parser(kind)
    _check_values(kind, values, where)
    try:
        made = kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {explained(error, kind)}") from error
    return _usable(made, f"{where}: ")


def _usable(config: Any, where: str) -> Any:
    """The configuration itself. ValueError that names the key of a number that is not finite, or of
    an empty text, which usually comes from a shell variable that is not set."""
    for key, value in flat(to_dict(config)).items():
        if value == "":
            raise ValueError(f"{where}{key} is empty: give it a value, or leave it out")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{where}{key} is {number}: expected a finite number")
    return config


def _check_values(kind: type, values: dict, where: str, prefix: str = "") -> None:
    """ValueError that names `where` and the key for two mistakes that jsonargparse accepts.

    They are a number in place of nested keys, which it ignores (a text names a file that has them),
    and null in place of a value.
    """
    hints = get_type_hints(kind)
    for key, value in values.items():
        name, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        if name not in hints:
            continue  # the parser rejects it
        kinds = [hints[name], *get_args(hints[name])]
        section = section_type(hints[name])
        if value is None and NoneType not in kinds:
            raise ValueError(f"{where}: {prefix}{name} is null, but it needs a value")
        if section is not None and isinstance(value, dict):
            _check_values(section, value, where, f"{prefix}{name}.")
        elif section is not None and not isinstance(value, (str, NoneType)):
            raise ValueError(f"{where}: {prefix}{name} is {value!r}, but it has keys of its own")


def to_dict(config: Any) -> Any:
    """A configuration as plain YAML values."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def as_yaml(config: Any) -> str:
    """The whole configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def save_config(config: Any, path: Path) -> None:
    """Write `as_yaml` to a file. ValueError that names the file if it cannot be written."""
    write_text(path, as_yaml(config))


def config_diff(config: Any, default: Any) -> dict[str, Any]:
    """Dotted key -> value, for every value that differs from that of `default`."""
    usual = flat(to_dict(default))
    values = flat(to_dict(config))
    return {key: value for key, value in values.items() if usual.get(key) != value}


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as a single one with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
