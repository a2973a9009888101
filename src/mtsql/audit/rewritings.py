"""Other texts of a query that mean the same: a reward that judges meaning pays each like the query.

Each rewriting is conservative: it returns None where it does not apply or where its result would
not surely mean the same in SQLite. Row order may change where ORDER BY leaves it open, and with it
what LIMIT cuts off and what a bare column beside an aggregate shows; so try rewritings only on
queries whose rows do not depend on the order in which rows are stored.
"""

from collections.abc import Callable, Iterator

from mtsql.audit.reader import read_sql
from mtsql.audit.statement import Edits, Span, Statement, Unreadable, replaced
from mtsql.audit.structure import (
    add_aliases,
    exists_for_in,
    in_for_exists,
    rename_aliases,
    turn_joins,
)
from mtsql.sql.schema import Schema

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
"""What a comparison becomes when its sides change places."""


def rewritings_of(sql: str, schema: Schema) -> dict[str, str]:
    """Kind of rewriting -> text, for the kinds that apply; none for a query that is not understood.

    `schema` must be the one of the database file (`schema_from_sqlite`), because SQLite resolves
    names by it.
    """
    try:
        statement = read_sql(sql, schema)
    except Unreadable:
        return {}
    found = {}
    for kind, (rewrite, _) in REWRITINGS.items():
        try:
            text = rewrite(statement)
        except Unreadable:
            continue
        if text is not None and text != statement.text():
            found[kind] = text
    return found


def _bracket_terms(statement: Statement) -> str | None:
    """Brackets around each condition of each WHERE."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        for _, span in statement.terms(select.clauses["where"]):
            if statement.word(span[0]) != "(":
                edits |= replaced(span, f"({statement.text(span)})")
    return statement.text(edits=edits) if edits else None


def _bracket_where(statement: Statement) -> str | None:
    """Brackets around the whole of a WHERE that has several conditions."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        span = select.clauses["where"]
        if len(statement.terms(span)) > 1:
            edits |= replaced(span, f"({statement.text(span)})")
    return statement.text(edits=edits) if edits else None


def _quote_names(statement: Statement, opening: str, closing: str) -> str | None:
    """All names of tables, aliases and columns in quotes of one kind."""
    edits: Edits = {}
    for at, role in enumerate(statement.roles):
        if role not in ("table", "alias", "column", "qualifier"):
            continue
        text = statement.tokens[at].text
        if statement.tokens[at].kind != "word":
            text = text[1:-1].replace(text[-1] * 2, text[-1])
        if closing == "]" and "]" in text:
            return None
        edits[at] = f"{opening}{text.replace(closing, closing * 2)}{closing}"
    return statement.text(edits=edits)


def _in_for_equal(statement: Statement) -> str | None:
    """`a IN (1)` for `a = 1`."""
    edits: Edits = {}
    for start, operator, end in _comparisons(statement):
        if statement.word(operator) in ("=", "=="):
            column, value = statement.text((start, operator)), statement.text((operator + 1, end))
            edits |= replaced((start, end), f"{column} IN ({value})")
    return statement.text(edits=edits) if edits else None


def _swap_sides(statement: Statement) -> str | None:
    """`1 < a` for `a > 1`."""
    edits: Edits = {}
    for start, operator, end in _comparisons(statement):
        mirrored = MIRRORED[statement.word(operator)]
        column, value = statement.text((start, operator)), statement.text((operator + 1, end))
        edits |= replaced((start, end), f"{value} {mirrored} {column}")
    return statement.text(edits=edits) if edits else None


def _comparisons(statement: Statement) -> Iterator[tuple[int, int, int]]:
    """(start, place of the operator, end) of each condition that compares a column to a literal."""
    for select in statement.selects:
        for _, (start, end) in statement.terms(select.clauses.get("where", (0, 0))):
            operator = statement.column_end(start)
            is_comparison = operator and statement.word(operator) in MIRRORED
            if is_comparison and _is_literal(statement, (operator + 1, end)):
                yield start, operator, end


