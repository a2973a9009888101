"""A query as tokens, SELECTs, and the columns that words stand for. reader.py makes it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mtsql.sql.schema import Schema, fold

Span = tuple[int, int]
"""The tokens from a number up to another, which is not among them."""
Edits = dict[int, str]
"""Place of a token -> its new text. An empty text removes the blanks before the token too."""
Role = Literal["keyword", "function", "literal", "sign", "table", "alias", "column", "qualifier"]


class Unreadable(Exception):
    """The text has something in it whose meaning is not known for sure."""


@dataclass(frozen=True, slots=True)
class Token:
    """`before` are the blanks in front of it. `kind` is
    string, number, word, sign, double (in double quotes: a name or a text) or quoted (a name)."""

    text: str
    kind: str
    before: str

    @property
    def word(self) -> str:
        """The lower-cased text of a word or a sign without blanks; empty for everything else."""
        if self.kind == "sign":
            return "".join(self.text.split())
        return fold(self.text) if self.kind == "word" else ""

    @property
    def name(self) -> str | None:
        """The name that it writes, folded and without quotes, if it can be one."""
        if self.kind == "word":
            return fold(self.text)
        if self.kind not in ("double", "quoted"):
            return None
        close = self.text[-1]
        return fold(self.text[1:-1].replace(close * 2, close))


@dataclass(eq=False, slots=True)
class Source:
    """A table or a sub-query in FROM.

    join: the words that connect it to the one before. span: its tokens, the alias among them.
    table: None for a sub-query. on: the condition that follows it.
    """

    join: str
    span: Span
    table: str | None
    columns: tuple[str, ...]
    alias_at: int | None = None
    on: Span | None = None
    alias: str | None = None

    @property
    def visible_name(self) -> str | None:
        """What a column may be qualified with."""
        return self.alias or self.table


@dataclass(eq=False, slots=True)
class Select:
    """One SELECT without what UNION and its kind connect to it.

    outer: the SELECT whose columns it can also name. clauses: the tokens behind each clause's
    head, by `select`, `from`, `where`, `group`, `having`, `order`, `limit`.
    """

    start: int
    end: int
    outer: "Select | None"
    is_arm: bool
    clauses: dict[str, Span] = field(default_factory=dict)
    items: list[Span] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    result_names: list[str] = field(default_factory=list)


def replaced(span: Span, text: str) -> Edits:
    """The edits that put a text in the place of some tokens."""
    return {at: text if at == span[0] else "" for at in range(*span)}


@dataclass
class Statement:
    """Tokens with their roles. `targets`: the source that a column or qualifier belongs to; None
    for a result's own name, such as one that ORDER BY repeats."""

    schema: Schema
    tokens: list[Token]
    selects: list[Select] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    targets: dict[int, Source | None] = field(default_factory=dict)

    def text(self, span: Span | None = None, edits: Edits | None = None) -> str:
        """The text of some tokens (default: all), edited."""
        first, end = span or (0, len(self.tokens))
        edits = edits or {}
        parts = []
        for at in range(first, end):
            token = self.tokens[at]
            new = edits.get(at, token.text)
            if new:
                parts += [token.before, new]
        return "".join(parts).strip()

    def word(self, at: int) -> str:
        """The lower-cased word or sign at a place; empty beyond the end and for anything else."""
        return self.tokens[at].word if 0 <= at < len(self.tokens) else ""

    def closing(self, at: int) -> int:
        """The place of the bracket that closes the one at `at`."""
        depth = 0
        for place in range(at, len(self.tokens)):
            depth += {"(": 1, ")": -1}.get(self.word(place), 0)
            if not depth:
                return place
        raise Unreadable("an open bracket")

    def outside_brackets(self, span: Span) -> Iterator[int]:
        """The places in a span that are not inside a bracket; an opening bracket is outside."""
        at = span[0]
        while at < span[1]:
            yield at
            at = self.closing(at) + 1 if self.word(at) == "(" else at + 1

    def terms(self, span: Span) -> list[tuple[str, Span]]:
        """The conditions of a span that AND and OR connect, each with the word before it."""
        found, start, connector, is_between = [], span[0], "", False
        for at in self.outside_brackets(span):
            word = self.word(at)
            if word in ("and", "or") and not (word == "and" and is_between):
                found.append((connector, (start, at)))
                start, connector = at + 1, word
            is_between = word == "between" or (is_between and word != "and")
        return [*found, (connector, (start, span[1]))]

    def as_term(self, span: Span) -> str:
        """Conditions as they can stand between two ANDs: in brackets if OR connects them."""
        text = self.text(span)
        return f"({text})" if any(word == "or" for word, _ in self.terms(span)) else text

    def column_end(self, at: int) -> int | None:
        """The place behind the column that begins at `at`, `a` or `t.a`; None if none begins."""
        if at >= len(self.tokens):
            return None
        if self.roles[at] == "qualifier" and self.word(at + 2) != "*":
            return at + 3
        return at + 1 if self.roles[at] == "column" and self.targets[at] else None

    def select_at(self, at: int) -> Select | None:
        """The SELECT that begins at `at`."""
        return next((select for select in self.selects if select.start == at), None)

    def outermost(self, clause: str) -> Iterator[Select]:
        """The SELECTs with this clause that are not inside this clause of another one."""
        covered_to = -1
        for select in sorted(self.selects, key=lambda select: select.start):
            if clause in select.clauses and select.start >= covered_to:
                covered_to = select.clauses[clause][1]
                yield select
