"""The text of `--help`, from the fields of a configuration: types, defaults and docstrings.

usage: train_rl.py [--config FILE] [--KEY VALUE ...]

<description>

Run
  --seed N (default: 0)
      Seed of weights, order and sampling.
...
"""

import re
import shutil
import sys
import textwrap
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from mtsql.choices import Size

MAX_WIDTH = 100
"""Maximum width of the text, on a wide terminal."""
TITLES = {"env": "Environment", "lora": "LoRA", "optim": "Optimizer", "query": "Queries"}
TITLES |= {"sft": "SFT", "selftaught": "Self-taught rounds", "weights": "Reward weights"}
TITLES |= {"embedded": "Embedded model", "warm_start.optim": "Optimizer of the warm start"}
"""Titles of sections, by key or by the last part of it. The others are called like their key."""
FORMS = {int: "N", Size: "SIZE", float: "X", bool: "true|false", NoneType: "null"}
"""How a value of a type is written. Any other value is a TEXT."""
REQUIRED = object()
"""The default of a flag that must be given."""


@dataclass(frozen=True)
class Flag:
    """A line of the help: `--key form (default: ...)` and what it means."""

    key: str
    form: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Section:
    """The flags of a dataclass that are no sections of their own. `key`: where it is in the
    configuration, empty for the whole."""

    kind: type
    key: str
    meaning: str
    flags: tuple[Flag, ...]


def asked_topic(argv: list[str]) -> str | None:
    """What `--help TOPIC` (or `--TOPIC.help`) asks for; empty for everything. None without such a
    flag."""
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            after = argv[place + 1 : place + 2]
            return after[0].strip("-") if after and after[0].strip("-") else ""
        if word.startswith("--help="):
            return word.removeprefix("--help=")
        if word.startswith("--") and word.endswith(".help"):
            return word[2:].removesuffix(".help")
    return None


def help_text(
    kind: type,
    description: str,
    topic: str = "",
    choices: dict[str, list[str]] | None = None,
    width: int | None = None,
) -> str:
    """The help of all flags of `kind`, or of the section or flag `topic` (`run`: the flags that are
    in no section). No line is wider than `width` (default: the terminal, at most `MAX_WIDTH`).

    `choices`: the values of text flags whose type does not list them. ValueError for a topic that
    does not exist.
    """
    width = width or min(MAX_WIDTH, shutil.get_terminal_size().columns)
    sections = sections_of(kind, choices or {})
    first_title = "Run" if len(sections) > 1 else "Flags"
    if topic:
        chosen = [_within(section, topic, first_title) for section in sections]
        parts = [_shown(section, first_title, width) for section in chosen if section.flags]
        if not parts:
            names = [first_title.lower(), *(section.key for section in sections)]
            close = get_close_matches(topic, names, 1, 0.6)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"--help {topic}: no such section{hint}; --help lists all")
        return "\n\n".join(parts)
    usage = f"usage: {Path(sys.argv[0]).name} [--config FILE] [--KEY VALUE ...]"
    parts = ["\n".join(_indented(usage, "", width, "  "))]
    if description.strip():
        parts.append(wrapped(description, width))
    parts.append(_general(sections, first_title, width))
    place_of: dict[type, str] = {}  # a dataclass that is used twice is explained once
    for section in sections:
        explained = place_of.setdefault(section.kind, section.key)
        if explained != section.key:
            section = _without_meanings(section, explained)
        parts.append(_shown(section, first_title, width))
    return "\n\n".join(parts)


def sections_of(kind: type, choices: dict[str, list[str]]) -> list[Section]:
    """The sections of a configuration: first the flags that are in none, then the others in the
    order of their fields, and at the end those that can be switched off (`X | None`)."""
    first, others, optional = _sections(kind, None, "", "", choices)
    return [first, *others, *optional]


def _sections(
    kind: type, values: Any, key: str, meaning: str, choices: dict[str, list[str]]
) -> tuple[Section, list[Section], list[Section]]:
    """The section of a dataclass, those inside of it, and those that can be switched off. `values`:
    an instance with the defaults; without one the fields' own defaults count."""
    hints = get_type_hints(kind)
    meanings = field_docstrings(kind)
    flags: list[Flag] = []
    inner: list[Section] = []
    optional: list[Section] = []
    for field in fields(kind):
        hint = hints[field.name]
        default = _default(field) if values is None else getattr(values, field.name)
        place = f"{key}.{field.name}".lstrip(".")
        text = meanings.get(field.name, "")
        section = section_type(hint)
        if section is None:
            form = "|".join(choices[place] + ["null"]) if place in choices else _form(hint)
            flags.append(Flag(place, form, default, text))
            continue
        own = default if is_dataclass(default) else None
        text = text or _first_sentence(section.__doc__ or "")
        is_optional = NoneType in get_args(hint)
        if is_optional:
            state = "on" if own is not None else "off"
            text = f"{text} `--{place} null` switches it off (default: {state})."
        head, others, later = _sections(section, own, place, text, choices)
        (optional if is_optional else inner).extend([head, *others])
        optional += later
    return Section(kind, key, meaning, tuple(flags)), inner, optional


