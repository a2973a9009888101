"""Parse SQL by the grammar of the official Spider / SParC / CoSQL evaluator, quirks included.

The grammar covers less than SQL and differs from it. The whole text has one map of aliases, commas
in SELECT are optional, text after a complete query is ignored, and conditions have no brackets.
Published exact match figures depend on these rules, so each one is kept and named where it is
applied. A text outside the grammar gives None.
"""

from functools import lru_cache

from mtsql.judge.sql_query import (
    ALL_COLUMNS,
    SET_OPERATORS,
    ColumnName,
    ColumnUse,
    Condition,
    Conditions,
    Expression,
    OrderBy,
    Query,
    SelectItem,
    Value,
)
from mtsql.judge.sql_tokens import Unparseable, tokenize
from mtsql.sql.schema import Schema

MAX_DEPTH = 50
"""Limit of queries within queries. The official program recurses until its stack overflows."""
MAX_CACHED = 16384
"""Number of queries that a cache keeps. One takes a few kilobytes."""
MAX_CACHED_SCHEMAS = 1024

_CLAUSES = frozenset("select from where group order limit intersect union except".split())
_JOIN_WORDS = frozenset("join on as".split())
# Quirk: the official list of aggregates contains its own word for "no aggregate".
_AGGREGATES = frozenset("none max min count sum avg".split())
_SIGNS = frozenset("none - + * /".split())
_OPERATORS = frozenset("not between = > < >= <= != in like is exists".split())
_CLAUSE_END = _CLAUSES | frozenset((")", ";", ""))
_CONDITION_END = _CLAUSE_END | _JOIN_WORDS
_COLUMN_VALUE_END = _CLAUSES | _JOIN_WORDS | frozenset((")", ",", "and", ""))


def parse_sql(text: str, schema: Schema) -> Query | None:
    """Parse a query; None if the official parser cannot read it. Never raises.

    Results are cached.
    """
    return _parse(text, names_of(schema))


