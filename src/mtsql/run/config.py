"""Turn recipes and dotted flags into nested dataclasses and back, with jsonargparse."""

import math
import os
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from mtsql.files import write_text
from mtsql.run.recipes import in_a_line, read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

OWN_FLAGS = {"help", "config", "print_config"}


def parse_config(
    kind: type, argv: list[str], description: str, presets: dict[str, dict] | None = None
) -> Any:
    """The configuration `kind` from `--config recipe.yaml` and dotted flags (`--optim.lr 1e-4`).

    - `--preset NAME` stands for the flags of `presets[NAME]`. It wins over recipes, and flags after
      it win over it. If a recipe names a preset, the recipe's own keys win.
    - `--resume RUN` stands for `--config RUN/config.yaml`, and all other flags win over it.
    - If `kind` has a static method `first_recipe(model_path)`, the file that it returns, if any, is
      read before all recipes.
    - `--print_config` prints the configuration that would run, and exits. If `kind` has a method
      `completed()`, its result is printed: the configuration, checked, with derived values set.

    ValueError, in a line that names the fault, for an unknown or shortened flag, a value of the
    wrong type, a number that is not finite, or a recipe that cannot be read.
    """
    parser = _parser(kind, description)
    parser.add_argument("--config", action="config", help="a YAML recipe; flags after it win")
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print the configuration that would run, and exit",
    )
    try:
        parsed = _parsed(parser, kind, argv)
        first_recipe = getattr(kind, "first_recipe", lambda _: None)(parsed.get("model.path"))
        if first_recipe is not None:
            parsed = _parsed(parser, kind, ["--config", str(first_recipe), *argv])
        resume = parsed.get("resume")
        run = _words(argv, "--run")
        if run and resume is not None and Path(run[-1][0]) != Path(resume):
            raise ValueError(f"--run has no effect with resume {resume}: leave it out")
        implied = _implied_flags(parsed.get("preset"), resume, presets or {})
        if implied:
            # Later flags win. So the flags that --resume or a recipe's preset implies come first,
            # and those of the flag --preset come after all recipes.
            place = 0
            if resume is None and _words(argv, "--preset"):
                place = max((end for _, end in _words(argv, "--config")), default=0)
            parsed = _parsed(parser, kind, [*argv[:place], *implied, *argv[place:]])
    except ArgumentError as error:
        recipes = [value for value, _ in _words(argv, "--config")]
        where = f" (recipe {', '.join(recipes)})" if recipes else ""
        for run, _ in _words(argv, "--resume"):
            where = f" ({run}/config.yaml: did another script start this run?)"
        raise ValueError(_explained(error, kind) + where) from error
    for recipe in parsed.get("config") or []:
        _check_values(kind, read_yaml(recipe), f"recipe {recipe}")
    try:
        values = parser.instantiate(parsed).as_dict()
    except ValueError as error:
        _build(kind, parsed.as_dict())
        raise ValueError(in_a_line(error)) from error
    values.pop("config", None)
    is_printed = values.pop("print_config")
    config = _usable(kind(**values), "")
    if is_printed:
        if hasattr(config, "completed"):
            config = config.completed()
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config


def _parsed(parser: ArgumentParser, kind: type, argv: list[str]) -> Namespace:
    """The parser's result, after two checks of ours: that all flags exist (the parser does not
    check nested keys) and that it can read the recipes."""
    keys = _keys(kind)
    sections = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 9)}
    known = {*keys, *sections, *(f"{name}.help" for name in sections)} | OWN_FLAGS
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] not in known:
            hint = _suggestion(name[2:], keys, "--")
            raise ValueError(f"unknown flag {name}{hint}; --help lists all")
    for file, _ in _words(argv, "--config"):
        if not file or not os.path.exists(file):
            raise ValueError(f"--config {file or 'is empty'}: no such file")
        if os.path.isdir(file):
            raise ValueError(f"--config {file}: this is a folder: name a recipe in it")
        own = sorted(OWN_FLAGS & set(read_yaml(file)))
        if own:
            raise ValueError(
                f"recipe {file}: {own[0]} works only as a flag: remove it from the recipe"
            )
    return parser.parse_args(argv)


