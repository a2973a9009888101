"""Rewritings of FROM, of aliases and of sub-queries. rewritings.py has the others and the list."""

from mtsql.sql.reader import read_sql
from mtsql.sql.schema import fold
from mtsql.sql.statement import Edits, Select, Source, Span, Statement, replaced

AGGREGATES = frozenset("count sum avg min max total group_concat".split())
_COLUMN = 3  # tokens of a qualified column: t . a


def rename_aliases(statement: Statement) -> str | None:
    """Give every alias of a table another name."""
    sources = [source for source in _sources(statement) if source.alias]
    return _with_aliases(statement, sources) if sources else None


def add_aliases(statement: Statement) -> str | None:
    """Give an alias to the tables that have none, and qualify all columns."""
    aliases = [source.alias for source in _sources(statement) if source.alias]
    sources = [source for source in _sources(statement) if not source.alias]
    has_equal_aliases = len(set(aliases)) < len(aliases)
    if not sources or has_equal_aliases:
        # Of two equal aliases, one could hide the other from a column that is qualified now.
        return None
    return _with_aliases(statement, sources, qualifies_columns=True)


def _with_aliases(
    statement: Statement, sources: list[Source], qualifies_columns: bool = False
) -> str:
    """The text with new aliases for some sources; no other name in the text hides them."""
    names = _new_names(statement, sources)
    edits: Edits = {}
    for source, name in names.items():
        if source.alias_at is not None:
            edits[source.alias_at] = name
        else:
            last = source.span[1] - 1
            edits[last] = f"{statement.tokens[last].text} AS {name}"
    for at, target in statement.targets.items():
        if target is None:
            continue
        role = statement.roles[at]
        if role == "qualifier" and target in names:
            edits[at] = names[target]
        elif qualifies_columns and role == "column" and statement.word(at - 1) != ".":
            qualifier = names.get(target) or target.visible_name
            if qualifier:
                edits[at] = f"{qualifier}.{statement.tokens[at].text}"
    return statement.text(edits=edits)


def _new_names(statement: Statement, sources: list[Source]) -> dict[Source, str]:
    """A name of the form r1, r2, ... for each source, which the text and the schema do not use."""
    used = {token.name for token in statement.tokens}
    used |= {fold(table.name) for table in statement.schema.tables}
    names: dict[Source, str] = {}
    number = 0
    for source in sources:
        number += 1
        while f"r{number}" in used:
            number += 1
        names[source] = f"r{number}"
    return names


def reorder_joins(statement: Statement) -> str | None:
    """Write the tables of inner joins in another order, beginning with the last one."""
    edits: Edits = {}
    for select in statement.selects:
        sources = select.sources
        has_inner_joins = all(
            source.table and source.join in ("", "join", "inner join") for source in sources
        )
        # The order of the tables is the order of the columns that a star returns.
        has_star = any(statement.word(last - 1) == "*" for _, last in select.items)
        if len(sources) < 2 or not has_inner_joins or has_star:
            continue
        conditions = _join_conditions(statement, sources)
        if conditions is not None:
            text = _joined(statement, sources, conditions)
            edits |= replaced(select.clauses["from"], text)
    return statement.text(edits=edits) if edits else None


def _join_conditions(statement: Statement, sources: list[Source]) -> dict[Span, set[Source]] | None:
    """ON condition -> the sources that it names; None if one names anything else."""
    conditions: dict[Span, set[Source]] = {}
    for source in sources:
        if source.on is None:
            continue
        places = range(*source.on)
        named = {statement.targets[at] for at in places if at in statement.targets}
        has_sub_query = "select" in map(statement.word, places)
        if has_sub_query or not named <= set(sources):
            return None
        conditions[source.on] = {source for source in sources if source in named}
    return conditions


def _joined(
    statement: Statement, sources: list[Source], conditions: dict[Span, set[Source]]
) -> str:
    """FROM with the last source first, then always the last one that a condition connects.

    `a JOIN b ON a.x = b.x JOIN c ON b.y = c.y` becomes `c JOIN b ON b.y = c.y JOIN a ON a.x = b.x`.
    """
    placed = {sources[-1]}
    waiting = sources[:-1]
    unused = list(conditions)
    text = statement.text(sources[-1].span)
    while waiting:
        usable: dict[Source, list[Span]] = {}
        for source in waiting:
            usable[source] = [on for on in unused if conditions[on] <= {*placed, source}]
        connected = []
        for source in waiting:
            if any(source in conditions[on] for on in usable[source]):
                connected.append(source)
        source = (connected or waiting)[-1]
        text += f" JOIN {statement.text(source.span)}"
        terms = usable[source]
        if len(terms) == 1:
            text += f" ON {statement.text(terms[0])}"
        elif terms:
            text += f" ON {' AND '.join(statement.as_term(on) for on in terms)}"
        for on in terms:
            unused.remove(on)
        placed.add(source)
        waiting.remove(source)
    return text


