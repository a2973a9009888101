"""The content of a database file, from which altered copies are made: tables with their own CREATE
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
"""Limit of the rows that are read of a table."""
MAX_CELL_BYTES = 2000
"""Limit of a text or blob. A longer one is truncated, unless it looks like JSON."""
MAX_READ_BYTES = 32 * 2**20
"""Limit of what is read of one database, counted as Python objects."""
MAX_CACHED_BYTES = 128 * 2**20
"""Limit of the memory in which databases are kept for later copies, for all databases together."""
MAX_COMPARED_COLUMNS = 400
"""Maximum number of columns of a database in which undeclared references are looked for."""
_LOGGER = logging.getLogger(__name__)
_CHECK = re.compile(r"\bcheck\s*\(", re.IGNORECASE)

Link = tuple[str, int, str, int]
"""(referring table, place of its column, referred table, place of its column); names are folded."""


@dataclass(frozen=True)
class TableRows:
    """A table: its name, its CREATE statement, its stored columns and rows.

    checked: places of the columns that a CHECK names; the table may reject other values there.
    """

    name: str
    create: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    checked: frozenset[int] = frozenset()


def checked_columns(create: str, columns: Sequence[str]) -> frozenset[int]:
    """The places of the columns that are named in the brackets of a CHECK."""
    words: set[str] = set()
    end = 0
    while found := _CHECK.search(create, end):
        end = _closing(create, found.end())
        words |= set(re.findall(r"\w+", fold(create[found.end() : end])))
    return frozenset(place for place, name in enumerate(columns) if fold(name) in words)


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one before `start`, or the end of the text."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
        if depth == 0:
            return place + 1
    return len(text)


@dataclass(frozen=True)
class _Column:
    """A column with its values; table and name are folded."""

    table: str
    place: int
    name: str
    values: frozenset

    @cached_property
    def is_text(self) -> bool:
        """Whether all values are texts that are no numbers."""
        return all(isinstance(value, str) and not value.isdigit() for value in self.values)

    def is_named_like(self, key: "_Column") -> bool:
        """Whether both have the same name, or both names end with "id"."""
        return self.name == key.name or (self.name.endswith("id") and key.name.endswith("id"))

    def may_refer_to(self, key: "_Column") -> bool:
        """Whether the data look as if this column referred to a unique column.

        Columns of numbers need fitting names as well, because many columns hold 1, 2 and 3.
        """
        if key.table == self.table or not (self.is_text or self.is_named_like(key)):
            return False
        if not 1 < len(self.values) <= len(key.values) or not self.values <= key.values:
            return False
        # If both have the same values, the column of the earlier table is the key.
        return self.values != key.values or (self.table, self.place) >= (key.table, key.place)


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
            places = (place for place, column in columns if _is_unique(column))
            found[fold(table.name)] = frozenset(places)
        return found

    @cached_property
    def likely_links(self) -> tuple[Link, ...]:
        """References that the data show, whether or not a key declares them.

        All values of the referring column occur in a unique column of another table.
        """
        columns = self._columns()
        if len(columns) > MAX_COMPARED_COLUMNS:
            return ()
        keys = []
        for column in columns:
            if column.place in self.unique[column.table] and len(column.values) > 1:
                keys.append(column)
        links = []
        for column in columns:
            key = next((key for key in keys if column.may_refer_to(key)), None)
            if key is not None:
                links.append((column.table, column.place, key.table, key.place))
        return tuple(links)

    def _columns(self) -> list[_Column]:
        """All columns of tables that have rows."""
        found = []
        for table in self.tables:
            columns = zip(table.columns, zip(*table.rows, strict=True), strict=False)
            for place, (name, values) in enumerate(columns):
                filled = frozenset(values) - {None}
                found.append(_Column(fold(table.name), place, fold(name), filled))
        return found


def _is_unique(column: Sequence) -> bool:
    values = [value for value in column if value is not None]
    return len(values) > 1 and len(set(values)) == len(values)


def content_of(db_path: Path) -> Content:
    """Read every ordinary table of a database file.

    A table gives at most `MAX_READ_ROWS` rows and its share of `MAX_READ_BYTES`; longer values are
    truncated. Tables that cannot be read are left out, and all tables if the file cannot be read in
    time. Raises DatabaseFileError if the file is missing or is not a file.
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
        return Content(())
    found = []
    for name, create, columns, rows in tables:
        checked = checked_columns(create, columns)
        found.append(TableRows(name, create, tuple(columns), tuple(rows), checked))
    return Content(tuple(found), tuple(others))


def memory_copy(content: Content, is_reversed: bool = False) -> MemoryCopy:
    """The content as a database that SQL workers build in memory.

    is_reversed: store the rows of each table in the opposite order. What a query returns from both
    copies does not depend on the order of storage.
    """
    tables = [(t.name, t.create, list(t.columns), list(t.rows)) for t in content.tables]
    packed = marshal.dumps(written(tables, list(content.others)), MARSHAL_VERSION)
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    return MemoryCopy(digest, packed, is_reversed)


def _num_bytes(content: Content) -> int:
    total = 0
    for table in content.tables:
        for row in table.rows:
            total += getsizeof(row) + sum(map(getsizeof, row))
    return total


_CONTENTS: SharedCache[Content] = SharedCache(MAX_CACHED_BYTES, _num_bytes)
