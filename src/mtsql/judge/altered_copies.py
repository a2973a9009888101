"""Small altered copies of a database, on which a query that agreed with the gold by accident
disagrees.

The idea is that of distilled test suites (Zhong, Yu and Klein, EMNLP 2020), made cheap: a sample of
the rows that keeps foreign keys whole; then rows are dropped (with the rows that refer to them),
values change places within their column, some cells and rows get new values (new_values.py), and
the gold's literals and values next to them are planted in the columns it compares them with. Keys
keep their values and unique columns stay unique, so a query that is equivalent to the gold because
of keys stays so. A copy has the file's own tables, keys, indexes and views.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtsql.judge.content import MAX_READ_ROWS, Content, Link, TableRows, content_of
from mtsql.judge.new_values import MORE_ROWS_SHARE, NEW_ROWS_SHARE, moved, new_rows, renew_cells
from mtsql.judge.sql_parser import ColumnName, ColumnUse, Condition, Query, parse_sql
from mtsql.sql.schema import Schema, fold

MAX_ROWS = 200
"""Rows of a table that are sampled, before the rows they refer to join them."""
BLOCK_ROWS = 25
"""Rows of a sample that stand side by side."""
SHARES = (0.15, 0.4, 0.6, 0.0)
"""Of the rows that are dropped, in turn. Where none is, more new ones are added."""
MAX_ALTERED_COLUMNS = 400
"""In a wider database, only the tables that the gold names, and those they refer to, are
altered."""


@dataclass(frozen=True)
class _Pattern:
    """A LIKE pattern with a % in it, without its quotes."""

    text: str

    def examples(self, column: Sequence[object]) -> list[str]:
        """Texts that match. A date or a number must be one of the column's own, since other texts
        around it would make it no date."""
        bare = self.text.replace("%", "")
        if any(map(str.isalpha, bare)):
            return [bare, self.text.replace("%", "x")]
        texts = [value for value in column if isinstance(value, str)]
        return [text for text in texts if bare in text][:3] or ([] if texts else [bare])


def altered(db_path: Path, gold_sql: str, schema: Schema, seed: int) -> Content:
    """One altered copy. The same for the same arguments and file, on every machine."""
    content = content_of(db_path)
    gold = parse_sql(gold_sql, schema)
    examples = _examples(content, sorted(set(_literals(gold)), key=repr) if gold else [])
    links = _links(content, schema)
    tables = _sampled(content.tables, links, examples)
    rng = random.Random(f"{seed}/{gold_sql}")
    share = SHARES[seed % len(SHARES)]
    rows = _dropped(tables, links, rng, share)
    touched = _touched(content, gold_sql, links)
    fixed = _fixed(schema, links)
    referring = {(table, place) for table, place, _, _ in links}
    foreign = {(fold(table), fold(column)) for (table, column), _ in schema.foreign_keys}
    changed = []
    for table in tables:
        name = fold(table.name)
        columns = [list(column) for column in zip(*rows[name], strict=True)]
        planted: dict[int, list] = {}
        for place, column in enumerate(table.columns if columns and name in touched else ()):
            if (name, fold(column)) in fixed:
                continue
            if rng.random() < 0.5:
                rng.shuffle(columns[place])
            is_open = (name, fold(column)) not in foreign and place not in table.checked
            if rng.random() < 0.5 and is_open and (name, place) not in referring:
                renew_cells(columns[place], place in content.unique[name], rng)
            if place in examples[name] and is_open:
                planted[place] = examples[name][place]
        _plant(columns, planted, rng)
        changed.append(replace(table, rows=tuple(zip(*columns, strict=True))))
    added = NEW_ROWS_SHARE if share else MORE_ROWS_SHARE
    whole = _with_new_rows(changed, content.unique, links, schema, touched, added, rng)
    return Content(whole, content.others)


def _touched(content: Content, gold_sql: str, links: Sequence[Link]) -> set[str]:
    """Folded names of the tables that are altered: all, unless they have very many columns."""
    names = {fold(table.name) for table in content.tables}
    if sum(len(table.columns) for table in content.tables) <= MAX_ALTERED_COLUMNS:
        return names
    words = set(re.findall(r"\w+", fold(gold_sql)))
    named = {name for name in names if words.issuperset(re.findall(r"\w+", name))}
    return named | {parent for table, _, parent, _ in links if table in named}


def _with_new_rows(
    tables: Sequence[TableRows],
    unique: dict[str, frozenset[int]],
    links: Sequence[Link],
    schema: Schema,
    touched: set[str],
    share: float,
    rng: random.Random,
) -> tuple[TableRows, ...]:
    """The tables with some rows more, at any place. Referred tables come first, so that new rows
    can refer to new keys."""
    parents = {fold(table.name): set() for table in tables}
    for table, _, parent, _ in links:
        parents[table] |= {parent} - {table}
    primary = {fold(table.name): [fold(c) for c in table.primary_key] for table in schema.tables}
    by_name = {fold(table.name): table for table in tables}
    new_keys: dict[tuple[str, int], list] = {}
    done: dict[str, TableRows] = {}
    while len(done) < len(by_name):
        waiting = [name for name in by_name if name not in done]
        name = next((n for n in waiting if parents[n] <= done.keys()), waiting[0])  # a cycle: any
        table = by_name[name]
        places = {fold(column): place for place, column in enumerate(table.columns)}
        key = tuple(places[column] for column in primary.get(name, ()) if column in places)
        own = [link for link in links if link[0] == name]
        references = {place: new_keys.get((parent, at), []) for _, place, parent, at in own}
        own_keys = frozenset(key[:1] if not references.keys() & set(key) else ())
        added = []
        if name in touched:
            added = new_rows(
                table.rows, own_keys, unique[name], references, key, table.checked, share, rng
            )
        for place in range(len(table.columns)):
            new_keys[name, place] = [row[place] for row in added]
        rows = list(table.rows)
        for row in added:
            rows.insert(rng.randint(0, len(rows)), row)
        done[name] = replace(table, rows=tuple(rows))
    return tuple(done[fold(table.name)] for table in tables)


def _examples(content: Content, literals: Iterable[tuple[ColumnName, object]]) -> dict[str, dict]:
    """Folded table name -> place of a column -> values that meet the gold's comparisons with it."""
    found: dict[str, dict[int, list]] = {fold(table.name): {} for table in content.tables}
    for table in content.tables:
        for place, column in enumerate(table.columns):
            name = ColumnName(table.name.lower(), column.lower())
            for key, literal in literals:
                if key != name:
                    continue
                values = [literal]
                if isinstance(literal, _Pattern):
                    values = literal.examples([row[place] for row in table.rows])
                if values:
                    found[fold(table.name)].setdefault(place, []).extend(values)
    return found


