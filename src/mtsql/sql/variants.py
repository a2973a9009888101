"""Small altered copies of a database, on which a query that agreed with the gold by accident disagrees.

The idea is that of distilled test suites (Zhong, Yu and Klein, EMNLP 2020), made cheap: a sample of the rows that
keeps foreign keys whole; then rows are dropped (with the rows that refer to them), values change places within their
column, and the gold's literals and values next to them are planted in the columns it compares them with. Keys keep
their values and unique columns stay unique, so a query that is equivalent to the gold because of keys stays so.
A copy has no index and no key of its own, so that the order of its rows is ours to choose.
"""

import hashlib
import logging
import marshal
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import getsizeof

from mtsql.sql.cache import SharedCache
from mtsql.sql.parse import ColumnName, ColumnUse, Condition, Query, parse_sql
from mtsql.sql.sandbox import DatabaseFileError, MemoryCopy, content_hash, file_version, read_tables
from mtsql.sql.schema import Schema, fold
from mtsql.sql.tables import written
from mtsql.sql.worker import MARSHAL_VERSION

MAX_READ_ROWS = 5000
MAX_ROWS = 200
BLOCK_ROWS = 25
"""Rows of a table that are looked at; that are sampled, before the rows they refer to join them; side by side."""
MAX_CELL_BYTES = 2000
"""A longer text or blob is cut."""
MAX_READ_BYTES = 32 * 2**20
"""What is read of one database, counted as Python objects."""
MAX_CACHED_BYTES = 128 * 2**20
"""All databases together that stay in memory for later copies."""
_LOGGER = logging.getLogger(__name__)
SHARES = (0.15, 0.4, 0.6)
"""Of the rows that are dropped, in turn."""


