"""Take parts of a database in which foreign keys stay whole: each reference still finds a row."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mtsql.judge.content import MAX_READ_ROWS, Content, Link, TableRows
from mtsql.sql.schema import Schema, fold

MAX_ROWS = 200
"""Number of rows that are sampled from a table, before the rows they refer to are added."""
BLOCK_ROWS = 25
"""Number of neighbouring rows that are sampled together."""


def links_of(content: Content, schema: Schema) -> list[Link]:
    """The foreign keys of the schema, and the references that the data show besides them."""
    places: dict[str, dict[str, int]] = {}
    for stored in content.tables:
        places[fold(stored.name)] = {fold(name): at for at, name in enumerate(stored.columns)}
    links = []
    for (table, column), (parent, key) in schema.foreign_keys:
        at = places.get(fold(table), {}).get(fold(column))
        key_at = places.get(fold(parent), {}).get(fold(key))
        if at is not None and key_at is not None:
            links.append((fold(table), at, fold(parent), key_at))
    declared = {(table, at) for table, at, _, _ in links}
    declared |= {(parent, key_at) for _, _, parent, key_at in links}
    return links + [link for link in content.likely_links if link[:2] not in declared]


def sample(
    tables: Sequence[TableRows], links: Sequence[Link], examples: dict[str, dict[int, list]]
) -> list[TableRows]:
    """Take some rows of each table, and all rows that these refer to.

    The rows are some that hold a literal of the gold (`examples`: table -> place of a column ->
    values), and blocks at regular distances. Blocks are taken because rows that belong together are
    often neighbours.
    """
    rows: dict[str, Sequence[tuple]] = {fold(table.name): table.rows for table in tables}
    kept: dict[str, set[int]] = {}
    for table in tables:
        name = fold(table.name)
        kept[name] = _blocks(len(table.rows))
        for place, values in examples[name].items():
            texts = {str(value) for value in values}
            holding = [i for i, row in enumerate(table.rows) if str(row[place]) in texts]
            kept[name].update(holding[:BLOCK_ROWS])
    row_of_key: dict[tuple[str, int], dict[str | None, int]] = {}
    for _, _, parent, key in links:
        row_of_key[parent, key] = {_key_text(row[key]): i for i, row in enumerate(rows[parent])}
    # A large table was not read completely. Rows that refer to an unread row are left out.
    for child, column, parent, key in links:
        if len(rows[parent]) >= MAX_READ_ROWS:
            known = row_of_key[parent, key]
            for i in list(kept[child]):
                cell = rows[child][i][column]
                if cell is not None and _key_text(cell) not in known:
                    kept[child].remove(i)
    _add_referred_rows(rows, kept, links, row_of_key)
    sampled = []
    for table in tables:
        places = sorted(kept[fold(table.name)])
        sampled.append(replace(table, rows=tuple(table.rows[i] for i in places)))
    return sampled


def _blocks(num_rows: int) -> set[int]:
    """The places of about MAX_ROWS rows, in blocks of BLOCK_ROWS: all rows of a small table."""
    distance = max(BLOCK_ROWS, num_rows * BLOCK_ROWS // MAX_ROWS)
    places: set[int] = set()
    for start in range(0, num_rows, distance):
        places.update(range(start, min(start + BLOCK_ROWS, num_rows)))
    return places


def _add_referred_rows(
    rows: dict[str, Sequence[tuple]],
    kept: dict[str, set[int]],
    links: Sequence[Link],
    row_of_key: dict[tuple[str, int], dict[str | None, int]],
) -> None:
    """Add to `kept` the rows that kept rows refer to, the rows that these refer to, and so on."""
    links_from: dict[str, list[Link]] = {}
    for link in links:
        links_from.setdefault(link[0], []).append(link)
    unvisited = [(table, i) for table, places in kept.items() for i in places]
    while unvisited:
        table, i = unvisited.pop()
        for _, column, parent, key in links_from.get(table, ()):
            referred = row_of_key[parent, key].get(_key_text(rows[table][i][column]))
            if referred is not None and referred not in kept[parent]:
                kept[parent].add(referred)
                unvisited.append((parent, referred))


def drop_rows(
    tables: Sequence[TableRows], links: Sequence[Link], rng: random.Random, share: float
) -> dict[str, list[tuple]]:
    """Folded table name -> rows, without a random share of them and the rows that referred to them.

    If that empties a table, a smaller share is dropped: with an empty table, every join would be
    empty.
    """
    before = {fold(table.name): list(table.rows) for table in tables}
    left = before
    for smaller_share in (share, share / 2, share / 4, 0.0):
        is_kept = {}
        for name, rows in before.items():
            is_kept[name] = [rng.random() >= smaller_share for _ in rows]
        _drop_referring(before, is_kept, links)
        left = {}
        for name, rows in before.items():
            left[name] = [row for row, kept in zip(rows, is_kept[name], strict=True) if kept]
        if all(left[name] or not before[name] for name in before):
            break
    return left


def _drop_referring(
    rows: dict[str, list[tuple]], is_kept: dict[str, list[bool]], links: Sequence[Link]
) -> None:
    """Drop the rows whose referred rows are all dropped, then the rows that referred to these, and
    so on.

    A key is (table, place of the column, text). A key is lost once no kept row has it.
    """
    keys_of: dict[str, list[int]] = {}
    for parent, place in sorted({(parent, key) for _, _, parent, key in links}):
        keys_of.setdefault(parent, []).append(place)

    referring: dict[tuple[str, int, str | None], list[tuple[str, int]]] = {}
    for table, column, parent, key in links:
        for i, row in enumerate(rows[table]):
            text = _key_text(row[column])
            referring.setdefault((parent, key, text), []).append((table, i))

    num_kept: Counter[tuple[str, int, str | None]] = Counter()
    for parent, places in keys_of.items():
        for row, kept in zip(rows[parent], is_kept[parent], strict=True):
            for place in places:
                num_kept[parent, place, _key_text(row[place])] += int(kept)

    lost = [key for key, count in num_kept.items() if count == 0]
    while lost:
        lost_key = lost.pop()
        if lost_key[2] is None:
            continue  # NULL refers to nothing
        for table, i in referring.get(lost_key, ()):
            if not is_kept[table][i]:
                continue
            is_kept[table][i] = False
            for place in keys_of.get(table, ()):
                own_key = (table, place, _key_text(rows[table][i][place]))
                num_kept[own_key] -= 1
                if num_kept[own_key] == 0:
                    lost.append(own_key)


def _key_text(value: object) -> str | None:
    """A key as text: a column of numbers may refer to a column of texts, and 1.0 to 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