def section_type(hint: Any) -> type | None:
    """The dataclass of a field with keys of its own, `X` or `X | None`. None for other fields."""
    for one in (hint, *get_args(hint)):
        if isinstance(one, type) and is_dataclass(one):
            return one
    return None


@cache
def field_docstrings(kind: type) -> dict[str, str]:
    """Field -> the text below it, in one line, for a dataclass and those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if is_dataclass(owner):
            for parameter in docstring_parser.parse_from_object(owner).params:
                found[parameter.arg_name] = " ".join((parameter.description or "").split())
    return found


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return REQUIRED if field.default_factory is MISSING else field.default_factory()


def _form(hint: Any) -> str:
    """How a value is written: N, X, TEXT, a|b, [X, X], ..."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        parts = ["..." if one is Ellipsis else _form(one) for one in get_args(hint)]
        return f"[{', '.join(parts if len(parts) > 1 else [*parts, '...'])}]"
    if get_origin(hint) is not None or not isinstance(hint, type):  # X | None
        return "|".join(_form(one) for one in get_args(hint)) or "VALUE"
    return FORMS.get(hint, "TEXT")


def _written(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _within(section: Section, topic: str, first_title: str) -> Section:
    """The part of a section that belongs to a topic: all of it, one flag, or nothing."""
    is_meant = topic == (section.key or first_title.lower()) or section.key.startswith(f"{topic}.")
    if is_meant:
        return section
    flags = tuple(flag for flag in section.flags if flag.key == topic)
    return replace(section, meaning="", flags=flags)


def _without_meanings(section: Section, explained: str) -> Section:
    """The section with its defaults only, for keys that `explained` has explained before."""
    flags = tuple(replace(flag, meaning="") for flag in section.flags)
    meaning = f"{section.meaning} The keys are those of {explained}.".strip()
    return replace(section, meaning=meaning, flags=flags)


def _general(sections: list[Section], first_title: str, width: int) -> str:
    names = [first_title.lower(), *(section.key for section in sections[1:])]
    lines = ["Help and recipes"]
    lines += _lines(
        "--help [SECTION]", f"Print this page, or one section: {', '.join(names)}.", width
    )
    lines += _lines("--config FILE", "A YAML recipe. Flags after it win over it.", width)
    lines += _lines("--print_config", "Print the configuration that would run, and exit.", width)
    values = "N is a whole number, X a number, SIZE a number of bytes such as 8GB or 512MiB"
    lines += _indented(f"{values}, null no value.", "  ", width)
    return "\n".join(lines)


def _shown(section: Section, first_title: str, width: int) -> str:
    """A section as text: its title, what it is for, its flags."""
    name = section.key.rpartition(".")[2]
    title = TITLES.get(section.key) or TITLES.get(name) or name.replace("_", " ").capitalize()
    if section.key and title.lower() != section.key:
        title = f"{title} ({section.key})"
    lines = [title if section.key else first_title]
    if section.meaning:
        lines += _indented(section.meaning, "  ", width)
    for flag in section.flags:
        given = "required" if flag.default is REQUIRED else f"default: {_written(flag.default)}"
        lines += _lines(f"--{flag.key} {flag.form} ({given})", flag.meaning, width)
    return "\n".join(lines)


def _lines(head: str, meaning: str, width: int) -> list[str]:
    """A flag and, below it, what it means."""
    return [*_indented(head, "  ", width, "      "), *_indented(meaning, "      ", width)]


def _indented(text: str, indent: str, width: int, further: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if further is None else further,
        break_on_hyphens=False,
    )


def wrapped(description: str, width: int) -> str:
    """A docstring for this width. Prose is filled anew, and so are the items of a list. Indented
    lines, such as commands, keep their line breaks."""
    blocks = [
        _wrapped_block(block, width) for block in description.strip("\n").rstrip().split("\n\n")
    ]
    return "\n\n".join(blocks)


def _wrapped_block(block: str, width: int) -> str:
    lines = block.split("\n")
    if all(line.startswith("    ") for line in lines if line):
        return "\n".join(_command_lines(lines, width))
    is_numbered = block.startswith("(1) ")
    items = re.split(r"\s+(?=\(\d+\) )" if is_numbered else r"\n(?=- )", block)
    out: list[str] = []
    for item in items:
        further = "    " if is_numbered else "  " if item.startswith("- ") else ""
        out += _indented(" ".join(item.split()), "", width, further)
    return "\n".join(out)


def _command_lines(lines: list[str], width: int) -> list[str]:
    """Commands with their comments. If they are too wide, comments move to the line above, and a
    command is continued with a backslash."""
    if max(map(len, lines)) <= width:
        return lines
    out: list[str] = []
    for line in "\n".join(lines).replace("\\\n", " ").split("\n"):
        command, _, comment = line.partition("  # ")
        out += [f"    # {comment}"] if comment else []
        # A line is broken before a flag only: elsewhere, a space is kept by a stand-in.
        words = re.sub(r" (?!--)", "\0", " ".join(command.split()))
        parts = [
            part.replace("\0", " ") for part in _indented(words, "    ", width - 2, "        ")
        ]
        out += [f"{part} \\" for part in parts[:-1]] + parts[-1:]
    return out