def _fixed(schema: Schema, links: Sequence[Link]) -> set[tuple[str, str]]:
    """(table, column), folded, of the keys whose values stay where they are: primary keys, referred
    columns, and foreign keys of several columns. The values of any other foreign key may change
    places: each still refers to a row."""
    fixed = {(fold(table.name), fold(c)) for table in schema.tables for c in table.primary_key}
    pairs = Counter((table, parent) for table, _, parent, _ in links)
    for (table, column), (parent, key) in schema.foreign_keys:
        fixed.add((fold(parent), fold(key)))
        if pairs[fold(table), fold(parent)] > 1 or fold(table) == fold(parent):
            fixed.add((fold(table), fold(column)))
    return fixed


def _links(content: Content, schema: Schema) -> list[Link]:
    """The foreign keys of the schema, and what the data show beside them."""
    places = {
        fold(t.name): {fold(name): i for i, name in enumerate(t.columns)} for t in content.tables
    }
    links = []
    for (table, column), (parent, key) in schema.foreign_keys:
        at, parent_at = places.get(fold(table), {}), places.get(fold(parent), {})
        if fold(column) in at and fold(key) in parent_at:
            links.append((fold(table), at[fold(column)], fold(parent), parent_at[fold(key)]))
    declared = {link[:2] for link in links} | {link[2:] for link in links}
    return links + [link for link in content.likely_links if link[:2] not in declared]


