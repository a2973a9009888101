"""Errors of jsonargparse in words that name the key and say what was expected."""

import re
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mtsql.choices import Size
from mtsql.run.help import section_type
from mtsql.run.recipes import in_a_line


def make_parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(
        add_help=False, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    parser.add_class_arguments(kind, fail_untyped=True)
    return parser


def explained(error: Exception, kind: type, prefix: str = "") -> str:
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
        return f"unknown key {key}{suggestion(key, keys_of(kind), '')}"
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
            return explained(*nested_error, f"{prefix}{key}.")
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
        make_parser(section).parse_object(yaml.safe_load(value))
    except ArgumentError as error:
        return error, section
    except (ValueError, TypeError, yaml.YAMLError):
        pass
    return None


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration."""
    keys = []
    for name, hint in get_type_hints(kind).items():
        section = section_type(hint)
        keys += keys_of(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def suggestion(word: str, keys: list[str], dashes: str) -> str:
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
