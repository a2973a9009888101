"""SQL text -> frozen Query, by the grammar of the official Spider / SParC / CoSQL evaluator, quirks included.

It reads less than SQL and reads it in its own way: one alias map for the whole text, commas in SELECT
optional, text after a complete query ignored, no brackets around conditions. Published exact match
figures contain these rules, so each is kept and named where it happens. Text outside the grammar is None.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from mtsql.sql.schema import Schema

MAX_DEPTH = 50  # queries within queries; the official program lasts until its stack overflows
MAX_CACHED = 16384  # queries kept by a cache; one takes a few kilobytes

_CLAUSES = frozenset("select from where group order limit intersect union except".split())
SET_OPERATORS = ("intersect", "union", "except")
_JOIN_WORDS = frozenset("join on as".split())
_AGGREGATES = frozenset(
    "none max min count sum avg".split()
)  # `none` by accident, as "no aggregate"
_SIGNS = frozenset("none - + * /".split())
_OPERATORS = frozenset("not between = > < >= <= != in like is exists".split())
_CLAUSE_END = _CLAUSES | frozenset((")", ";", ""))
_CONDITION_END = _CLAUSE_END | _JOIN_WORDS
_COLUMN_VALUE_END = _CLAUSES | _JOIN_WORDS | frozenset((")", ",", "and", ""))


@dataclass(frozen=True, slots=True)
class ColumnName:
    """A column with the real name of its table, both lower-cased; `*` is ALL_COLUMNS."""

    table: str
    name: str


ALL_COLUMNS = ColumnName("", "*")


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """`max(distinct a)`: a column, perhaps under an aggregate (else "none")."""

    aggregate: str
    column: ColumnName
    is_distinct: bool


@dataclass(frozen=True, slots=True)
class Expression:
    """`a` (sign "none", no right side) or `a - b`."""

    sign: str
    left: ColumnUse
    right: ColumnUse | None


@dataclass(frozen=True, slots=True)
class SelectItem:
    """SELECT takes the aggregate word itself; elsewhere it belongs to the ColumnUse."""

    aggregate: str
    expression: Expression


@dataclass(frozen=True, slots=True)
class Condition:
    """`a not between 1 and 2`. Values: a Query, a ColumnUse, a number, a text in double quotes, or
    None."""

    is_negated: bool
    operator: str
    expression: Expression
    value: "Value"
    high_value: "Value"


@dataclass(frozen=True, slots=True)
class OrderBy:
    direction: str  # quirk: one for all, the last one written
    expressions: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """`tables` and the condition lists keep the order of the text.

    A condition list holds conditions with their connectors ("and", "or") between them. Quirk: where
    the text leaves a connector out, two conditions stand side by side, and places lose their
    meaning.
    """

    is_distinct: bool
    select: tuple[SelectItem, ...]
    tables: "tuple[str | Query, ...]"
    on: "Conditions"
    where: "Conditions"
    group_by: tuple[ColumnUse, ...]
    having: "Conditions"
    order_by: OrderBy | None
    has_limit: bool
    intersect: "Query | None"
    union: "Query | None"
    except_: "Query | None"


Value = Query | ColumnUse | float | str | None
Conditions = tuple[Condition | str, ...]


def parse_sql(text: str, schema: Schema) -> Query | None:
    """The query, or None for text that the official parser cannot read. Never raises; results are
    cached."""
    return _parse(text, names_of(schema))


class Names:
    """A schema's columns by lower-cased names. Compared by identity, so that it is a cheap key for
    caches."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.columns: dict[str, dict[str, ColumnName]] = {}
        for table in schema.tables:
            key, names = table.name.lower(), [c.name.lower() for c in table.columns]
            self.columns.setdefault(key, {}).update({n: ColumnName(key, n) for n in names})


_names_by_id: dict[
    int, Names
] = {}  # hashing or comparing a whole Schema would cost more than parsing


def names_of(schema: Schema) -> Names:
    names = _names_by_id.get(id(schema))
    if names is None:  # the entry keeps the schema alive, so that its id stays its own
        if len(_names_by_id) >= 1024:
            _names_by_id.clear()
        names = _names_by_id[id(schema)] = Names(schema)
    return names


@lru_cache(maxsize=MAX_CACHED)
def _parse(text: str, names: Names) -> Query | None:
    try:
        return _Parser(tokenize(text), names).query(0)
    except _Unparseable:
        return None


class _Unparseable(Exception): ...  # the text is outside the official grammar