def _sampled(
    tables: Sequence[TableRows], links: Sequence[Link], examples: dict[str, dict]
) -> list[TableRows]:
    """Some rows of each table that hold one of the literals, blocks of others, and all rows these
    refer to.

    Blocks, because rows that belong to one group often stand side by side.
    """
    rows, kept = {fold(table.name): table.rows for table in tables}, {}
    for table in tables:
        name, num_rows = fold(table.name), len(table.rows)
        blocks = range(0, num_rows, max(BLOCK_ROWS, num_rows * BLOCK_ROWS // MAX_ROWS))
        kept[name] = {
            i for start in blocks for i in range(start, min(start + BLOCK_ROWS, num_rows))
        }
        for place, values in examples[name].items():
            wanted = set(map(str, values))
            found = [i for i, row in enumerate(table.rows) if str(row[place]) in wanted]
            kept[name].update(found[:BLOCK_ROWS])
    links_of = _grouped(links, lambda link: link[0])
    index = {
        (parent, key): {_key(row[key]): i for i, row in enumerate(rows[parent])}
        for _, _, parent, key in links
    }
    # Not all rows of a large table were read. What refers to an unread one is left out.
    for table, column, parent, key in links:
        if len(rows[parent]) >= MAX_READ_ROWS:
            known = index[parent, key]
            cells = ((i, rows[table][i][column]) for i in kept[table])
            kept[table] = {i for i, cell in cells if cell is None or _key(cell) in known}
    unvisited = [(table, i) for table, found in kept.items() for i in found]
    while unvisited:
        table, i = unvisited.pop()
        for _, column, parent, key in links_of.get(table, ()):
            wanted = index[parent, key].get(_key(rows[table][i][column]))
            if wanted is not None and wanted not in kept[parent]:
                kept[parent].add(wanted)
                unvisited.append((parent, wanted))
    return [replace(t, rows=tuple(t.rows[i] for i in sorted(kept[fold(t.name)]))) for t in tables]


def _dropped(
    tables: Sequence[TableRows], links: Sequence[Link], rng: random.Random, share: float
) -> dict[str, list[tuple]]:
    """A random share of each table's rows is gone, and with a row those that refer to it.

    Where that empties a table, less is dropped: an empty one makes an outer join out of every join.
    """
    before = {fold(table.name): list(table.rows) for table in tables}
    for lost in (share, share / 2, share / 4, 0.0):
        is_kept = {
            name: [rng.random() >= lost for _ in all_rows] for name, all_rows in before.items()
        }
        _drop_referring(before, is_kept, links)
        rows = {
            name: [row for row, kept in zip(before[name], is_kept[name], strict=True) if kept]
            for name in before
        }
        if all(rows[name] or not before[name] for name in rows):
            break
    return rows


def _drop_referring(
    rows: dict[str, list[tuple]], is_kept: dict[str, list[bool]], links: Sequence[Link]
) -> None:
    """Take away the rows whose referred rows are all gone, then those that referred to them, and so
    on."""
    keys_of = _grouped(sorted({(parent, key) for _, _, parent, key in links}), lambda pair: pair[0])
    referring: dict[
        tuple, list[tuple[str, int]]
    ] = {}  # (table, column, key) -> rows that refer to it
    for table, column, parent, key in links:
        for i, row in enumerate(rows[table]):
            referring.setdefault((parent, key, _key(row[column])), []).append((table, i))
    left = Counter()  # (table, column, key) -> how many kept rows have it
    for parent, pairs in keys_of.items():
        for row, kept in zip(rows[parent], is_kept[parent], strict=True):
            left.update({(parent, key, _key(row[key])): int(kept) for _, key in pairs})
    gone = [spot for spot, count in left.items() if not count]
    while gone:
        spot = gone.pop()
        for table, i in referring.get(spot, ()) if spot[2] is not None else ():
            if is_kept[table][i]:
                is_kept[table][i] = False
                for _, key in keys_of.get(table, ()):
                    own = table, key, _key(rows[table][i][key])
                    left[own] -= 1
                    if not left[own]:
                        gone.append(own)


def _grouped(items: Iterable[tuple], key: Callable[[tuple], str]) -> dict[str, list[tuple]]:
    groups: dict[str, list[tuple]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _key(value: object) -> str | None:
    """A key as text: a column of numbers may refer to one of texts, and 1.0 to 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


def _literals(query: Query) -> Iterator[tuple[ColumnName, float | int | str | _Pattern]]:
    """(column, literal) of every comparison, in all nested queries and arms too."""
    for conditions in (query.on, query.where, query.having):
        for condition in conditions:
            if isinstance(condition, Condition):
                use = condition.expression.left
                for value in (condition.value, condition.high_value):
                    if isinstance(value, Query):
                        yield from _literals(value)
                    elif (
                        value is not None
                        and not isinstance(value, ColumnUse)
                        and use.aggregate == "none"
                    ):
                        yield use.column, _plain(value)
    for inner in (*query.tables, query.intersect, query.union, query.except_):
        if isinstance(inner, Query):
            yield from _literals(inner)


def _plain(value: float | str) -> float | int | str | _Pattern:
    """A parsed literal as SQLite would store it. A quoted number stays a text: SQLite turns it into
    a number where the column asks for numbers."""
    if isinstance(value, str):
        text = value.strip('"')
        return _Pattern(text) if "%" in text else text
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _near(value: float | int | str, rng: random.Random) -> float | int | str:
    """A value that just misses a literal, and looks like it: a date stays a date."""
    if not isinstance(value, str):
        return value + rng.choice((-1, 1))
    is_number = value.isascii() and value.isdigit() and not value.startswith("0")
    if is_number and len(value) < 16:
        return str(int(value) + rng.choice((-1, 1)))
    return moved(value, rng.choice((-1, 1)), rng) if value else "#"


def _plant(columns: list[list], planted: dict[int, list], rng: random.Random) -> None:
    """Let a quarter of the rows meet every comparison with a literal, and a quarter just miss
    one."""
    if not planted:
        return
    has_repeats = {place: len(set(columns[place])) < len(columns[place]) for place in planted}
    for row in range(len(columns[0])):
        chance = rng.random()
        if chance < 0.25:
            chosen = {place: rng.choice(values) for place, values in planted.items()}
        elif chance < 0.5:
            # All comparisons but one are met.
            chosen = {place: rng.choice(values) for place, values in planted.items()}
            place = rng.choice(sorted(planted))
            chosen[place] = _near(chosen[place], rng)
        else:
            continue
        for place, value in chosen.items():
            if has_repeats[place] or value not in columns[place]:
                columns[place][row] = value