def fixed_keys(schema: Schema, links: Sequence[Link]) -> set[tuple[str, str]]:
    """(table, column), folded, of the keys whose values must stay in their rows.

    These are primary keys, referred columns, and foreign keys of several columns. The values of
    any other foreign key may change places, because each one still refers to a row.
    """
    fixed = set()
    for table in schema.tables:
        fixed |= {(fold(table.name), fold(column)) for column in table.primary_key}
    num_links = Counter((child, parent) for child, _, parent, _ in links)
    for (child, column), (parent, key) in schema.foreign_keys:
        fixed.add((fold(parent), fold(key)))
        has_several_columns = num_links[fold(child), fold(parent)] > 1
        if has_several_columns or fold(child) == fold(parent):
            fixed.add((fold(child), fold(column)))
    return fixed


def parents_first(names: Iterable[str], links: Sequence[Link]) -> list[str]:
    """Table names in an order in which referred tables come first; in a cycle, in any order."""
    waiting = list(names)
    parents: dict[str, set[str]] = {name: set() for name in waiting}
    for table, _, parent, _ in links:
        if parent != table:
            parents[table].add(parent)
    ordered: list[str] = []
    while waiting:
        ready = (name for name in waiting if parents[name].issubset(ordered))
        name = next(ready, waiting[0])
        ordered.append(name)
        waiting.remove(name)
    return ordered