# The official tokenizer is made for English prose (NLTK). These are its rules for what is no word: brackets
# and most signs stand alone, `,` and `:` do unless a digit follows, a dot does at the end of a sentence.
_ALONE = r"()\[\]{}<>*;@#$%&!?«»“”„‘’‒–—―"
_TOKEN = re.compile(
    rf"""(?: [^\s{_ALONE},:.`-]
           | [,:](?=\d)
           | -(?!-)
           | \.(?! \. | [])}}>»”’\x20]*+\s*+$ | \s++[A-Z)] )
         )+
       | [{_ALONE},:] | `+ | -- | \.+""",
    re.VERBOSE,
)
_CONTRACTION = re.compile(
    r"(?i)\b(?:(can)(not)|(gim|lem)(me)|(gon)(na)|(got)(ta))\b|\b(wan)(na)(?=\s)"
)


def tokenize(text: str) -> list[str]:
    """Tokens as the official evaluator makes them: lower-cased, except for literals, which come in
    `"`.

    Quirks: `a=3` and `a >=3` are not split before the digit, `<>` is two tokens, quotes know no
    escape. Raises for an odd number of quotes; `parse_sql` turns that into None.
    """
    pieces = text.replace("'", '"').split('"')
    if len(pieces) % 2 == 0:
        raise _Unparseable("odd number of quotes")
    literals = {}
    for index in range(
        1, len(pieces), 2
    ):  # a literal that touches other text is lost in the word it becomes
        word = f"__val_{index}__"
        literals[word] = f'"{pieces[index]}"'
        pieces[index] = word
    text = "".join(pieces)
    text = _CONTRACTION.sub(lambda match: f" {' '.join(filter(None, match.groups()))} ", text)
    tokens: list[str] = []
    for word in _TOKEN.findall(text):
        if word == "=" and tokens and tokens[-1] in ("!", ">", "<"):
            tokens[-1] += "="
        else:
            tokens.append(literals.get(word) or word.lower())
    return tokens


