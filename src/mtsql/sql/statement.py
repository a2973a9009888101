"""A query as tokens, SELECTs, and the columns that its words name. reader.py builds it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mtsql.sql.schema import Schema, fold

Span = tuple[int, int]
"""Consecutive tokens: the place of the first one and the place behind the last one."""
Edits = dict[int, str]
"""Place of a token -> its new text. An empty text also removes the blanks before the token."""
Role = Literal["keyword", "function", "literal", "sign", "table", "alias", "column", "qualifier"]
"""What a token is. In `t.a`, `t` is a qualifier and `a` a column."""
TokenKind = Literal["string", "number", "word", "sign", "double", "quoted"]
"""How a token is written. double: in double quotes, so a name or a text. quoted: a name in other
quotes."""


class Unreadable(Exception):
    """The text contains something whose meaning is not known for sure."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token and the blanks before it."""

    text: str
    kind: TokenKind
    before: str

    @property
    def word(self) -> str:
        """A word in lower case, or a sign without blanks; empty for everything else."""
        if self.kind == "sign":
            return "".join(self.text.split())
        return fold(self.text) if self.kind == "word" else ""

    @property
    def name(self) -> str | None:
        """The name that the token writes, folded and without quotes; None if it can be no name."""
        if self.kind == "word":
            return fold(self.text)
        if self.kind not in ("double", "quoted"):
            return None
        close = self.text[-1]
        return fold(self.text[1:-1].replace(close * 2, close))


@dataclass(eq=False, slots=True)
class Source:
    """A table or a sub-query in FROM.

    join: the words that connect it to the source before it. span: its tokens, including the alias.
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
        """The name by which a column can be qualified."""
        return self.alias or self.table


@dataclass(eq=False, slots=True)
class Select:
    """One SELECT, without the SELECTs that UNION and similar words connect to it.

    outer: the SELECT whose columns this one can also name.
    is_arm: whether a set operator connects it to another one.
    clauses: name -> the tokens behind its first words. The names are `select`, `from`, `where`,
        `group`, `having`, `order` and `limit`.
    items: the tokens of each result.
    result_names: the names of results that are known.
    """

    start: int
    end: int
    outer: "Select | None"
    is_arm: bool
    clauses: dict[str, Span] = field(default_factory=dict)
    items: list[Span] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    result_names: list[str] = field(default_factory=list)


class Term(NamedTuple):
    """A condition, and the word that connects it to the one before it; empty for the first one."""

    connector: str
    span: Span


def replaced(span: Span, text: str) -> Edits:
    """The edits that put a text in the place of some tokens."""
    edits = dict.fromkeys(range(*span), "")
    edits[span[0]] = text
    return edits


@dataclass
class Statement:
    """Tokens with their roles.

        SELECT   T1         .     name    FROM     singer  AS       T1
        keyword  qualifier  sign  column  keyword  table   keyword  alias

    targets: place of a column or qualifier -> the source that it belongs to. It is None for the
    name of a result, such as one that ORDER BY repeats.
    """

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
        """The word or sign at a place; empty for other tokens and outside of the text."""
        return self.tokens[at].word if 0 <= at < len(self.tokens) else ""

    def closing(self, at: int) -> int:
        """The place of the bracket that closes the one at `at`."""
        depth = 0
        for place in range(at, len(self.tokens)):
            if self.word(place) == "(":
                depth += 1
            elif self.word(place) == ")":
                depth -= 1
            if depth == 0:
                return place
        raise Unreadable("an open bracket")

    def outside_brackets(self, span: Span) -> Iterator[int]:
        """The places of a span that are not inside brackets; an opening bracket is outside."""
        at = span[0]
        while at < span[1]:
            yield at
            at = self.closing(at) + 1 if self.word(at) == "(" else at + 1

    def terms(self, span: Span) -> list[Term]:
        """The conditions that AND and OR connect. The AND of a BETWEEN connects nothing."""
        found = []
        start = span[0]
        connector = ""
        is_between = False
        for at in self.outside_brackets(span):
            word = self.word(at)
            if word == "between":
                is_between = True
            elif word == "and" and is_between:
                is_between = False
            elif word in ("and", "or"):
                found.append(Term(connector, (start, at)))
                start = at + 1
                connector = word
        found.append(Term(connector, (start, span[1])))
        return found

    def as_term(self, span: Span) -> str:
        """The text of conditions so that AND can connect it: in brackets if it contains an OR."""
        text = self.text(span)
        has_or = any(term.connector == "or" for term in self.terms(span))
        return f"({text})" if has_or else text

    def column_end(self, at: int) -> int | None:
        """The place behind the column `a` or `t.a` that begins at `at`; None if none begins."""
        if at >= len(self.tokens):
            return None
        if self.roles[at] == "qualifier" and self.word(at + 2) != "*":
            return at + 3
        return at + 1 if self.roles[at] == "column" and self.targets[at] else None

    def select_at(self, at: int) -> Select | None:
        """The SELECT that begins at `at`."""
        return next((select for select in self.selects if select.start == at), None)

    def outermost(self, clause: str) -> Iterator[Select]:
        """The SELECTs with this clause that are not inside this clause of another SELECT."""
        covered_to = -1
        for select in sorted(self.selects, key=lambda select: select.start):
            if clause in select.clauses and select.start >= covered_to:
                covered_to = select.clauses[clause][1]
                yield select