class Names:
    """A schema's columns by lower-case names. Compared by identity, so it is a cheap cache key."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.columns: dict[str, dict[str, ColumnName]] = {}
        for table in schema.tables:
            key = table.name.lower()
            columns = self.columns.setdefault(key, {})
            for column in table.columns:
                name = column.name.lower()
                columns[name] = ColumnName(key, name)


# The key is the schema's id, because hashing or comparing a whole Schema would cost more than
# parsing a query.
_names_by_id: dict[int, Names] = {}


def names_of(schema: Schema) -> Names:
    """The names of a schema; the same object each time, so that it can be part of a cache key."""
    names = _names_by_id.get(id(schema))
    if names is None:
        if len(_names_by_id) >= MAX_CACHED_SCHEMAS:
            _names_by_id.clear()
        # The entry keeps the schema alive, so no other schema can get the same id.
        names = Names(schema)
        _names_by_id[id(schema)] = names
    return names


@lru_cache(maxsize=MAX_CACHED)
def _parse(text: str, names: Names) -> Query | None:
    try:
        return _Parser(tokenize(text), names).query(0)
    except Unparseable:
        return None


class _Parser:
    """Reads one text by recursive descent; each method reads one rule of the grammar.

    `at` is the place of the next token, and an empty token marks the end. `scope` is the list of
    the tables that FROM has named so far in the query that is being read.
    """

    def __init__(self, tokens: list[str], names: Names) -> None:
        self.tokens = [*tokens, ""]
        self.columns = names.columns
        self.at = 0
        self.depth = 0
        # Quirk: the whole text has one map of aliases; of two definitions, the last one holds.
        self.aliases: dict[str, str] = {}
        for place, token in enumerate(self.tokens):
            if token == "as":
                self.aliases[self.tokens[place + 1]] = self.tokens[place - 1]
        if "" in self.aliases or not self.aliases.keys().isdisjoint(self.columns):
            raise Unparseable("an alias is missing, or is the name of a table")

    @property
    def next(self) -> str:
        """The next token, which stays the next one."""
        return self.tokens[self.at]

    def accept(self, word: str) -> bool:
        """Step over the word if it is next."""
        if self.next != word:
            return False
        self.at += 1
        return True

    def expect(self, word: str) -> None:
        """Step over the word, which must be next."""
        if not self.accept(word):
            raise Unparseable(f"{word} expected")

    def step(self) -> str:
        """Step over the next token, which must exist, and return it."""
        token = self.next
        self.at += 1
        if not token:
            raise Unparseable("unexpected end")
        return token

    def skip_semicolons(self) -> None:
        """Step over any number of semicolons."""
        while self.accept(";"):
            pass

    def query(self, start: int) -> Query:
        """Read a query. FROM is read before SELECT, whose columns need its tables.

        SELECT name FROM singer WHERE ...
        ^ select_at     ^ read first
        """
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparseable("nested too deeply")
        self.at = start
        has_bracket = self.accept("(")
        select_at = self.at
        if "from" not in self.tokens[start:]:
            raise Unparseable("no from")
        # Quirk: this is the next `from`, whichever query it belongs to.
        self.at = self.tokens.index("from", start) + 1
        tables, scope, on = self.from_clause()
        after_from = self.at
        self.at = select_at
        is_distinct, select = self.select_clause(scope)
        self.at = after_from
        where = self.conditions(scope) if self.accept("where") else ()
        group_by = self.group_by(scope) if self.accept("group") else ()
        having = self.conditions(scope) if self.accept("having") else ()
        order_by = self.order_by(scope) if self.accept("order") else None
        has_limit = self.accept("limit")
        if has_limit:
            self.step()  # any token: the number is not kept
        self.skip_semicolons()
        if has_bracket:
            self.expect(")")
        self.skip_semicolons()
        operator = self.next
        arms: dict[str, Query | None] = dict.fromkeys(SET_OPERATORS)
        if operator in SET_OPERATORS:
            arms[operator] = self.query(self.at + 1)
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
            intersect=arms["intersect"],
            union=arms["union"],
            except_=arms["except"],
        )

    def from_clause(self) -> tuple[tuple[str | Query, ...], list[str], Conditions]:
        """Read (tables, those of them that are no sub-queries, ON conditions).

        Quirk: the words JOIN and ON are optional.
        """
        tables: list[str | Query] = []
        scope: list[str] = []
        on: list[Condition | str] = []
        while self.next:
            has_bracket = self.accept("(")
            if self.next == "select":
                tables.append(self.query(self.at))
            else:
                self.accept("join")
                table = self.table()
                tables.append(table)
                scope.append(table)
                if self.accept("as"):
                    self.at += 1
            if self.accept("on"):
                if on:
                    on.append("and")
                on += self.conditions(scope)
            if has_bracket:
                self.expect(")")
            if self.next in _CLAUSE_END:
                break
        return tuple(tables), scope, tuple(on)

    def table(self) -> str:
        """Read the name or the alias of a table; return the name."""
        word = self.step()
        table = self.aliases.get(word, word)
        if table not in self.columns:
            raise Unparseable(f"no table {word}")
        return table

    def select_clause(self, scope: list[str]) -> tuple[bool, tuple[SelectItem, ...]]:
        """Read (whether it says DISTINCT, the items). Quirk: the commas are optional."""
        self.expect("select")
        is_distinct = self.accept("distinct")
        items = []
        while self.next and self.next not in _CLAUSES:
            aggregate = self.step() if self.next in _AGGREGATES else "none"
            items.append(SelectItem(aggregate, self.expression(scope)))
            self.accept(",")
        return is_distinct, tuple(items)

    def group_by(self, scope: list[str]) -> tuple[ColumnUse, ...]:
        """Read the columns of GROUP BY."""
        self.expect("by")
        columns = []
        while self.next not in _CLAUSE_END:
            columns.append(self.column_use(scope))
            if not self.accept(","):
                break
        return tuple(columns)

    def order_by(self, scope: list[str]) -> OrderBy:
        """Read the expressions of ORDER BY, and the last direction."""
        self.expect("by")
        expressions = []
        direction = "asc"
        while self.next not in _CLAUSE_END:
            expressions.append(self.expression(scope))
            if self.next in ("asc", "desc"):
                direction = self.step()
            if not self.accept(","):
                break
        return OrderBy(direction, tuple(expressions))

    def conditions(self, scope: list[str]) -> Conditions:
        """Read conditions and the connectors between them."""
        found: list[Condition | str] = []
        while self.next:
            found.append(self.condition(scope))
            if self.next in _CONDITION_END:
                break
            if self.next in ("and", "or"):
                found.append(self.step())
        return tuple(found)

    def condition(self, scope: list[str]) -> Condition:
        """Read one condition."""
        expression = self.expression(scope)
        is_negated = self.accept("not")
        operator = self.step()
        if operator not in _OPERATORS:
            raise Unparseable(f"no operator: {operator}")
        value = self.value(scope)
        high_value = None
        if operator == "between":
            self.expect("and")
            high_value = self.value(scope)
        return Condition(is_negated, operator, expression, value, high_value)

    def value(self, scope: list[str]) -> Value:
        """Read the right side of a condition, which may stand in brackets."""
        has_bracket = self.accept("(")
        value = self.bare_value(scope, has_bracket)
        if has_bracket:
            self.expect(")")
        return value

    def bare_value(self, scope: list[str], has_bracket: bool) -> Value:
        """Read a sub-query, a literal or a column."""
        token = self.next
        if token == "select":
            return self.query(self.at)
        if '"' in token:
            return self.step()
        number = _number(token)
        if number is not None:
            self.at += 1
            return number
        # Quirk: the official parser removes the bracket of a column and then cannot read the rest.
        if has_bracket or token in _AGGREGATES:
            raise Unparseable("a column in brackets as value")
        is_distinct = self.accept("distinct")
        if self.next in _COLUMN_VALUE_END:
            raise Unparseable("no value")
        column = self.column(scope)
        # Quirk: what follows the column is lost, up to the first token that can end a value.
        while self.next not in _COLUMN_VALUE_END:
            self.at += 1
        return ColumnUse("none", column, is_distinct)

    def expression(self, scope: list[str]) -> Expression:
        """Read one column, or two with a sign between them."""
        has_bracket = self.accept("(")
        left = self.column_use(scope)
        sign = "none"
        right = None
        if self.next in _SIGNS:
            sign = self.step()
            right = self.column_use(scope)
        if has_bracket:
            self.expect(")")
        return Expression(sign, left, right)

    def column_use(self, scope: list[str]) -> ColumnUse:
        """Read a column, possibly in an aggregate."""
        has_bracket = self.accept("(")
        is_call = self.next in _AGGREGATES
        aggregate = self.step() if is_call else "none"
        if is_call:
            self.expect("(")
        is_distinct = self.accept("distinct")
        use = ColumnUse(aggregate, self.column(scope), is_distinct)
        # Quirk: a call in brackets has two brackets to close, and only one is closed here.
        if is_call or has_bracket:
            self.expect(")")
        return use

    def column(self, scope: list[str]) -> ColumnName:
        """Read `*`, `name` or `table.name`.

        Quirk: `name` belongs to the first table in scope that has it; outer queries do not count.
        """
        token = self.step()
        if token == "*":
            return ALL_COLUMNS
        if "." in token:
            alias, _, name = token.partition(".")
            table = self.aliases.get(alias, alias)
            columns = self.columns.get(table, {})
            if name in columns and "." not in name:
                return columns[name]
        else:
            for table in scope:
                if token in self.columns[table]:
                    return self.columns[table][token]
        raise Unparseable(f"no column {token}")


def _number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None