def exists_for_in(statement: Statement) -> str | None:
    """Write `x IN (SELECT y ...)` as EXISTS in WHERE, where NULL and false have the same effect."""
    statement = _fully_qualified(statement)
    edits: Edits = {}
    for select in statement.outermost("where"):
        for term in statement.terms(select.clauses["where"]):
            text = _exists_text(statement, term.span)
            if text is not None:
                edits |= replaced(term.span, text)
    return statement.text(edits=edits) if edits else None


def _exists_text(statement: Statement, span: Span) -> str | None:
    """The EXISTS for one condition; None if it is not of the form below.

    t . x IN ( SELECT u . y FROM ... WHERE ... )
    |        | |                               |
    start    3 5                               end - 1
    """
    start, end = span
    x_end = start + _COLUMN
    if statement.column_end(start) != x_end or statement.word(x_end) != "in":
        return None
    if statement.word(x_end + 1) != "(" or statement.closing(x_end + 1) != end - 1:
        return None
    inner = statement.select_at(x_end + 2)
    if inner is None or inner.is_arm or inner.clauses.keys() - {"select", "from", "where"}:
        return None
    first, last = inner.items[0]
    if len(inner.items) > 1 or statement.column_end(first) != last:
        return None
    if statement.targets[first] not in inner.sources:
        return None  # y is a column of the outer query
    terms = []
    if "where" in inner.clauses:
        terms.append(statement.as_term(inner.clauses["where"]))
    terms.append(f"{statement.text((start, x_end))} = {statement.text((first, last))}")
    tables = statement.text(inner.clauses["from"])
    return f"EXISTS (SELECT 1 FROM {tables} WHERE {' AND '.join(terms)})"


def in_for_exists(statement: Statement) -> str | None:
    """Write `EXISTS (SELECT ... WHERE x = y AND ...)` as `x IN (SELECT y ...)` in WHERE."""
    statement = _fully_qualified(statement)
    edits: Edits = {}
    for select in statement.outermost("where"):
        for term in statement.terms(select.clauses["where"]):
            text = _in_text(statement, term.span)
            if text is not None:
                edits |= replaced(term.span, text)
    return statement.text(edits=edits) if edits else None


def _in_text(statement: Statement, span: Span) -> str | None:
    """The IN for one condition; None if it is not of the form below.

    EXISTS (SELECT ... FROM ... WHERE t.x = u.y AND ...), where t.x is the only column of the outer
    query.
    """
    start, end = span
    if statement.word(start) != "exists":
        return None
    inner = statement.select_at(start + 2)
    if inner is None or inner.is_arm or inner.clauses.keys() != {"select", "from", "where"}:
        return None
    if _has_aggregate(statement, inner) or statement.closing(start + 1) != end - 1:
        return None
    terms = statement.terms(inner.clauses["where"])
    links = [term.span for term in terms if _is_link(statement, term.span, inner)]
    if len(links) != 1 or any(term.connector == "or" for term in terms):
        return None
    link = links[0]
    x = (link[0], link[0] + _COLUMN)
    y = (x[1] + 1, link[1])
    if _outer_places(statement, inner) != {x[0], x[1] - 1}:
        return None
    others = [statement.text(term.span) for term in terms if term.span != link]
    text = f"{statement.text(x)} IN (SELECT {statement.text(y)}"
    text += f" FROM {statement.text(inner.clauses['from'])}"
    if others:
        text += f" WHERE {' AND '.join(others)}"
    return f"{text})"


def _outer_places(statement: Statement, inner: Select) -> set[int]:
    """The places in a sub-query of qualifiers and columns that belong to an outer query."""
    own = {source for select in _within(statement, inner) for source in select.sources}
    places = (at for at in range(inner.start, inner.end) if at in statement.targets)
    return {at for at in places if statement.targets[at] not in own}


def _is_link(statement: Statement, span: Span, inner: Select) -> bool:
    """Whether a condition is `t.x = u.y` with x of an outer query and y of the sub-query."""
    start, end = span
    x_end = start + _COLUMN
    y_start = x_end + 1
    if end != y_start + _COLUMN or statement.word(x_end) not in ("=", "=="):
        return False
    if statement.column_end(start) != x_end or statement.column_end(y_start) != end:
        return False
    left = statement.targets[start]
    right = statement.targets[y_start]
    return left not in inner.sources and right in inner.sources


def _has_aggregate(statement: Statement, select: Select) -> bool:
    """Whether SELECT has an aggregate, which returns a row even where there are no rows."""
    return any(statement.word(at) in AGGREGATES for at in range(*select.clauses["select"]))


def _sources(statement: Statement) -> list[Source]:
    return [source for select in statement.selects for source in select.sources]


def _fully_qualified(statement: Statement) -> Statement:
    """The statement with a new alias for each source, by which all columns are qualified."""
    text = _with_aliases(statement, _sources(statement), qualifies_columns=True)
    return read_sql(text, statement.schema)


def _within(statement: Statement, outer: Select) -> list[Select]:
    """A SELECT and those nested in it."""
    return [s for s in statement.selects if outer.start <= s.start and s.end <= outer.end]
