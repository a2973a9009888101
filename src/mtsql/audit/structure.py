"""Rewritings of FROM, of aliases and of sub-queries (rewritings.py has the rest and the list)."""

from mtsql.audit.reader import read_sql
from mtsql.audit.statement import Edits, Select, Source, Span, Statement, replaced
from mtsql.sql.schema import fold

AGGREGATES = frozenset("count sum avg min max total group_concat".split())


def rename_aliases(statement: Statement) -> str | None:
    """Every alias of a table gets another name."""
    sources = [source for source in _sources(statement) if source.alias]
    return _with_aliases(statement, sources) if sources else None


def add_aliases(statement: Statement) -> str | None:
    """Tables without an alias get one, and all their columns name it."""
    aliases = [source.alias for source in _sources(statement) if source.alias]
    sources = [source for source in _sources(statement) if not source.alias]
    if not sources or len(set(aliases)) < len(aliases):
        return None  # of two equal aliases one could hide the other from a column that names it now
    return _with_aliases(statement, sources, is_qualifying=True)


def _with_aliases(statement: Statement, sources: list[Source], is_qualifying: bool = False) -> str:
    """New names for some sources, which no other name hides."""
    taken = {token.name for token in statement.tokens}
    taken |= {fold(table.name) for table in statement.schema.tables}
    numbers = iter(range(1, 1000))
    names = {source: next(f"r{n}" for n in numbers if f"r{n}" not in taken) for source in sources}
    edits: Edits = {}
    for source, name in names.items():
        if source.alias_at is not None:
            edits[source.alias_at] = name
        else:
            last = source.span[1] - 1
            edits[last] = f"{statement.tokens[last].text} AS {name}"
    for at, source in statement.targets.items():
        name = names.get(source) or (source and source.visible_name)
        if statement.roles[at] == "qualifier" and source in names:
            edits[at] = name
        elif is_qualifying and statement.roles[at] == "column" and name:
            is_qualified = statement.word(at - 1) == "."
            if not is_qualified:
                edits[at] = f"{name}.{statement.tokens[at].text}"
    return statement.text(edits=edits)


def turn_joins(statement: Statement) -> str | None:
    """The tables of inner joins in another order, the last one first."""
    edits: Edits = {}
    for select in statement.selects:
        sources = select.sources
        is_plain = all(s.table and s.join in ("", "join", "inner join") for s in sources)
        has_star = any(statement.word(last - 1) == "*" for _, last in select.items)
        if len(sources) < 2 or not is_plain or has_star:
            continue
        conditions = _join_conditions(statement, sources)
        if conditions is not None:
            text = _joined(statement, sources, conditions)
            edits |= replaced(select.clauses["from"], text)
    return statement.text(edits=edits) if edits else None


def _join_conditions(statement: Statement, sources: list[Source]) -> dict[Span, set[Source]] | None:
    """The ON conditions with the sources that each names; None if one names anything else."""
    conditions = {}
    for source in sources:
        if source.on is None:
            continue
        named = {statement.targets[at] for at in range(*source.on) if at in statement.targets}
        if not named <= set(sources) or "select" in map(statement.word, range(*source.on)):
            return None
        conditions[source.on] = named
    return conditions


def _joined(
    statement: Statement, sources: list[Source], conditions: dict[Span, set[Source]]
) -> str:
    """FROM with the last source first; then, each time, the last one that a condition connects."""
    placed, waiting = {sources[-1]}, sources[:-1]
    open_conditions = list(conditions)
    text = statement.text(sources[-1].span)

    def known(source: Source) -> list[Span]:
        """Conditions whose sources are all there once this one is."""
        return [on for on in open_conditions if conditions[on] <= {*placed, source}]

    while waiting:
        linked = [s for s in waiting if any(s in conditions[on] for on in known(s))]
        source = (linked or waiting)[-1]
        terms = known(source)
        text += f" JOIN {statement.text(source.span)}"
        if terms:
            is_alone = len(terms) == 1
            texts = [statement.text(on) if is_alone else statement.as_term(on) for on in terms]
            text += f" ON {' AND '.join(texts)}"
        for on in terms:
            open_conditions.remove(on)
        placed.add(source)
        waiting.remove(source)
    return text


