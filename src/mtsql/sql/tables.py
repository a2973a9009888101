"""Read a database's schema and rows, and write them as the statements of a copy. This code runs in
a SQL worker and never executes SQL of a model."""

import re
import sqlite3

from mtsql.sql.connection import UNREADABLE, decode, is_out_of_memory, row_bytes

_TABLE_NAMES = """SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')
                  AND name NOT LIKE 'sqlite^_%' ESCAPE '^' ORDER BY rowid"""
# hidden 1 marks columns of virtual tables that `SELECT *` does not show.
_COLUMNS = "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden != 1 ORDER BY cid"
# hidden 2 and 3 mark generated columns, which no INSERT may name.
_STORED_COLUMNS = "SELECT name, hidden FROM pragma_table_xinfo(?) WHERE hidden != 1 ORDER BY cid"
# SQLite numbers foreign keys from the last one declared.
_FOREIGN_KEYS = (
    'SELECT "table", "from", "to", seq FROM pragma_foreign_key_list(?) ORDER BY id DESC, seq'
)
_OBJECTS = "SELECT type, name, sql FROM sqlite_master WHERE sql NOT NULL ORDER BY rowid"


def quoted(name: str) -> str:
    """A name in double quotes, also where SQL needs none."""
    return '"' + name.replace('"', '""') + '"'


def read_tables(
    connection: sqlite3.Connection,
    max_rows: int = -1,
    max_value_bytes: int = 2**30,
    max_bytes: int = 2**40,
) -> tuple[list[tuple[str, str, list[str], list[tuple]]], list[str]]:
    """-> (name, CREATE statement, columns, rows) of every ordinary table, and the CREATE statements
    of indexes and views.

    Only stored columns are read, because SQLite computes the generated ones again. Virtual tables,
    and tables that SQLite cannot read (a damaged page, a name that is not UTF-8), are left out.

    max_rows: limit for each table.
    max_value_bytes: longer values are truncated, except texts that may be JSON.
    max_bytes: limit of all rows, counted as Python objects. Each table gets an equal share; the
    rows beyond it are left out.
    """
    kinds = _table_kinds(connection)
    creates = []
    others = []
    for kind, name, sql in _objects(connection):
        is_plain = name in kinds and kinds[name] != "virtual"
        if kind == "table" and is_plain and not name.lower().startswith("sqlite_"):
            creates.append((name, sql))
        elif kind in ("index", "view"):
            others.append(sql)
    tables = []
    for name, create in creates:
        try:
            columns, rows = _read_rows(
                connection, name, max_rows, max_value_bytes, max_bytes // len(creates)
            )
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            continue
        if columns:
            tables.append((name, create, columns, rows))
    return tables, others


def _table_kinds(connection: sqlite3.Connection) -> dict[str, str]:
    """Name -> table, view, virtual or shadow (a table that holds the content of a virtual one)."""
    kinds = {}
    for schema, name, kind, *_ in connection.execute("PRAGMA table_list"):
        if schema == "main":
            kinds[name] = kind
    return kinds


def _read_rows(
    connection: sqlite3.Connection, name: str, max_rows: int, max_value_bytes: int, max_bytes: int
) -> tuple[list[str], list[tuple]]:
    """-> (stored columns, rows) of a table, within bounds."""
    found = connection.execute(_STORED_COLUMNS, (name,)).fetchall()
    columns = [column for column, hidden in found if not hidden]
    # SQLite reads a quoted name that is not a column as a text, so columns are named only if some
    # are left out.
    picked = "*" if len(columns) == len(found) else ", ".join(map(quoted, columns))
    query = f"SELECT {picked} FROM {quoted(name)} LIMIT ?"
    rows = []
    num_bytes = 0
    for row in connection.execute(query, (max_rows,)):
        row = tuple(_truncated(cell, max_value_bytes) for cell in row)
        num_bytes += row_bytes(row)
        if num_bytes > max_bytes:
            break
        rows.append(row)
    return columns, rows


def _truncated(cell: object, max_bytes: int) -> object:
    may_be_json = isinstance(cell, str) and cell.startswith(("{", "["))
    if isinstance(cell, (str, bytes)) and not may_be_json:
        return cell[:max_bytes]
    return cell


def _objects(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """-> (type, name, CREATE statement) of all objects whose name and statement are UTF-8."""
    connection.text_factory = bytes
    try:
        rows = connection.execute(_OBJECTS).fetchall()
    finally:
        connection.text_factory = decode
    found = []
    for row in rows:
        try:
            found.append(tuple(cell.decode() for cell in row))
        except (UnicodeDecodeError, AttributeError):  # a damaged schema holds any type
            continue
    return found


_ROW_ORDER = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\] | --[^\n]* | /\*.*?\*/
        | \b(?P<kind>integer)\b
        | (?P<rule>\bautoincrement\b | ,\s*without\s+rowid\b | \bwithout\s+rowid\b\s*,?)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


def _without_row_order(create: str, columns: list[str]) -> str:
    """A CREATE statement of the same table whose rows SQLite stores in the order of insertion.

    INTEGER PRIMARY KEY and WITHOUT ROWID store rows by their key. INT PRIMARY KEY does not, and its
    column has the same affinity. A table with a column named integer stays as it is.
    """
    if any(column.lower() == "integer" for column in columns):
        return create
    return _ROW_ORDER.sub(_without_key_order, create)


def _without_key_order(match: re.Match[str]) -> str:
    if match["kind"]:
        return "INT"
    if match["rule"]:
        return ""
    return match[0]  # quoted text or a comment


def written(
    tables: list[tuple[str, str, list[str], list[tuple]]],
    others: list[str],
    is_reversed: bool = False,
) -> list[tuple[str, list[tuple] | None]]:
    """Turn what `read_tables` returns into what `open_memory` takes: statements with their rows.

    is_reversed: the rows of each table are stored in the opposite order.
    """
    # Unique indexes reject rows, so they come before the rows. Other indexes are built faster after
    # them.
    others = [sql for sql in others if sql.strip()]
    unique = [sql for sql in others if sql.split(None, 2)[1].upper() == "UNIQUE"]
    steps: list[tuple[str, list[tuple] | None]] = []
    for _, create, columns, _ in tables:
        steps.append((_without_row_order(create, columns) if is_reversed else create, None))
    steps += [(sql, None) for sql in unique]
    for name, _, columns, rows in tables:
        names = ", ".join(map(quoted, columns))
        marks = ", ".join("?" * len(columns))
        insert = f"INSERT OR IGNORE INTO {quoted(name)} ({names}) VALUES ({marks})"
        steps.append((insert, rows[::-1] if is_reversed else rows))
    steps += [(sql, None) for sql in others if sql not in unique]
    return steps


def read_schema(connection: sqlite3.Connection) -> list[tuple[str, list[tuple], list[tuple], bool]]:
    """-> (name, (column, declared type, place in the primary key), foreign keys, whether it is a
    virtual table or holds the content of one) of every table and view that SQLite can resolve."""
    kinds = _table_kinds(connection)
    tables = []
    for name, _ in connection.execute(_TABLE_NAMES).fetchall():
        if not isinstance(name, str):  # a damaged schema holds any type
            continue
        try:
            columns = connection.execute(_COLUMNS, (name,)).fetchall()
            keys = connection.execute(_FOREIGN_KEYS, (name,)).fetchall()
        except UNREADABLE as error:  # a view over deleted tables, or a module that is not loaded
            if is_out_of_memory(error):
                raise
            continue
        if columns:
            tables.append((name, columns, keys, kinds.get(name) in ("virtual", "shadow")))
    return tables