class _Parser:
    """Recursive descent over tokens; `at` is the place of the next one. An empty token marks the
    end.

    `scope` is the list of tables that FROM has named so far in the query being read.
    """

    def __init__(self, tokens: list[str], names: Names) -> None:
        self.tokens = tokens
        self.columns = names.columns
        self.at = 0
        self.depth = 0
        tokens.append("")
        # Quirk: one map for the whole text; of two definitions the last one holds.
        self.aliases = {
            tokens[i + 1]: tokens[i - 1] for i, token in enumerate(tokens) if token == "as"
        }
        if "" in self.aliases or not self.aliases.keys().isdisjoint(self.columns):
            raise _Unparseable("an alias is missing, or is the name of a table")

    def accept(self, word: str) -> bool:
        """Step over the word if it is next."""
        if self.tokens[self.at] != word:
            return False
        self.at += 1
        return True

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise _Unparseable(f"{word} expected")

    def query(self, start: int) -> Query:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unparseable("nested too deeply")
        self.at = start
        has_bracket = self.accept("(")
        select_at = self.at
        if "from" not in self.tokens[start:]:
            raise _Unparseable("no from")
        self.at = (
            self.tokens.index("from", start) + 1
        )  # quirk: the next `from`, whatever query it belongs to
        tables, scope, on = self.from_clause()
        after_from, self.at = self.at, select_at
        is_distinct, select = self.select_clause(scope)
        self.at = after_from
        where = self.conditions(scope) if self.accept("where") else ()
        group_by = self.group_by(scope) if self.accept("group") else ()
        having = self.conditions(scope) if self.accept("having") else ()
        order_by = self.order_by(scope) if self.accept("order") else None
        has_limit = (
            self.accept("limit") and self.step() != ""
        )  # whatever it is: the number is not kept
        self.skip_semicolons()
        if has_bracket:
            self.expect(")")
        self.skip_semicolons()
        operator = self.tokens[self.at]
        arm = self.query(self.at + 1) if operator in SET_OPERATORS else None
        self.depth -= 1
        return Query(
            is_distinct,
            select,
            tables,
            on,
            where,
            group_by,
            having,
            order_by,
            has_limit,
            *(arm if operator == name else None for name in SET_OPERATORS),
        )

    def step(self) -> str:
        """The next token, which must exist."""
        token = self.tokens[self.at]
        self.at += 1
        if not token:
            raise _Unparseable("unexpected end")
        return token

    def skip_semicolons(self) -> None:
        while self.accept(";"):
            pass

    def from_clause(self) -> tuple[tuple[str | Query, ...], list[str], Conditions]:
        """(tables, those of them that are no sub-queries, conditions). Quirk: JOIN and ON are
        optional."""
        tables: list[str | Query] = []
        scope: list[str] = []
        on: list[Condition | str] = []
        while self.tokens[self.at]:
            has_bracket = self.accept("(")
            if self.tokens[self.at] == "select":
                tables.append(self.query(self.at))
            else:
                self.accept("join")
                name = self.step()
                table = self.aliases.get(name, name)
                if table not in self.columns:
                    raise _Unparseable(f"no table {name}")
                tables.append(table)
                scope.append(table)
                if self.accept("as"):
                    self.at += 1
            if self.accept("on"):
                on += [*(["and"] if on else []), *self.conditions(scope)]
            if has_bracket:
                self.expect(")")
            if self.tokens[self.at] in _CLAUSE_END:
                break
        return tuple(tables), scope, tuple(on)

    def select_clause(self, scope: list[str]) -> tuple[bool, tuple[SelectItem, ...]]:
        self.expect("select")
        is_distinct = self.accept("distinct")
        items = []
        while self.tokens[self.at] and self.tokens[self.at] not in _CLAUSES:
            aggregate = self.step() if self.tokens[self.at] in _AGGREGATES else "none"
            items.append(SelectItem(aggregate, self.expression(scope)))
            self.accept(",")  # quirk: commas are optional
        return is_distinct, tuple(items)

    def group_by(self, scope: list[str]) -> tuple[ColumnUse, ...]:
        self.expect("by")
        columns = []
        while self.tokens[self.at] not in _CLAUSE_END:
            columns.append(self.column_use(scope))
            if not self.accept(","):
                break
        return tuple(columns)

    def order_by(self, scope: list[str]) -> OrderBy:
        self.expect("by")
        expressions = []
        direction = "asc"
        while self.tokens[self.at] not in _CLAUSE_END:
            expressions.append(self.expression(scope))
            if self.tokens[self.at] in ("asc", "desc"):
                direction = self.step()
            if not self.accept(","):
                break
        return OrderBy(direction, tuple(expressions))

    def conditions(self, scope: list[str]) -> Conditions:
        found: list[Condition | str] = []
        while self.tokens[self.at] != "":
            expression = self.expression(scope)
            is_negated = self.accept("not")
            operator = self.step()
            if operator not in _OPERATORS:
                raise _Unparseable(f"no operator: {operator}")
            value, high_value = self.value(scope), None
            if operator == "between":
                self.expect("and")
                high_value = self.value(scope)
            found.append(Condition(is_negated, operator, expression, value, high_value))
            if self.tokens[self.at] in _CONDITION_END:
                break
            if self.tokens[self.at] in ("and", "or"):
                found.append(self.step())
        return tuple(found)

    def value(self, scope: list[str]) -> Value:
        has_bracket = self.accept("(")
        token = self.tokens[self.at]
        if token == "select":
            value = self.query(self.at)
        elif '"' in token:
            value = self.step()
        elif (value := _number(token)) is not None:
            self.at += 1
        elif has_bracket or token in _AGGREGATES:
            raise _Unparseable(
                "a column in brackets as value"
            )  # quirk: its bracket is cut off, see below
        else:
            # Quirk: a column takes all that follows up to one of these, and what is not the column is lost.
            is_distinct = self.accept("distinct")
            if self.tokens[self.at] in _COLUMN_VALUE_END:
                raise _Unparseable("no value")
            value = ColumnUse("none", self.column(scope), is_distinct)
            while self.tokens[self.at] not in _COLUMN_VALUE_END:
                self.at += 1
        if has_bracket:
            self.expect(")")
        return value

    def expression(self, scope: list[str]) -> Expression:
        has_bracket = self.accept("(")
        left, sign, right = self.column_use(scope), "none", None
        if self.tokens[self.at] in _SIGNS:
            sign = self.step()
            right = self.column_use(scope)
        if has_bracket:
            self.expect(")")
        return Expression(sign, left, right)

    def column_use(self, scope: list[str]) -> ColumnUse:
        has_bracket = self.accept("(")
        is_call = self.tokens[self.at] in _AGGREGATES
        aggregate = self.step() if is_call else "none"
        if is_call:
            self.expect("(")
        is_distinct = self.accept("distinct")
        use = ColumnUse(aggregate, self.column(scope), is_distinct)
        if is_call or has_bracket:  # quirk: of two brackets around a call, only one is closed here
            self.expect(")")
        return use

    def column(self, scope: list[str]) -> ColumnName:
        token = self.step()
        if token == "*":
            return ALL_COLUMNS
        if "." in token:
            alias, _, name = token.partition(".")
            columns = self.columns.get(self.aliases.get(alias, alias), {})
            if name in columns and "." not in name:
                return columns[name]
        else:
            for table in scope:  # quirk: the first that has it; outer queries are not looked at
                if token in self.columns[table]:
                    return self.columns[table][token]
        raise _Unparseable(f"no column {token}")


def _number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None
