"""Recipes: YAML files, read strictly, which may inherit from each other.

base: base/rl.yaml       # a path relative to this file
env: {max_replies: 6}    # wins over the base's env.max_replies; its other keys stay
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtsql.files import read_text

MAX_MESSAGE = 400
"""Maximum length of the parser's errors, which list every type that a value could have had."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases and without repeated keys.

    A few lines of aliases can stand for more values than fit into memory, or for a list that holds
    itself. If a key is repeated, its first value would be lost.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None,
                None,
                f"the alias *{event.anchor} is not read: write the value",
                event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for place, key in enumerate(keys):
            if key.value in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> dict:
    """The content of a recipe. ValueError, in a line that names the file, if it cannot be read."""
    text = read_text(path, "recipe")
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = in_a_line(error).replace(' in "<unicode string>",', ":")
        raise ValueError(f"recipe {path}: {reason}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"recipe {path}: expected keys with values, found {values!r:.80}")
    return values or {}


Implied = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From the values of a recipe (by dotted key) to the values that they imply."""
BASE = "base"
"""The key that names the recipe from which a recipe inherits."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything that it inherits."""

    values: dict[str, Any]
    """Nested values. They have no dotted keys if the recipe inherits anything."""
    files: dict[str, dict[str, Any]]
    """Name of a file -> what stands in it, except for `base`: the recipe first, its last base at
    the end."""
    places: dict[str, str]
    """Dotted key -> the file that sets it."""
    is_one_file: bool
    """Whether the values are those of a single file as they stand there."""


def read_recipe(path: Path | str, implied: Implied | None = None) -> Recipe:
    """A recipe and its bases. A key of a recipe wins over the same key of its base; sections are
    merged key by key, and any other value, a list included, is replaced.

    `implied` gives further values of each file from the file's own. ValueError, in a line that
    names the files, for a base that is missing, that is no path, or that leads back to a recipe
    which inherits from it.
    """
    files: dict[str, dict[str, Any]] = {}
    chain: list[Path] = []
    file = Path(path)
    name = str(path)
    while True:
        if file.resolve() in chain:
            circle = " -> ".join([*files, name])
            raise ValueError(f"recipe {path}: its bases form a circle: {circle}")
        chain.append(file.resolve())
        values = read_yaml(name)
        if not values:
            raise ValueError(f"recipe {name}: it has no keys")
        files[name] = {key: value for key, value in values.items() if key != BASE}
        if BASE not in values:
            break
        base = values[BASE]
        if not isinstance(base, str) or not base:
            raise ValueError(f"recipe {name}: base is {base!r}: expected the path of a recipe")
        file = Path(os.path.normpath(file.parent / base))
        if not file.is_file():
            raise ValueError(f"recipe {name}: its base {base} is not there: no file {file}")
        name = str(file)
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, values in reversed(files.items()):
        own = nested(values)
        keys = flattened(own)
        further = implied(keys) if implied else {}
        for key in [*keys, *further]:
            places = {k: f for k, f in places.items() if not k.startswith(f"{key}.")}
            places[key] = name
        merged = merge(merge(merged, nested(further)), own)
    is_one_file = len(files) == 1 and not further
    return Recipe(values if is_one_file else merged, files, places, is_one_file)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a section for each part of a dotted key: `a.b: 1` becomes `a: {b: 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(str(key).split(".")):
            value = {part: nested(value) if isinstance(value, dict) else value}
        out = merge(out, value)
    return out


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section. Where both have a value that is no section, that of `own` wins."""
    out = dict(base)
    for key, value in own.items():
        before = out.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        out[key] = merge(before, value) if both and before is not None else value
    return out


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one with dotted keys. An empty section stays as it is."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= flattened(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def in_a_line(error: Exception) -> str:
    """The text of an error in one line, shortened."""
    return " ".join(str(error).split())[:MAX_MESSAGE]
