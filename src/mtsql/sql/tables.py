"""Read a database's schema and rows, and write rows as SQL. Runs in a SQL worker; no model's SQL
is involved."""

import sqlite3

from mtsql.sql.connection import UNREADABLE, is_out_of_memory, row_bytes

_TABLE_NAMES = """SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')
                  AND name NOT LIKE 'sqlite^_%' ESCAPE '^' ORDER BY rowid"""
# hidden 1 marks columns of virtual tables that `SELECT *` does not show.
_COLUMNS = "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden != 1 ORDER BY cid"
# SQLite numbers foreign keys from the last one declared.
_FOREIGN_KEYS = (
    'SELECT "table", "from", "to", seq FROM pragma_foreign_key_list(?) ORDER BY id DESC, seq'
)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# Words that would not be part of the type in a CREATE TABLE.
_CONSTRAINTS = frozenset(
    "ALWAYS AS AUTOINCREMENT CHECK COLLATE CONSTRAINT DEFAULT FOREIGN GENERATED KEY NOT NULL ON"
    " PRIMARY REFERENCES UNIQUE".split()
)


def read_tables(
    connection: sqlite3.Connection,
    max_rows: int = -1,
    max_value_bytes: int = 2**30,
    max_bytes: int = 2**40,
) -> list[tuple[str, list[tuple[str, str]], list[tuple]]]:
    """-> (name, (column, declared type) pairs, rows) of every ordinary table.

    max_rows: of each table. max_value_bytes: longer values are cut.
    max_bytes: of all rows as Python objects. Each table gets an equal share; its further rows are
    left out. Virtual tables, and tables that SQLite cannot read (a damaged page, a name that is not
    UTF-8), are left out.
    """
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
    plain = {
        row[1]
        for row in connection.execute("PRAGMA table_list")
        if row[0] == "main" and row[2] != "virtual"
    }
    names = [name for (name,) in found if name in plain and not name.lower().startswith("sqlite_")]
    tables = []
    for name in names:
        try:
            columns = [(column, kind) for column, kind, _ in connection.execute(_COLUMNS, (name,))]
            rows, num_bytes = [], 0
            for row in connection.execute(f"SELECT * FROM {quoted(name)} LIMIT ?", (max_rows,)):
                row = tuple(c[:max_value_bytes] if isinstance(c, (str, bytes)) else c for c in row)
                num_bytes += row_bytes(row)
                if num_bytes > max_bytes // len(names):
                    break
                rows.append(row)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            continue
        if columns:
            tables.append((name, columns, rows))
    return tables


def written(
    tables: list[tuple[str, list[tuple[str, str]], list[tuple]]],
) -> list[tuple[str, str, list[tuple]]]:
    """Turn what `read_tables` returns into what `open_memory` takes: no keys, no indexes, the
    same order of rows."""
    out = []
    for name, columns, rows in tables:
        declared = ", ".join(f"{quoted(column)} {_declared(kind)}" for column, kind in columns)
        marks = ", ".join("?" * len(columns))
        out.append(
            (
                f"CREATE TABLE {quoted(name)} ({declared})",
                f"INSERT INTO {quoted(name)} VALUES ({marks})",
                rows,
            )
        )
    return out


def _declared(kind: str) -> str:
    """A declared type for a CREATE TABLE: unchanged if it is plain, quoted if it contains
    unusual characters."""
    words, bracket, sizes = kind.partition("(")
    is_plain = words.replace(" ", "").replace("_", "").isalnum() or not kind
    is_plain &= not _CONSTRAINTS.intersection(words.upper().split())
    if bracket:
        is_plain &= sizes.endswith(")") and sizes[:-1].replace(",", "").replace(" ", "").isdigit()
    return kind if is_plain else quoted(kind)


def read_schema(connection: sqlite3.Connection) -> list[tuple[str, list[tuple], list[tuple]]]:
    """-> (name, (column, declared type, place in the primary key), foreign keys) of every table
    and view that SQLite can resolve."""
    tables = []
    for name in [name for name, _ in connection.execute(_TABLE_NAMES) if isinstance(name, str)]:
        try:
            columns = connection.execute(_COLUMNS, (name,)).fetchall()
            keys = connection.execute(_FOREIGN_KEYS, (name,)).fetchall()
        except UNREADABLE as error:  # a view over tables that are gone, a module that is not loaded
            if is_out_of_memory(error):
                raise
            continue
        if columns:
            tables.append((name, columns, keys))
    return tables
