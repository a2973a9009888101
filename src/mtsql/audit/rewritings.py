"""Other texts of a query that mean the same: a reward that judges meaning pays each of them.

Each rewriting is conservative: it returns None where it does not apply, and where its result might
not mean the same in SQLite. The order of rows may change where ORDER BY leaves it open, and with it
the rows that LIMIT keeps and the value of a bare column beside an aggregate. So try rewritings only
on queries whose rows do not depend on the order in which rows are stored.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtsql.audit.structure import (
    add_aliases,
    exists_for_in,
    in_for_exists,
    rename_aliases,
    reorder_joins,
)
from mtsql.sql.reader import read_sql
from mtsql.sql.schema import Schema
from mtsql.sql.statement import Edits, Span, Statement, Unreadable, replaced

MIRRORED = {
    "=": "=",
    "==": "==",
    "!=": "!=",
    "<>": "<>",
    "<": ">",
    ">": "<",
    "<=": ">=",
    ">=": "<=",
}
"""Comparison -> the comparison with its sides exchanged."""


class Kind(NamedTuple):
    """A kind of rewriting. `rewrite` returns the new text, or None where it does not apply."""

    rewrite: Callable[[Statement], str | None]
    example: str


def rewritings_of(sql: str, schema: Schema) -> dict[str, str]:
    """Kind of rewriting -> text, for the kinds that apply; none for a query that cannot be read.

    `schema` must be the one of the database file (`schema_from_sqlite`), because SQLite resolves
    names by it.
    """
    try:
        statement = read_sql(sql, schema)
    except Unreadable:
        return {}
    found = {}
    for name, kind in REWRITINGS.items():
        try:
            text = kind.rewrite(statement)
        except Unreadable:
            continue
        if text is not None and text != statement.text():
            found[name] = text
    return found


def _bracket_terms(statement: Statement) -> str | None:
    """Put each condition of each WHERE in brackets."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        for term in statement.terms(select.clauses["where"]):
            if statement.word(term.span[0]) != "(":
                edits |= replaced(term.span, f"({statement.text(term.span)})")
    return statement.text(edits=edits) if edits else None