def _split_between(statement: Statement) -> str | None:
    """`a >= 1 AND a <= 2` for `a BETWEEN 1 AND 2`."""
    edits: Edits = {}
    for select in statement.selects:
        for _, (start, end) in statement.terms(select.clauses.get("where", (0, 0))):
            at = statement.column_end(start)
            if not at or statement.word(at) != "between":
                continue
            middle = next(i for i in range(at, end) if statement.word(i) == "and")
            low, high = (at + 1, middle), (middle + 1, end)
            if _is_literal(statement, low) and _is_literal(statement, high):
                column = statement.text((start, at))
                text = f"{column} >= {statement.text(low)} AND {column} <= {statement.text(high)}"
                edits |= replaced((start, end), text)
    return statement.text(edits=edits) if edits else None


def _change_case(statement: Statement, change: Callable[[str], str]) -> str:
    """All keywords and names of functions in one case."""
    roles = enumerate(statement.roles)
    places = [at for at, role in roles if role in ("keyword", "function")]
    return statement.text(edits={at: change(statement.tokens[at].text) for at in places})


def _turn_conditions(statement: Statement) -> str | None:
    """The conditions that AND connects in WHERE, the last one first."""
    edits: Edits = {}
    for select in statement.outermost("where"):
        groups: list[list[str]] = []
        for connector, span in statement.terms(select.clauses["where"]):
            if connector != "and":
                groups.append([])
            groups[-1].insert(0, statement.text(span))
        if max(map(len, groups)) > 1:
            text = " OR ".join(" AND ".join(group) for group in groups)
            edits |= replaced(select.clauses["where"], text)
    return statement.text(edits=edits) if edits else None


REWRITINGS: dict[str, tuple[Callable[[Statement], str | None], str]] = {
    "aliases renamed": (rename_aliases, "r1.name ... AS r1 for T1.name ... AS T1"),
    "aliases added": (add_aliases, "r1.name FROM t AS r1 for name FROM t"),
    "join order": (turn_joins, "b JOIN a ON .. for a JOIN b ON .."),
    "conditions in brackets": (_bracket_terms, "WHERE (a = 1) AND (b = 2)"),
    "WHERE in brackets": (_bracket_where, "WHERE (a = 1 AND b = 2)"),
    "EXISTS for IN": (exists_for_in, "EXISTS (SELECT 1 .. x = y) for x IN (SELECT y ..)"),
    "IN for EXISTS": (in_for_exists, "x IN (SELECT y ..) for EXISTS (SELECT .. x = y)"),
    'names in "quotes"': (lambda s: _quote_names(s, '"', '"'), 'SELECT "a" FROM "t"'),
    "names in `quotes`": (lambda s: _quote_names(s, "`", "`"), "SELECT `a` FROM `t`"),
    "names in [brackets]": (lambda s: _quote_names(s, "[", "]"), "SELECT [a] FROM [t]"),
    "IN for =": (_in_for_equal, "a IN (1) for a = 1"),
    "sides swapped": (_swap_sides, "1 < a for a > 1"),
    "BETWEEN split": (_split_between, "a >= 1 AND a <= 2 for a BETWEEN 1 AND 2"),
    "AND turned": (_turn_conditions, "b = 2 AND a = 1 for a = 1 AND b = 2"),
    "upper case": (lambda s: _change_case(s, str.upper), "SELECT, COUNT for select, count"),
    "lower case": (lambda s: _change_case(s, str.lower), "select, count for SELECT, COUNT"),
}
"""Kind -> (the rewriting, an example)."""


def _is_literal(statement: Statement, span: Span) -> bool:
    """Whether the tokens are one literal, perhaps a negative number."""
    first, end = span
    if statement.word(first) == "-":
        first += 1
    return end - first == 1 and statement.roles[first] == "literal"
