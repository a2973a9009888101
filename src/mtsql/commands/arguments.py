"""How the sub-commands read their words, with jsonargparse."""

import json
from collections.abc import Sequence
from typing import get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from mtsql.run.recipes import in_a_line


def spelled_out(words: Sequence[str], kind: type) -> list[str]:
    """The words of a command line in the form that `parse_config(kind, ...)` reads.

    Of the fields of `kind`, a list may be given as `--databases one two`, which becomes
    `--databases=["one", "two"]`, and a bool as `--keep_distinct`, which becomes
    `--keep_distinct=true`. Words before the first flag belong to the first field, if it is a list;
    a single word also if it is `str | None`. Everything else stays as it is.
    """
    hints = get_type_hints(kind)
    rest = list(words)
    first = next(iter(hints))
    if rest and not rest[0].startswith("-"):
        is_single = hints[first] == (str | None) and (len(rest) == 1 or rest[1].startswith("-"))
        if is_single or get_origin(hints[first]) in (tuple, list):
            rest.insert(0, f"--{first}")
    out = []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        hint = hints.get(name.removeprefix("--")) if name.startswith("--") else None
        if get_origin(hint) in (tuple, list):
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if values and not values[0].startswith("["):
                values = [json.dumps(values, ensure_ascii=False)]
            out += [f"{name}={value}" for value in values] or [word]
        elif hint is bool and not equals and (not rest or rest[0].startswith("--")):
            out.append(f"{name}=true")
        else:
            out.append(word)
    return out


class _KeepLines(DefaultHelpFormatter):
    """Keep the line breaks of a description in --help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def positional(
    words: Sequence[str], description: str, name: str = "", is_one: bool = False
) -> list[str]:
    """The words of a command without flags: one or more, or exactly one, which --help calls `name`;
    without a name, none. ValueError for anything else."""
    parser = ArgumentParser(
        description=description,
        formatter_class=_KeepLines,
        exit_on_error=False,
        print_config=None,
    )
    if name:
        parser.add_argument("words", nargs=1 if is_one else "+", metavar=name)
    for word in words:
        if word.startswith("-") and word not in ("-h", "--help"):
            raise ValueError(f"unknown flag {word}; --help lists all")
    if name and not words:
        raise ValueError(f"{name} is missing: --help explains it")
    try:
        found: list[str] = parser.parse_args(list(words)).get("words", [])
    except ArgumentError as error:
        raise ValueError(in_a_line(error)) from error
    return found
