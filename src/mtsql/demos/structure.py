"""First tries with a wrong column, join or aggregate. Most fail with an error that names the fault.

A name that SQL must quote is never written in place of another one: SQLite would read it, if it
names no column, as a text.
"""

import re
from collections.abc import Iterator

from mtsql.demos.scene import FirstTry, Scene, cased, column_start, plain_sources, source_text
from mtsql.sql.schema import Table, fold, quoted
from mtsql.sql.statement import Select, Source, Span, Statement

NO_COLUMN = "no such column"
MAX_COLUMNS = 8
"""Columns of other tables that are tried in place of one."""
_PARTS = re.compile(r"[a-z]+", re.IGNORECASE)


def wrong_columns(scene: Scene) -> Iterator[FirstTry]:
    """Tries in which a column is looked for in the wrong table."""
    statement = scene.statement
    if statement is None:
        return
    kinds = [_other_alias, _without_alias, _other_table, _other_column]
    for kind in scene.choices(kinds):
        yield from kind(statement, scene)


def _columns(statement: Statement) -> Iterator[tuple[int, Source]]:
    """The places of the names of columns, each with its source, which is a table."""
    for at, source in statement.targets.items():
        if source is not None and source.table and statement.roles[at] == "column":
            yield at, source


def _other_alias(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """`T2.age` for `T1.age`."""
    for at, source in scene.choices(list(_columns(statement))):
        start = column_start(statement, at)
        name = statement.tokens[at].text
        for other in scene.choices(_sources_beside(statement, source)):
            alias = _alias(statement, other)
            if start == at or other.table is None or fold(name) in other.columns:
                continue
            there, here = source_text(statement, other), source_text(statement, source)
            thoughts = [
                f"{alias} is {there}, which has no column {name}: it is in {here}.",
                f"There is no {alias}.{name}: {name} is a column of {here}.",
                f"{name} belongs to {here} and not to {there}.",
            ]
            yield FirstTry(
                statement.text(edits={start: alias}),
                "error",
                scene.rng.choice(thoughts),
                f"{NO_COLUMN}: {alias}.{name}",
            )


def _without_alias(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """`name` for `T1.name`, where two tables have a column of that name."""
    for at, source in scene.choices(list(_columns(statement))):
        start = column_start(statement, at)
        name = statement.tokens[at].text
        others = [one for one in _sources_beside(statement, source) if one.table != source.table]
        both = [other for other in others if other.table and fold(name) in other.columns]
        if start == at or not both:
            continue
        right = statement.text((start, at + 1))
        here, there = source_text(statement, source), source_text(statement, both[0])
        thoughts = [
            f"{name} is a column of {here} and of {there}: write {right}.",
            f"{name} is ambiguous, because {here} and {there} have it. Here it is {right}.",
        ]
        yield FirstTry(
            statement.text(edits={start: name, start + 1: "", at: ""}),
            "error",
            scene.rng.choice(thoughts),
            f"ambiguous column name: {name}",
        )


def _other_table(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """`SELECT age FROM concert` for `SELECT age FROM singer`, where a foreign key links the two."""
    places = [(at, source) for at, source in _columns(statement)]
    lone = [s for s in statement.selects if len(s.sources) == 1 and s.sources[0].table]
    for select in scene.choices(lone):
        source = select.sources[0]
        names = [at for at, target in places if target is source]
        for table in scene.choices(_linked_tables(source, scene)):
            columns = {fold(column.name) for column in table.columns}
            missing = [at for at in names if fold(statement.tokens[at].text) not in columns]
            if not missing or quoted(table.name) != table.name:
                continue
            here = source_text(statement, source)
            wrong = statement.text(edits={source.span[0]: table.name})
            for at in missing:
                name = statement.tokens[at].text
                written = statement.text((column_start(statement, at), at + 1))
                thoughts = [
                    f"{table.name} has no column {name}: it is a column of {here}.",
                    f"{name} is a column of {here} and not of {table.name}.",
                ]
                evidence = f"{NO_COLUMN}: {written}"
                yield FirstTry(wrong, "error", scene.rng.choice(thoughts), evidence)


def _linked_tables(source: Source, scene: Scene) -> list[Table]:
    """The tables that a foreign key links to a source, in the order of the schema."""
    linked = set()
    for (table, _), (other, _) in scene.database.schema.foreign_keys:
        pair = {fold(table), fold(other)}
        linked |= pair if source.table in pair else set()
    names = linked - {source.table}
    return [table for table in scene.schema.tables if fold(table.name) in names]


def _other_column(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """`dept_name` for `name`: a column of another table that has a word in common."""
    for at, source in scene.choices(list(_columns(statement))):
        name = statement.tokens[at].text
        tables = [table for table in scene.schema.tables if fold(table.name) != source.table]
        similar = [
            column.name
            for table in tables
            for column in table.columns
            if _words(name) & _words(column.name)
            and fold(column.name) not in source.columns
            and quoted(column.name) == column.name
        ]
        here = source_text(statement, source)
        for other in list(scene.choices(sorted(set(similar))))[:MAX_COLUMNS]:
            start = column_start(statement, at)
            prefix = f"{statement.tokens[start].text}." if start < at else ""
            thoughts = [
                f"{here} has no column {other}: the schema calls it {name}.",
                f"{here} has {name} and no {other}.",
            ]
            evidence = f"{NO_COLUMN}: {prefix}{other}"
            wrong = statement.text(edits={at: other})
            yield FirstTry(wrong, "error", scene.rng.choice(thoughts), evidence)


def _words(name: str) -> set[str]:
    return {part for part in _PARTS.findall(name.lower()) if len(part) > 2}


def _select_of(statement: Statement, source: Source) -> Select:
    return next(select for select in statement.selects if source in select.sources)


def _sources_beside(statement: Statement, source: Source) -> list[Source]:
    """The other sources of the SELECT that a source belongs to."""
    return [other for other in _select_of(statement, source).sources if other is not source]


def _alias(statement: Statement, source: Source) -> str:
    """The name by which columns of a source are qualified, as the query writes it."""
    at = source.span[0] if source.alias_at is None else source.alias_at
    return statement.tokens[at].text


def wrong_joins(scene: Scene) -> Iterator[FirstTry]:
    """Tries without one of the tables, or with a join on another column."""
    statement = scene.statement
    if statement is None:
        return
    for kind in scene.choices([_left_out, _other_key]):
        yield from kind(statement, scene)


def _left_out(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """FROM without its last table, whose columns are still used."""
    joined = [s for s in statement.selects if len(s.sources) > 1]
    for select in scene.choices(joined):
        last = select.sources[-1]
        if not plain_sources(statement, select.sources) or last.on is None:
            continue
        alias, table = _alias(statement, last), source_text(statement, last)
        cut = (select.sources[-2].on or select.sources[-2].span)[1], last.on[1]
        wrong = statement.text(edits=dict.fromkeys(range(*cut), ""))
        on = " ".join(statement.text(last.on).split())
        for at, source in _columns(statement):
            start = column_start(statement, at)
            if source is not last or cut[0] <= at < cut[1]:
                continue
            written = statement.text((start, at + 1))
            thoughts = [
                f"{written} needs {table}: join it on {on}.",
                f"{written} is a column of {table}, which FROM lacks: join it on {on}.",
            ]
            named = f"{alias} is not there: join {table} AS {alias} on {on}."
            if last.table in (one.table for one in select.sources[:-1]):
                thoughts = [named]
            elif start < at and alias.lower() != table.lower():
                thoughts.append(named)
            thought = scene.rng.choice(thoughts)
            yield FirstTry(wrong, "error", thought, f"{NO_COLUMN}: {written}")


def _other_key(statement: Statement, scene: Scene) -> Iterator[FirstTry]:
    """A join on another key of one table, which finds nothing."""
    for select in scene.choices(statement.selects):
        if not plain_sources(statement, select.sources):
            continue
        for source in select.sources:
            if source.on is not None and _is_key_pair(statement, source.on):
                for side in scene.choices([source.on[0] + 2, source.on[1] - 1]):
                    yield from _with_other_key(statement, source.on, side, scene)


def _is_key_pair(statement: Statement, on: Span) -> bool:
    """Whether a condition is `t.a = u.b`."""
    first, last = on
    is_long = last - first == 7 and statement.word(first + 3) in ("=", "==")
    return is_long and all(statement.roles[at] == "column" for at in (first + 2, last - 1))


def _with_other_key(statement: Statement, on: Span, at: int, scene: Scene) -> Iterator[FirstTry]:
    source = statement.targets[at]
    table = scene.table(source.table) if source else None
    if source is None or table is None:
        return
    right = " ".join(statement.text(on).split())
    name = fold(statement.tokens[at].text)
    for column in scene.choices([column.name for column in table.columns]):
        is_key = (column,) == table.primary_key or fold(column).endswith("id")
        if not is_key or fold(column) == name or quoted(column) != column:
            continue
        edits = {at: column}
        join = " ".join(statement.text(on, edits).split())
        wrong = statement.text(edits=edits)
        shown = scene.nothing(wrong)
        thoughts = [
            f"The join on {join} returns {shown}. The tables belong together by {right}.",
            f"It returns {shown} with the join on {join}: it must be {right}.",
        ]
        yield FirstTry(wrong, "nothing", scene.rng.choice(thoughts))


def wrong_aggregates(scene: Scene) -> Iterator[FirstTry]:
    """Tries with the condition of HAVING in WHERE."""
    statement = scene.statement
    if statement is None:
        return
    for select in scene.choices(statement.selects):
        having = select.clauses.get("having")
        if having is None or "group" not in select.clauses:
            continue
        text = " ".join(statement.text(having).split())
        edits = dict.fromkeys(range(having[0] - 1, having[1]), "")
        where = select.clauses.get("where") or select.clauses["from"]
        word = cased(statement, "AND" if "where" in select.clauses else "WHERE")
        last = where[1] - 1
        edits[last] = f"{statement.tokens[last].text} {word} {statement.as_term(having)}"
        thoughts = [
            f"An aggregate cannot stand in WHERE: {text} goes into HAVING.",
            f"WHERE cannot hold {text}. It is a condition on groups: write HAVING.",
        ]
        wrong = statement.text(edits=edits)
        yield FirstTry(wrong, "error", scene.rng.choice(thoughts), "misuse of aggregate")