def _bracket_where(statement: Statement) -> str | None:
    """Put the whole of a WHERE with several conditions in brackets."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        span = select.clauses["where"]
        if len(statement.terms(span)) > 1:
            edits |= replaced(span, f"({statement.text(span)})")
    return statement.text(edits=edits) if edits else None


def _quote_names(statement: Statement, opening: str, closing: str) -> str | None:
    """Put all names of tables, aliases and columns in quotes of one kind."""
    edits: Edits = {}
    for at, role in enumerate(statement.roles):
        if role not in ("table", "alias", "column", "qualifier"):
            continue
        name = statement.tokens[at].text
        if statement.tokens[at].kind != "word":
            name = name[1:-1].replace(name[-1] * 2, name[-1])
        if closing == "]" and "]" in name:
            return None
        edits[at] = f"{opening}{name.replace(closing, closing * 2)}{closing}"
    return statement.text(edits=edits)


def _double_quotes(statement: Statement) -> str | None:
    return _quote_names(statement, '"', '"')


def _backquotes(statement: Statement) -> str | None:
    return _quote_names(statement, "`", "`")


def _square_brackets(statement: Statement) -> str | None:
    return _quote_names(statement, "[", "]")


class _Comparison(NamedTuple):
    """A condition that compares a column to a literal, as the text of its parts."""

    span: Span
    column: str
    operator: str
    value: str


def _comparisons(statement: Statement) -> Iterator[_Comparison]:
    """The comparisons in each WHERE."""
    for span in _where_terms(statement):
        start, end = span
        at = statement.column_end(start)
        if not at or statement.word(at) not in MIRRORED:
            continue
        if _is_literal(statement, (at + 1, end)):
            column = statement.text((start, at))
            value = statement.text((at + 1, end))
            yield _Comparison(span, column, statement.word(at), value)


def _in_for_equal(statement: Statement) -> str | None:
    """Write `a IN (1)` for `a = 1`."""
    edits: Edits = {}
    for span, column, operator, value in _comparisons(statement):
        if operator in ("=", "=="):
            edits |= replaced(span, f"{column} IN ({value})")
    return statement.text(edits=edits) if edits else None


def _swap_sides(statement: Statement) -> str | None:
    """Write `1 < a` for `a > 1`."""
    edits: Edits = {}
    for span, column, operator, value in _comparisons(statement):
        edits |= replaced(span, f"{value} {MIRRORED[operator]} {column}")
    return statement.text(edits=edits) if edits else None


def _split_between(statement: Statement) -> str | None:
    """Write `a >= 1 AND a <= 2` for `a BETWEEN 1 AND 2`."""
    edits: Edits = {}
    for span in _where_terms(statement):
        start, end = span
        at = statement.column_end(start)
        if not at or statement.word(at) != "between":
            continue
        middle = next(i for i in range(at, end) if statement.word(i) == "and")
        low = (at + 1, middle)
        high = (middle + 1, end)
        if _is_literal(statement, low) and _is_literal(statement, high):
            column = statement.text((start, at))
            text = f"{column} >= {statement.text(low)} AND {column} <= {statement.text(high)}"
            edits |= replaced(span, text)
    return statement.text(edits=edits) if edits else None


def _where_terms(statement: Statement) -> Iterator[Span]:
    """The conditions in each WHERE."""
    for select in statement.selects:
        for term in statement.terms(select.clauses.get("where", (0, 0))):
            yield term.span


def _change_case(statement: Statement, change: Callable[[str], str]) -> str:
    """Write all keywords and names of functions in one case."""
    edits: Edits = {}
    for at, role in enumerate(statement.roles):
        if role in ("keyword", "function"):
            edits[at] = change(statement.tokens[at].text)
    return statement.text(edits=edits)


def _upper_case(statement: Statement) -> str:
    return _change_case(statement, str.upper)


def _lower_case(statement: Statement) -> str:
    return _change_case(statement, str.lower)


def _reorder_conditions(statement: Statement) -> str | None:
    """Write the conditions that AND connects in WHERE in the opposite order."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        groups: list[list[str]] = []  # OR connects the groups, AND the conditions of a group
        for connector, span in statement.terms(select.clauses["where"]):
            if connector != "and":
                groups.append([])
            groups[-1].insert(0, statement.text(span))
        if max(map(len, groups)) > 1:
            text = " OR ".join(" AND ".join(group) for group in groups)
            edits |= replaced(select.clauses["where"], text)
    return statement.text(edits=edits) if edits else None


def _is_literal(statement: Statement, span: Span) -> bool:
    """Whether the tokens are one literal, which may be a negative number."""
    first, end = span
    if statement.word(first) == "-":
        first += 1
    return end - first == 1 and statement.roles[first] == "literal"


REWRITINGS = {
    "aliases renamed": Kind(rename_aliases, "r1.name ... AS r1 for T1.name ... AS T1"),
    "aliases added": Kind(add_aliases, "r1.name FROM t AS r1 for name FROM t"),
    "join order": Kind(reorder_joins, "b JOIN a ON .. for a JOIN b ON .."),
    "conditions in brackets": Kind(_bracket_terms, "WHERE (a = 1) AND (b = 2)"),
    "WHERE in brackets": Kind(_bracket_where, "WHERE (a = 1 AND b = 2)"),
    "EXISTS for IN": Kind(exists_for_in, "EXISTS (SELECT 1 .. x = y) for x IN (SELECT y ..)"),
    "IN for EXISTS": Kind(in_for_exists, "x IN (SELECT y ..) for EXISTS (SELECT .. x = y)"),
    'names in "quotes"': Kind(_double_quotes, 'SELECT "a" FROM "t"'),
    "names in `quotes`": Kind(_backquotes, "SELECT `a` FROM `t`"),
    "names in [brackets]": Kind(_square_brackets, "SELECT [a] FROM [t]"),
    "IN for =": Kind(_in_for_equal, "a IN (1) for a = 1"),
    "sides swapped": Kind(_swap_sides, "1 < a for a > 1"),
    "BETWEEN split": Kind(_split_between, "a >= 1 AND a <= 2 for a BETWEEN 1 AND 2"),
    "AND reordered": Kind(_reorder_conditions, "b = 2 AND a = 1 for a = 1 AND b = 2"),
    "upper case": Kind(_upper_case, "SELECT, COUNT for select, count"),
    "lower case": Kind(_lower_case, "select, count for SELECT, COUNT"),
}
"""Name of the kind -> the rewriting and an example."""