def _build(kind: type, values: dict, path: str = "") -> Any:
    """The configuration from its plain values, as the parser builds it but with better errors.

    The ValueError of a section names its keys as they are called in most scripts (`optim.lr`). Here
    they get their place in the whole configuration (`sft.optim.lr`).
    """
    hints = get_type_hints(kind)
    given = {}
    for name, hint in hints.items():
        section = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        is_nested = section is not None and isinstance(values[name], dict)
        given[name] = _build(section, values[name], f"{path}{name}.") if is_nested else values[name]
    try:
        return kind(**given)
    except ValueError as error:

        def placed(match: re.Match) -> str:
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
    parser = _parser(kind, "")
    _check_values(kind, values, where)
    try:
        made = kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {_explained(error, kind)}") from error
    return _usable(made, f"{where}: ")


class _Formatter(DefaultHelpFormatter):
    """Keep the line breaks of a description in --help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _parser(kind: type, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_class_arguments(kind, fail_untyped=True)
    return parser


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
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if value is None and NoneType not in kinds:
            raise ValueError(f"{where}: {prefix}{name} is null, but it needs a value")
        if section is not None and isinstance(value, dict):
            _check_values(section, value, where, f"{prefix}{name}.")
        elif section is not None and not isinstance(value, (str, NoneType)):
            raise ValueError(f"{where}: {prefix}{name} is {value!r}, but it has keys of its own")


def _explained(error: Exception, kind: type) -> str:
    """An error of the parser as a line that says what was expected."""
    text = " ".join(str(error).split())
    unrecognized = re.search(r"unrecognized arguments: (\S+)", text)
    if unrecognized:
        return f"{unrecognized[1]!r} belongs to no flag: flags are written --key value"
    unknown = re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '?([\w.]+)'?", text)
    if unknown:
        key = ".".join(filter(None, unknown.groups()))
        return f"unknown key {key}{_suggestion(key, _keys(kind), '')}"
    missing = re.search(r"argument (--[\w.]+): expected one argument", text)
    if missing:
        return f"{missing[1]} needs a value"
    complaint = re.search(r'(?:Parser key|argument) "?(?:--)?([\w.]+)"?: .*[vV]alue: ?(.*)', text)
    if complaint:
        key, value = complaint.groups()
        nested = re.match(r"NestedArg\(key='(.*?)', val=(.*)\)$", value)
        if nested:  # a key of an optional section (`X | None`)
            key = f"{key}.{nested[1]}"
            value = nested[2].strip("'")
        hint = _hint(kind, key)
        if hint is not None:
            return f"{key} is {value[:80] or 'empty'}: expected {_expected(hint)}"
    section = re.search(r'Parser key "([\w.]+)": Unable to load config \'(.*?)\'', text)
    if section:
        return f"{section[1]} is {section[2]}: it has keys of its own (--{section[1]}.KEY value)"
    return in_a_line(error)


def _keys(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration."""
    keys = []
    for name, hint in get_type_hints(kind).items():
        section = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        keys += _keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def _suggestion(word: str, keys: list[str], dashes: str) -> str:
    """The known key that was probably meant, as the end of a sentence; empty if none is similar."""
    word = word.replace("-", "_")
    deepest_first = sorted(keys, key=lambda key: -key.count("."))
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in deepest_first}
    close = get_close_matches(word, keys, 1, 0.75)
    if not close:
        close = [key for key in keys if key.startswith(word)]
    if not close:
        close = get_close_matches(word.rsplit(".", 1)[-1], list(by_last_part), 1, 0.75)
    if not close:
        return ""
    return f" (did you mean {dashes}{by_last_part.get(close[0], close[0])}?)"


def _hint(kind: Any, key: str) -> Any:
    """The type of a dotted key of a dataclass. None if there is no such key."""
    for name in key.split("."):
        kinds = [kind, *get_args(kind)]
        kind = next((one for one in kinds if is_dataclass(one)), None)
        kind = get_type_hints(kind).get(name) if kind else None
    return kind


_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def _expected(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        values = get_args(hint)
        count = "" if Ellipsis in values or len(values) < 2 else f" of {len(values)} values"
        return f"a list{count} such as [a, b]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    if is_dataclass(hint):
        return "keys of its own"
    return " or ".join(_expected(one) for one in get_args(hint)) or "another value"


def _implied_flags(preset: str | None, resume: str | None, presets: dict[str, dict]) -> list[str]:
    """The flags that `--resume` or `--preset` stands for."""
    if resume is not None:
        file = Path(resume) / "config.yaml"
        if not file.is_file():
            raise ValueError(f"resume {resume}: no config.yaml there, so no run to continue")
        return ["--config", str(file)]
    if preset is None:
        return []
    flags = []
    for key, value in presets[preset].items():
        text = "null" if value is None else value
        flags.append(f"--{key}={text}")
    return flags


def to_dict(config: Any) -> Any:
    """A configuration as plain YAML values."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Enum):
        return config.name
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
