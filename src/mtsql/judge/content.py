"""What a database file holds, as altered copies are made of it: tables with their own CREATE
statements, rows, and the references between columns."""

import hashlib
import logging
import marshal
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import getsizeof

from mtsql.sql.cache import SharedCache
from mtsql.sql.sandbox import DatabaseFileError, MemoryCopy, content_hash, file_version, read_tables
from mtsql.sql.schema import fold
from mtsql.sql.tables import written
from mtsql.sql.worker import MARSHAL_VERSION

MAX_READ_ROWS = 5000
"""Rows of a table that are looked at."""
MAX_CELL_BYTES = 2000
"""A longer text or blob is cut, unless it looks like JSON."""
MAX_READ_BYTES = 32 * 2**20
"""What is read of one database, counted as Python objects."""
MAX_CACHED_BYTES = 128 * 2**20
"""All databases together that stay in memory for later copies."""
MAX_COMPARED_COLUMNS = 400
"""References that no key declares are looked for among so many columns."""
_LOGGER = logging.getLogger(__name__)
_CHECK = re.compile(r"\bcheck\s*\(", re.IGNORECASE)

Link = tuple[str, int, str, int]
"""(referring table, place of its column, referred table, place of its column); names are folded."""


@dataclass(frozen=True)
class TableRows:
    """A table: its name, its CREATE statement, its stored columns and rows."""

    name: str
    create: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]

    checked: frozenset[int] = frozenset()
    """Places of the columns that a CHECK names: the table may reject other values there."""


def checked_columns(create: str, columns: Sequence[str]) -> frozenset[int]:
    """Places of the columns whose names stand in the brackets of a CHECK."""
    words: set[str] = set()
    start = 0
    while found := _CHECK.search(create, start):
        depth, start = 1, found.end()
        while depth and start < len(create):
            depth += {"(": 1, ")": -1}.get(create[start], 0)
            start += 1
        words |= set(re.findall(r"\w+", fold(create[found.end() : start])))
    return frozenset(i for i, name in enumerate(columns) if fold(name) in words)


@dataclass(frozen=True)
class Content:
    """The tables of a database, and the CREATE statements of its indexes and views."""

    tables: tuple[TableRows, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def unique(self) -> dict[str, frozenset[int]]:
        """Folded table name -> places of the columns in which no value repeats."""
        found = {}
        for table in self.tables:
            columns = enumerate(zip(*table.rows, strict=True))
            places = (i for i, column in columns if _is_unique(column))
            found[fold(table.name)] = frozenset(places)
        return found

    @cached_property
    def likely_links(self) -> tuple[Link, ...]:
        """References that the data show and that no key may declare: all values of a column stand
        in a unique column of another table. Columns of numbers need fitting names as well, since
        many hold 1, 2 and 3."""
        columns = [
            (fold(table.name), place, fold(name), frozenset(column) - {None})
            for table in self.tables
            for place, (name, column) in enumerate(
                zip(table.columns, zip(*table.rows, strict=True), strict=False)
            )
        ]
        if len(columns) > MAX_COMPARED_COLUMNS:
            return ()
        parents = [c for c in columns if c[1] in self.unique[c[0]] and len(c[3]) > 1]
        links = []
        for table, place, name, values in columns:
            is_text = all(isinstance(v, str) and not v.isdigit() for v in values)
            for parent, key, key_name, keys in parents:
                is_named = name == key_name or (name.endswith("id") and key_name.endswith("id"))
                if parent == table or not (is_text or is_named):
                    continue
                if not 1 < len(values) <= len(keys) or not values <= keys:
                    continue
                # Of two columns with the same values, the one of the earlier table is the parent.
                if values != keys or (table, place) >= (parent, key):
                    links.append((table, place, parent, key))
                    break
        return tuple(links)


def _is_unique(column: Sequence) -> bool:
    values = [value for value in column if value is not None]
    return len(values) > 1 and len(set(values)) == len(values)


def content_of(db_path: Path) -> Content:
    """Every ordinary table of a database file: at most `MAX_READ_ROWS` rows of it and its share of
    `MAX_READ_BYTES`, longer values cut, and without the tables that cannot be read; none if the
    file cannot be read in time. Raises DatabaseFileError if the file is missing or is not a file.
    """
    path, version = file_version(db_path)
    return _CONTENTS.get(content_hash(path, version), lambda _: _read(db_path))


def _read(db_path: Path) -> Content:
    try:
        tables, others = read_tables(db_path, MAX_READ_ROWS, MAX_CELL_BYTES, MAX_READ_BYTES)
    except DatabaseFileError as error:
        _LOGGER.warning(
            "the guard has no evidence for a database, because its tables cannot be read: %s", error
        )
        tables, others = [], []
    found = (
        TableRows(name, create, tuple(columns), tuple(rows), checked_columns(create, columns))
        for name, create, columns, rows in tables
    )
    return Content(tuple(found), tuple(others))


def memory_copy(content: Content, is_reversed: bool = False) -> MemoryCopy:
    """The content as a database that workers build in memory.

    is_reversed: the rows of each table are stored in the opposite order. What a query returns from
    both does not depend on the order.
    """
    tables = [(t.name, t.create, list(t.columns), list(t.rows)) for t in content.tables]
    packed = marshal.dumps(written(tables, list(content.others)), MARSHAL_VERSION)
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    return MemoryCopy(digest, packed, is_reversed)


def _num_bytes(content: Content) -> int:
    return sum(
        getsizeof(row) + sum(map(getsizeof, row)) for table in content.tables for row in table.rows
    )


_CONTENTS: SharedCache[Content] = SharedCache(MAX_CACHED_BYTES, _num_bytes)