@dataclass(frozen=True)
class TableRows:
    """A table's name, its columns with their declared types, and rows."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple, ...]


def tables_of(db_path: Path) -> tuple[TableRows, ...]:
    """Every ordinary table of a database file: at most `MAX_READ_ROWS` rows of it and its share of `MAX_READ_BYTES`,
    longer values cut, and without the tables that cannot be read; none if the file cannot be read in time. Raises
    DatabaseFileError if the file is missing or is not a file."""
    path, version = file_version(db_path)
    return _TABLES.get(content_hash(path, version), lambda _: _read(db_path))


def _read(db_path: Path) -> tuple[TableRows, ...]:
    try:
        found = read_tables(db_path, MAX_READ_ROWS, MAX_CELL_BYTES, MAX_READ_BYTES)
    except DatabaseFileError as error:
        _LOGGER.warning("the guard has no evidence for a database, because its tables cannot be read: %s", error)
        found = []
    return tuple(TableRows(name, tuple(columns), tuple(rows)) for name, columns, rows in found)


def memory_copy(tables: Sequence[TableRows]) -> MemoryCopy:
    """The tables as a database that workers build in memory, in this order of rows; no keys, no indexes."""
    packed = marshal.dumps(written([(t.name, t.columns, t.rows) for t in tables]), MARSHAL_VERSION)
    return MemoryCopy(hashlib.blake2b(packed, digest_size=16).digest(), packed)


def reversed_rows(tables: Sequence[TableRows]) -> list[TableRows]:
    """The same content in the opposite order: what a query returns from both does not depend on the order."""
    return [TableRows(table.name, table.columns, table.rows[::-1]) for table in tables]


def altered(db_path: Path, gold_sql: str, schema: Schema, seed: int) -> list[TableRows]:
    """The tables of one altered copy. The same for the same arguments and file, on every machine."""
    gold = parse_sql(gold_sql, schema)
    literals = sorted(set(_literals(gold)), key=repr) if gold else []
    tables = _sampled(tables_of(db_path), schema, literals)
    rng = random.Random(f"{seed}/{gold_sql}")
    rows = _dropped(tables, schema, rng, share=SHARES[seed % len(SHARES)])
    keys = _keys(schema)
    changed = []
    for table in tables:
        name = fold(table.name)
        columns = [list(column) for column in zip(*rows[name], strict=True)]
        planted = {}
        for place, (column, _) in enumerate(table.columns if columns else ()):
            if (name, fold(column)) in keys:
                continue
            if rng.random() < 0.5:
                rng.shuffle(columns[place])
            values = [value for key, value in literals if key == ColumnName(table.name.lower(), column.lower())]
            if values:
                planted[place] = values
        _plant(columns, planted, rng)
        changed.append(TableRows(table.name, table.columns, tuple(zip(*columns, strict=True))))
    return changed


def _keys(schema: Schema) -> set[tuple[str, str]]:
    """(table, column) of all primary and foreign keys, lower-cased."""
    primary = {(table.name, column) for table in schema.tables for column in table.primary_key}
    return {(fold(table), fold(column)) for table, column in primary.union(*schema.foreign_keys)}


def _links(tables: Sequence[TableRows], schema: Schema) -> list[tuple[str, int, str, int]]:
    """Foreign keys as (referring table, place of its column, referred table, place of its column)."""
    places = {fold(t.name): {fold(name): i for i, (name, _) in enumerate(t.columns)} for t in tables}
    links = []
    for (table, column), (parent, key) in schema.foreign_keys:
        at, parent_at = places.get(fold(table), {}), places.get(fold(parent), {})
        if fold(column) in at and fold(key) in parent_at:
            links.append((fold(table), at[fold(column)], fold(parent), parent_at[fold(key)]))
    return links


def _sampled(
    tables: Sequence[TableRows], schema: Schema, literals: Sequence[tuple[ColumnName, object]]
) -> list[TableRows]:
    """Some rows of each table that hold one of the literals, blocks of others, and all rows these refer to.

    Blocks, because rows that belong to one group often stand side by side.
    """
    rows, kept = {fold(table.name): table.rows for table in tables}, {}
    for table in tables:
        name, num_rows = fold(table.name), len(table.rows)
        blocks = range(0, num_rows, max(BLOCK_ROWS, num_rows * BLOCK_ROWS // MAX_ROWS))
        kept[name] = {i for start in blocks for i in range(start, min(start + BLOCK_ROWS, num_rows))}
        for place, (column, _) in enumerate(table.columns):
            wanted = {str(value) for key, value in literals if key == ColumnName(table.name.lower(), column.lower())}
            found = [i for i, row in enumerate(table.rows) if str(row[place]) in wanted] if wanted else []
            kept[name].update(found[:BLOCK_ROWS])
    links = _links(tables, schema)
    links_of = _grouped(links, lambda link: link[0])
    index = {(parent, key): {_key(row[key]): i for i, row in enumerate(rows[parent])} for _, _, parent, key in links}
    unvisited = [(table, i) for table, found in kept.items() for i in found]
    while unvisited:
        table, i = unvisited.pop()
        for _, column, parent, key in links_of.get(table, ()):
            wanted = index[parent, key].get(_key(rows[table][i][column]))
            if wanted is not None and wanted not in kept[parent]:
                kept[parent].add(wanted)
                unvisited.append((parent, wanted))
    return [TableRows(t.name, t.columns, tuple(t.rows[i] for i in sorted(kept[fold(t.name)]))) for t in tables]


def _dropped(
    tables: Sequence[TableRows], schema: Schema, rng: random.Random, share: float
) -> dict[str, list[tuple]]:
    """A random share of each table's rows is gone, and with a row those that refer to it.

    Where that empties a table, less is dropped: an empty one makes an outer join out of every join.
    """
    before = {fold(table.name): list(table.rows) for table in tables}
    links = _links(tables, schema)
    for share in (share, share / 2, share / 4, 0.0):
        is_kept = {name: [rng.random() >= share for _ in all_rows] for name, all_rows in before.items()}
        _drop_referring(before, is_kept, links)
        rows = {name: [row for row, kept in zip(before[name], is_kept[name], strict=True) if kept] for name in before}
        if all(rows[name] or not before[name] for name in rows):
            break
    return rows


def _drop_referring(
    rows: dict[str, list[tuple]], is_kept: dict[str, list[bool]], links: list[tuple[str, int, str, int]]
) -> None:
    """Take away the rows whose referred rows are all gone, then those that referred to them, and so on."""
    keys_of = _grouped(sorted({(parent, key) for _, _, parent, key in links}), lambda pair: pair[0])
    referring: dict[tuple, list[tuple[str, int]]] = {}  # (table, column, key) -> rows that refer to it
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
    """A key as text: a column of numbers may refer to one of texts."""
    return None if value is None else str(value)


def _literals(query: Query) -> Iterator[tuple[ColumnName, float | int | str]]:
    """(column, literal) of every comparison, in all nested queries and arms too."""
    for conditions in (query.on, query.where, query.having):
        for condition in conditions:
            if isinstance(condition, Condition):
                use = condition.expression.left
                for value in (condition.value, condition.high_value):
                    if isinstance(value, Query):
                        yield from _literals(value)
                    elif value is not None and not isinstance(value, ColumnUse) and use.aggregate == "none":
                        yield use.column, _plain(value)
    for inner in (*query.tables, query.intersect, query.union, query.except_):
        if isinstance(inner, Query):
            yield from _literals(inner)


def _plain(value: float | str) -> float | int | str:
    """A parsed literal as SQLite would store it; the % of a LIKE pattern is left out."""
    if isinstance(value, str):
        value = value.strip('"').replace("%", "")
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _plant(columns: list[list], planted: dict[int, list], rng: random.Random) -> None:
    """Let a quarter of the rows meet every comparison with a literal, and a quarter just miss one."""
    if not planted:
        return
    has_repeats = {place: len(set(columns[place])) < len(columns[place]) for place in planted}
    for row in range(len(columns[0])):
        chance = rng.random()
        if chance < 0.25:
            chosen = {place: rng.choice(values) for place, values in planted.items()}
        elif chance < 0.5:
            place = rng.choice(sorted(planted))
            value = rng.choice(planted[place])
            chosen = {place: "#" if isinstance(value, str) else value + rng.choice((-1, 1))}
        else:
            continue
        for place, value in chosen.items():
            if has_repeats[place] or value not in columns[place]:
                columns[place][row] = value


def _num_bytes(tables: tuple[TableRows, ...]) -> int:
    return sum(getsizeof(row) + sum(map(getsizeof, row)) for table in tables for row in table.rows)


_TABLES: SharedCache[tuple[TableRows, ...]] = SharedCache(MAX_CACHED_BYTES, _num_bytes)
