"""SQL text -> `Query`, by the grammar of the official Spider / SParC / CoSQL evaluator, quirks included.

The official parser reads less than SQL and does so in its own way (commas in SELECT are optional, one alias map for the
whole text, text after a complete query is ignored, ...). Published exact-match figures contain these rules, so they
are kept; each is named where it happens. A query the official parser cannot read is None.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from mtsql.sql.schema import Schema

CLAUSES = frozenset("select from where group order limit intersect union except".split())
JOIN_WORDS = frozenset(("join", "on", "as"))
AGGREGATES = frozenset("none max min count sum avg".split())
ARITHMETIC = frozenset(("none", "-", "+", "*", "/"))
OPERATORS = frozenset("not between = > < >= <= != in like is exists".split())
SET_OPERATORS = ("intersect", "union", "except")
MAX_SELECTS = 100

Col = tuple[str, str]  # (table, column), lower-cased
ALL: Col = ("*", "*")


@dataclass(frozen=True)
class ColUnit:
    """A column, perhaps under an aggregate: agg "none" for a bare one."""

    agg: str
    col: Col
    distinct: bool


@dataclass(frozen=True)
class ValUnit:
    """One column expression, or two with an arithmetic sign between them (op "none": only the first)."""

    op: str
    left: ColUnit
    right: ColUnit | None = None


@dataclass(frozen=True)
class Cond:
    """negated? expression operator value [and value2]. A value is a Query, a ColUnit, a number, a string or None."""

    negated: bool
    op: str
    unit: ValUnit
    value: object
    value2: object = None


@dataclass(frozen=True)
class Query:
    """A parsed query. `where`, `having` and `on` are flat: conditions with their connectors ("and", "or") between."""

    select: tuple[tuple[str, ValUnit], ...]
    distinct: bool
    tables: tuple[object, ...]
    """Table names, and a Query for each sub-query in FROM, in order of mention."""
    on: tuple[object, ...] = ()
    where: tuple[object, ...] = ()
    group: tuple[ColUnit, ...] = ()
    having: tuple[object, ...] = ()
    order: tuple[ValUnit, ...] = ()
    direction: str | None = None
    limit: bool = False
    intersect: "Query | None" = None
    union: "Query | None" = None
    except_: "Query | None" = None

    def arms(self) -> dict[str, "Query | None"]:
        """The set-operator arms by name."""
        return {"intersect": self.intersect, "union": self.union, "except": self.except_}


class Unparseable(Exception):
    """The official grammar does not cover the text."""


_SPACED = re.compile(r"([()\[\]{}<>*;@#$%&!?\u2018\u2019\u201c\u201d\u00ab\u00bb\u2013\u2014]|`+|--|\.{2,})")
_COMMA = re.compile(r"([,:])(?!\d)")
_LAST_DOT = re.compile(r"(?<=[^.\s])\.(?=[\s\])}>\"']*$)")
_MID_DOT = re.compile(r"(?<=\d)\.(?=\s+(?:[A-Z)]))")
_CONTRACTION = re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b", re.IGNORECASE)


def tokenize(text: str) -> list[str]:
    """Tokens of the official evaluator, lower-cased but for string literals. Raises Unparseable for odd quotes."""
    text = text.replace("'", '"')
    parts = text.split('"')
    if len(parts) % 2 == 0:
        raise Unparseable("odd number of quotes")
    literals = {f"__val_{i}__": f'"{parts[i]}"' for i in range(1, len(parts), 2)}
    text = "".join(part if i % 2 == 0 else f"__val_{i}__" for i, part in enumerate(parts))
    text = _SPACED.sub(r" \1 ", _LAST_DOT.sub(" .", _MID_DOT.sub(" .", text)))
    text = _COMMA.sub(r" \1 ", text)
    text = _CONTRACTION.sub(lambda m: " ".join(g for g in m.groups() if g), text)
    tokens: list[str] = []
    for token in text.split():
        token = literals.get(token, token.lower())
        if token == "=" and tokens and tokens[-1] in ("!", ">", "<"):
            tokens[-1] += "="
        else:
            tokens.append(token)
    return tokens


@lru_cache(maxsize=65536)
def parse_sql(text: str, schema: Schema) -> Query | None:
    """The query, or None where the official parser fails. Never raises for any text."""
    try:
        tokens = tokenize(text)
        # SQLite itself refuses more arms; the bound keeps every later walk over the tree within Python's stack.
        return _Parser(tokens, schema).query(0)[1] if tokens.count("select") <= MAX_SELECTS else None
    except (Unparseable, RecursionError):
        return None


@lru_cache(maxsize=512)
def _columns_of(schema: Schema) -> dict[str, frozenset[str]]:
    return {t.name.lower(): frozenset(c.name.lower() for c in t.columns) for t in schema.tables}


class _Parser:
    """Recursive descent; every method takes a position and returns (next position, value)."""

    def __init__(self, tokens: list[str], schema: Schema):
        self.tokens, self.columns = tokens, _columns_of(schema)
        self.aliases: dict[str, str] = {}
        for i, token in enumerate(tokens):
            if token == "as":  # quirk: one map for the whole text, the last definition holds everywhere
                self.aliases[self.at(i + 1)] = self.at(i - 1) if i else _fail("as without a table")
        for name in self.columns:
            if name in self.aliases:
                _fail(f"alias {name} is a table name")
            self.aliases[name] = name

    def at(self, i: int) -> str:
        return self.tokens[i] if 0 <= i < len(self.tokens) else _fail("ended early")

    def peek(self, i: int) -> str:
        return self.tokens[i] if i < len(self.tokens) else ""

    def expect(self, i: int, token: str) -> int:
        return i + 1 if self.at(i) == token else _fail(f"expected {token}, found {self.at(i)}")

    def query(self, i: int) -> tuple[int, Query]:
        bracketed = self.peek(i) == "("
        i += bracketed
        start = next((j for j in range(i, len(self.tokens)) if self.tokens[j] == "from"), None)
        if start is None:  # FROM is read first, from the first `from` at or after the start (quirk: nesting unseen)
            _fail("no from")
        after_from, tables, on, scope = self.from_(start)
        _, distinct, select = self.select(i, scope)
        i, where = self.conditions_after("where", after_from, scope)
        i, group = self.group(i, scope)
        i, having = self.conditions_after("having", i, scope)
        i, order, direction = self.order(i, scope)
        limit = self.peek(i) == "limit"
        if limit:
            self.at(i + 1)
            i += 2
        i = self.skip_semicolons(i)
        if bracketed:
            i = self.skip_semicolons(self.expect(i, ")"))
        arms = {}
        if self.peek(i) in SET_OPERATORS:
            name = self.at(i)
            i, arm = self.query(i + 1)
            arms["except_" if name == "except" else name] = arm
        return i, Query(select, distinct, tables, on, where, group, having, order, direction, limit, **arms)

    def skip_semicolons(self, i: int) -> int:
        while self.peek(i) == ";":
            i += 1
        return i

    def select(self, i: int, scope: list[str]):
        i = self.expect(i, "select")
        distinct = self.peek(i) == "distinct"
        i += distinct
        items = []
        while i < len(self.tokens) and self.tokens[i] not in CLAUSES:
            agg = "none"
            if self.tokens[i] in AGGREGATES:
                agg = self.tokens[i]
                i += 1
            i, unit = self.val_unit(i, scope)
            items.append((agg, unit))
            i += self.peek(i) == ","  # quirk: commas are optional
        return i, distinct, tuple(items)

    def from_(self, i: int):
        i += 1
        tables, on, scope = [], [], []
        while i < len(self.tokens):
            bracketed = self.tokens[i] == "("
            i += bracketed
            if self.at(i) == "select":
                i, sub = self.query(i)
                tables.append(sub)
            else:
                i += self.at(i) == "join"
                name = self.aliases.get(self.at(i))
                if name not in self.columns:
                    _fail(f"no table {self.at(i)}")
                i += 1
                if self.peek(i) == "as":
                    i += 2
                tables.append(name)
                scope.append(name)
            if self.peek(i) == "on":
                i, conds = self.conditions(i + 1, scope)
                on += (["and"] if on else []) + list(conds)
            if bracketed:
                i = self.expect(i, ")")
            if self.peek(i) in CLAUSES or self.peek(i) in (")", ";"):
                break
        return i, tuple(tables), tuple(on), scope

    def conditions_after(self, word: str, i: int, scope: list[str]):
        return self.conditions(i + 1, scope) if self.peek(i) == word else (i, ())

    def group(self, i: int, scope: list[str]):
        if self.peek(i) != "group":
            return i, ()
        i = self.expect(i + 1, "by")
        units = []
        while i < len(self.tokens) and self.tokens[i] not in CLAUSES and self.tokens[i] not in (")", ";"):
            i, unit = self.col_unit(i, scope)
            units.append(unit)
            if self.peek(i) != ",":
                break
            i += 1
        return i, tuple(units)

    def order(self, i: int, scope: list[str]):
        if self.peek(i) != "order":
            return i, (), None
        i = self.expect(i + 1, "by")
        units, direction = [], "asc"
        while i < len(self.tokens) and self.tokens[i] not in CLAUSES and self.tokens[i] not in (")", ";"):
            i, unit = self.val_unit(i, scope)
            units.append(unit)
            if self.peek(i) in ("asc", "desc"):  # quirk: one direction for all, the last one written
                direction = self.tokens[i]
                i += 1
            if self.peek(i) != ",":
                break
            i += 1
        return i, tuple(units), direction

    def conditions(self, i: int, scope: list[str]):
        out = []
        while i < len(self.tokens):
            i, unit = self.val_unit(i, scope)
            negated = self.peek(i) == "not"
            i += negated
            op = self.at(i)
            if op not in OPERATORS:
                _fail(f"no operator at {op}")
            i, value = self.value(i + 1, scope)
            value2 = None
            if op == "between":
                i, value2 = self.value(self.expect(i, "and"), scope)
            out.append(Cond(negated, op, unit, value, value2))
            token = self.peek(i)
            if token in CLAUSES or token in JOIN_WORDS or token in (")", ";"):
                break
            if token in ("and", "or"):  # quirk: without a connector the next condition just stands beside
                out.append(token)
                i += 1
        return i, tuple(out)

    def value(self, i: int, scope: list[str]):
        bracketed = self.at(i) == "("
        i += bracketed
        token = self.at(i)
        if token == "select":
            i, value = self.query(i)
        elif '"' in token:
            i, value = i + 1, token
        else:
            try:
                i, value = i + 1, float(token)
            except ValueError:
                # quirk: a column value swallows everything up to , ) and, a clause or a join word
                end = i
                while end < len(self.tokens) and not (
                    self.tokens[end] in (",", ")", "and")
                    or self.tokens[end] in CLAUSES
                    or self.tokens[end] in JOIN_WORDS
                ):
                    end += 1
                cut, self.tokens = self.tokens, self.tokens[:end]
                try:
                    _, value = self.col_unit(i, scope)
                finally:
                    self.tokens = cut
                i = end
        if bracketed:
            i = self.expect(i, ")")
        return i, value

    def val_unit(self, i: int, scope: list[str]):
        bracketed = self.at(i) == "("
        i += bracketed
        i, left = self.col_unit(i, scope)
        op, right = "none", None
        if self.peek(i) in ARITHMETIC and i < len(self.tokens):
            op = self.tokens[i]
            i, right = self.col_unit(i + 1, scope)
        if bracketed:
            i = self.expect(i, ")")
        return i, ValUnit(op, left, right)

    def col_unit(self, i: int, scope: list[str]):
        bracketed = self.at(i) == "("
        i += bracketed
        if self.at(i) in AGGREGATES:
            agg = self.at(i)
            i = self.expect(i + 1, "(")
            distinct = self.at(i) == "distinct"
            i, col = self.column(i + distinct, scope)
            return self.expect(i, ")"), ColUnit(agg, col, distinct)  # quirk: an outer bracket is not closed here
        distinct = self.at(i) == "distinct"
        i, col = self.column(i + distinct, scope)
        if bracketed:
            i = self.expect(i, ")")
        return i, ColUnit("none", col, distinct)

    def column(self, i: int, scope: list[str]) -> tuple[int, Col]:
        token = self.at(i)
        if token == "*":
            return i + 1, ALL
        if "." in token:
            parts = token.split(".")
            table = self.aliases.get(parts[0])
            if len(parts) != 2 or table not in self.columns or parts[1] not in self.columns[table]:
                _fail(f"no column {token}")
            return i + 1, (table, parts[1])
        for table in scope:
            if token in self.columns[table]:
                return i + 1, (table, token)
        return _fail(f"no column {token}")


def _fail(why: str):
    raise Unparseable(why)