def exists_for_in(statement: Statement) -> str | None:
    """`x IN (SELECT y ...)` as EXISTS, where WHERE asks for it: there NULL and false are alike."""
    statement = _fully_named(statement)
    edits: Edits = {}
    for select in statement.outermost("where"):
        for _, (start, end) in statement.terms(select.clauses["where"]):
            is_in = statement.word(start + 3) == "in" and statement.word(start + 4) == "("
            if not (is_in and statement.column_end(start) == start + 3):
                continue
            if statement.closing(start + 4) != end - 1:
                continue
            inner = statement.select_at(start + 5)
            if inner is None or inner.is_arm or inner.clauses.keys() - {"select", "from", "where"}:
                continue
            first, last = inner.items[0]
            if len(inner.items) > 1 or statement.column_end(first) != last:
                continue
            if statement.targets[first] not in inner.sources:
                continue  # y of the outer query
            equal = f"{statement.text((start, start + 3))} = {statement.text((first, last))}"
            where = inner.clauses.get("where")
            terms = [statement.as_term(where)] if where else []
            condition = " AND ".join([*terms, equal])
            inside = f"SELECT 1 FROM {statement.text(inner.clauses['from'])} WHERE {condition}"
            edits |= replaced((start, end), f"EXISTS ({inside})")
    return statement.text(edits=edits) if edits else None


def in_for_exists(statement: Statement) -> str | None:
    """The way back: `EXISTS (SELECT ... WHERE x = y AND ...)` as `x IN (SELECT y ...)`."""
    statement = _fully_named(statement)
    edits: Edits = {}
    for select in statement.outermost("where"):
        for _, (start, end) in statement.terms(select.clauses["where"]):
            inner = statement.select_at(start + 2) if statement.word(start) == "exists" else None
            if inner is None or inner.is_arm or inner.clauses.keys() != {"select", "from", "where"}:
                continue
            if _has_aggregate(statement, inner) or statement.closing(start + 1) != end - 1:
                continue
            terms = statement.terms(inner.clauses["where"])
            links = [span for _, span in terms if _is_link(statement, span, inner)]
            if len(links) != 1 or any(word == "or" for word, _ in terms):
                continue
            inside = {at for at in range(inner.start, inner.end) if at in statement.targets}
            own = {source for s in _within(statement, inner) for source in s.sources}
            foreign = [at for at in inside if statement.targets[at] not in own]
            if set(foreign) != {links[0][0], links[0][0] + 2}:
                continue
            x, y = (statement.text((at, at + 3)) for at in (links[0][0], links[0][0] + 4))
            rest = " AND ".join(statement.text(span) for _, span in terms if span != links[0])
            text = f"{x} IN (SELECT {y} FROM {statement.text(inner.clauses['from'])}"
            text += f" WHERE {rest})" if rest else ")"
            edits |= replaced((start, end), text)
    return statement.text(edits=edits) if edits else None


def _is_link(statement: Statement, span: Span, inner: Select) -> bool:
    """Whether a condition is `x.a = y.b` with x outside and y inside of a sub-query."""
    start, end = span
    if end - start != 7 or statement.word(start + 3) not in ("=", "=="):
        return False
    if statement.column_end(start) != start + 3 or statement.column_end(start + 4) != end:
        return False
    left, right = statement.targets[start], statement.targets[start + 4]
    return left not in inner.sources and right in inner.sources


def _has_aggregate(statement: Statement, select: Select) -> bool:
    """Whether an aggregate makes a row of no rows."""
    return any(statement.word(at) in AGGREGATES for at in range(*select.clauses["select"]))


def _sources(statement: Statement) -> list[Source]:
    return [source for select in statement.selects for source in select.sources]


def _fully_named(statement: Statement) -> Statement:
    """The statement with an alias of its own for each source, which all its columns name."""
    text = _with_aliases(statement, _sources(statement), is_qualifying=True)
    return read_sql(text, statement.schema)


def _within(statement: Statement, outer: Select) -> list[Select]:
    """A SELECT and those nested in it."""
    return [s for s in statement.selects if outer.start <= s.start and s.end <= outer.end]
