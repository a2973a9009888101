"""Turn recipes and dotted flags into nested dataclasses and back, with jsonargparse."""

import math
import os
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from mtsql.choices import Size, parse_size
from mtsql.files import print_page, write_text
from mtsql.run.help import asked_topic, help_text, section_type
from mtsql.run.implied import implied_recipe, old_run, preset_names
from mtsql.run.recipes import in_a_line, read_yaml

register_type(Size, int, parse_size, type_check=lambda value, _: isinstance(value, int))

OWN_FLAGS = {"help", "config", "print_config"}


def parse_config(
    kind: type,
    argv: list[str],
    description: str,
    presets: Path | None = None,
) -> Any:
    """The configuration `kind` from `--config recipe.yaml` and dotted flags (`--optim.lr 1e-4`).

    - `--preset NAME` stands for the recipe `presets/NAME.yaml`. It wins over other recipes, and
      flags after it win over it. If a recipe names a preset, the recipe's own keys win.
    - `--resume RUN` stands for `--config RUN/config.yaml`, and all other flags win over it.
    - `--from RUN`, or a checkpoint of it, stands for the same file before all other recipes.
    - If `kind` has a static method `first_recipe(model_path)`, the file that it returns, if any, is
      read before all recipes.
    - `--help` prints `description` and all flags, `--help SECTION` one section, and exits.
    - `--print_config` prints the configuration that would run, and exits. If `kind` has a method
      `completed()`, its result is printed: the configuration, checked, with derived values set.

    ValueError, in a line that names the fault, for an unknown or shortened flag, a value of the
    wrong type, a number that is not finite, or a recipe that cannot be read.
    """
    argv = [re.sub(r"^--from(?=$|=)", "--from_run", word) for word in argv]
    names = preset_names(presets)
    topic = asked_topic(argv)
    if topic is not None:
        choices = {"preset": names} if names else {}
        print_page(help_text(kind, description, topic, choices))
        raise SystemExit(0)
    parser = _parser(kind)
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
            argv = ["--config", str(old_run(origin).recipe), *argv]
            parsed = _parsed(parser, kind, argv)
            place = 2
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
        where = f" (recipe {', '.join(recipes)})" if recipes else ""
        for resumed, _ in _words(argv, "--resume"):
            where = f" ({resumed}/config.yaml: did another script or version of mtsql start it?)"
        for origin, _ in _words(argv, "--from_run"):
            where = f" (from {origin}: did another version of mtsql start it?)"
        raise ValueError(_explained(error, kind) + where) from error
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
        print_page(as_yaml(config).rstrip())
        raise SystemExit(0)
    return config


def _parsed(parser: ArgumentParser, kind: type, argv: list[str]) -> Namespace:
    """The parser's result, after checks of ours: that all flags exist (the parser does not check
    nested keys), that it can read the recipes, and that they have values (`_check_values`)."""
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
        values = read_yaml(file)
        if not values:
            raise ValueError(f"recipe {file}: it has no keys")
        own = sorted(OWN_FLAGS & set(values))
        if own:
            raise ValueError(
                f"recipe {file}: {own[0]} works only as a flag: remove it from the recipe"
            )
        _check_values(kind, values, f"recipe {file}")
    return parser.parse_args(argv)


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
    parser = _parser(kind)
    _check_values(kind, values, where)
    try:
        made = kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {_explained(error, kind)}") from error
    return _usable(made, f"{where}: ")


def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(
        add_help=False, exit_on_error=False, allow_abbrev=False, print_config=None
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
        section = section_type(hints[name])
        if value is None and NoneType not in kinds:
            raise ValueError(f"{where}: {prefix}{name} is null, but it needs a value")
        if section is not None and isinstance(value, dict):
            _check_values(section, value, where, f"{prefix}{name}.")
        elif section is not None and not isinstance(value, (str, NoneType)):
            raise ValueError(f"{where}: {prefix}{name} is {value!r}, but it has keys of its own")


def _explained(error: Exception, kind: type, prefix: str = "") -> str:
    """An error of the parser as a line that says what was expected. `prefix`: the place of `kind`
    in the whole configuration."""
    text = " ".join(str(error).split())
    unrecognized = re.search(r"unrecognized arguments: (\S+)", text)
    if unrecognized:
        return f"{unrecognized[1]!r} belongs to no flag: flags are written --key value"
    unknown = re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '?([\w.]+)'?", text)
    if unknown:
        optional = re.match(r'Parser key "([\w.]+)": Does not validate against any of', text)
        key = ".".join(filter(None, [optional and optional[1], *unknown.groups()]))
        return f"unknown key {key}{_suggestion(key, _keys(kind), '')}"
    required = re.search(r"the following arguments are required: (.+)", text)
    if required:
        flags = ", ".join(f"--{name}" for name in required[1].split(", "))
        return f"not given, but needed: {flags}"
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
        nested_error = _error_in_section(hint, value)
        if nested_error is not None:
            return _explained(*nested_error, f"{prefix}{key}.")
        if hint is not None:
            return f"{prefix}{key} is {value[:80] or 'empty'}: expected {_expected(hint)}"
    section = re.search(r'Parser key "([\w.]+)": Unable to load config \'(.*?)\'', text)
    if section:
        return f"{section[1]} is {section[2]}: it has keys of its own (--{section[1]}.KEY value)"
    return in_a_line(error)


def _error_in_section(hint: Any, value: str) -> tuple[ArgumentError, type] | None:
    """The parser's error for the keys of an optional section (`X | None`), and the section's type.
    The parser itself only says that the section as a whole is wrong. None if there is no error."""
    section = section_type(hint)
    if section is None or not value.startswith("{"):
        return None
    try:
        _parser(section).parse_object(yaml.safe_load(value))
    except ArgumentError as error:
        return error, section
    except (ValueError, TypeError, yaml.YAMLError):
        pass
    return None


def _keys(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration."""
    keys = []
    for name, hint in get_type_hints(kind).items():
        section = section_type(hint)
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
        section = section_type(kind)
        kind = get_type_hints(section).get(name) if section else None
    return kind


_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Size: "a size such as 8GB or 512MiB",
    NoneType: "null",
}


def _expected(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        values = get_args(hint)
        if get_origin(values[0]) is Literal:
            choices = get_args(values[0])
            return f"a list such as [{choices[0]}] of {', '.join(choices)}"
        count = "" if Ellipsis in values or len(values) < 2 else f" of {len(values)} values"
        return f"a list{count} such as [a, b]"
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    if is_dataclass(hint):
        return "keys of its own"
    return " or ".join(_expected(one) for one in get_args(hint)) or "another value"


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
