"""Text for the model that records which of its stretches are ours and which are data."""

from collections.abc import Iterable
from string import Formatter
from typing import Self


class PromptText(str):
    """A text with `parts`: pairs of a stretch and whether it is ours, in order.

        fill("Q: {question}", question="who?").parts == (("Q: ", True), ("who?", False))

    A tag that is ours (`<think>` in a sentence of prompts.py) becomes the token that the tokenizer
    has for it, as in the model's own chat template. Data (schema, questions, SQL, values) stays
    text, whatever it spells. A plain `str` is all data. Slices, `+`, f-strings and other string
    methods give a plain `str`: use `fill` and `join` to put texts together.
    """

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts: Iterable[tuple[str, bool]]) -> Self:
        parts = tuple(parts)
        text = super().__new__(cls, "".join(stretch for stretch, _ in parts))
        text.parts = parts
        return text

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[tuple[str, bool], ...]]]:
        return type(self), (self.parts,)  # for pickle and copy


def ours(text: str) -> PromptText:
    """A text that is all ours."""
    return PromptText([(text, True)])


def fill(template: str, **fields: str | int) -> PromptText:
    """`template.format(**fields)` as a `PromptText`: the words of the template are ours, and the
    fields are data unless they are a `PromptText` themselves. KeyError for a missing field."""
    parts: list[tuple[str, bool]] = []
    for words, name, _, _ in Formatter().parse(template):
        if words:
            parts.append((words, True))
        if name is not None:
            parts += _parts_of(fields[name])
    return PromptText(parts)


def join(separator: str, texts: Iterable[str]) -> PromptText:
    """The texts with `separator`, which is ours, between them."""
    parts: list[tuple[str, bool]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append((separator, True))
        parts += _parts_of(text)
    return PromptText(parts)


def _parts_of(text: str | int) -> Iterable[tuple[str, bool]]:
    return text.parts if isinstance(text, PromptText) else [(str(text), False)]
