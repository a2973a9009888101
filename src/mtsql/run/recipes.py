"""Recipes: YAML files, read strictly."""

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


def in_a_line(error: Exception) -> str:
    """The text of an error in one line, shortened."""
    return " ".join(str(error).split())[:MAX_MESSAGE]
