"""Tables, columns and keys of a database, read from tables.json or from a database file, and their
text for the prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtsql.sql.names import checked_id, fold, quoted
from mtsql.sql.questions import read_json_list
from mtsql.sql.sandbox import DatabaseFileError, read_schema

ColumnRef = tuple[str, str]
"""(table name, column name)."""


@dataclass(frozen=True)
class Column:
    """A column. type: as tables.json or the CREATE statement has it; it may be empty."""

    name: str
    type: str


@dataclass(frozen=True)
class Table:
    """A table or view, with the names of the columns of its primary key."""

    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """The tables and foreign keys of a database, spelled and ordered as in their source. Indices in
    tables.json count columns in this order.

    A foreign key is a pair (referring column, referred column). A key over several columns is
    several pairs, as in tables.json.
    """

    db_id: str
    tables: tuple[Table, ...]
    foreign_keys: tuple[tuple[ColumnRef, ColumnRef], ...] = ()

    def __hash__(self) -> int:
        # Caches of parsed queries have the schema in their keys. Hashing every column for each
        # look-up would take longer.
        return hash(self.db_id)


@dataclass(frozen=True)
class Database:
    """A database in use: its schema, as the prompt shows it, and its SQLite file."""

    schema: Schema
    path: Path


def load_schemas(tables_json: Path | str) -> dict[str, Schema]:
    """Read a Spider-style tables.json into {database id: Schema}.

    Primary keys may be column indices (Spider 2018-2020) or lists of them (composite keys in later
    variants). ValueError names the file and, if one is at fault, the entry and its key.
    """
    entries = read_json_list(tables_json)
    schemas: dict[str, Schema] = {}
    for index, entry in enumerate(entries):
        schema = _schema_from_entry(entry, f"{tables_json}: entry {index}")
        if schema.db_id in schemas:
            raise ValueError(f"{tables_json}: entry {index}: db_id {schema.db_id!r} appears twice")
        schemas[schema.db_id] = schema
    return schemas


def _schema_from_entry(entry: object, where: str) -> Schema:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, found {type(entry).__name__}")

    def field(key: str, kind: type) -> Any:
        if not isinstance(entry.get(key), kind):
            found = type(entry[key]).__name__ if key in entry else "nothing"
            raise ValueError(f"{where}: {key}: expected {kind.__name__}, found {found}")
        return entry[key]

    db_id = checked_id(field("db_id", str), f"{where}: db_id")
    where = f"{where} ({db_id})"
    table_names = field("table_names_original", list)
    column_names = field("column_names_original", list)
    column_types = field("column_types", list)
    for key, values in (("table_names_original", table_names), ("column_types", column_types)):
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key}[{index}]: expected a string, found {value!r:.80}")
    if len(column_types) != len(column_names):
        raise ValueError(
            f"{where}: column_types: {len(column_types)} types for {len(column_names)} "
            "column_names_original"
        )
    columns: list[list[Column]] = [[] for _ in table_names]
    refs: list[ColumnRef | None] = []  # by column index; None for `*`, which belongs to no table
    for index, (pair, kind) in enumerate(zip(column_names, column_types, strict=True)):
        is_pair = isinstance(pair, list) and [type(part) for part in pair] == [int, str]
        if not is_pair or not -1 <= pair[0] < len(table_names):
            raise ValueError(
                f"{where}: column_names_original[{index}]: expected [table index, name], "
                f"found {pair!r:.80}"
            )
        table_index, name = pair
        if table_index == -1:
            refs.append(None)
        else:
            refs.append((table_names[table_index], name))
            columns[table_index].append(Column(name, kind))

    def ref(index: object, key: str) -> ColumnRef:
        found = refs[index] if type(index) is int and 0 <= index < len(refs) else None
        if found is None:
            raise ValueError(f"{where}: {key}: {index!r:.80} is not the index of a column")
        return found

    for name, cols in zip(table_names, columns, strict=True):
        if not cols:
            raise ValueError(f"{where}: column_names_original: no column of table {name!r:.80}")

    primary_key: dict[str, list[str]] = {name: [] for name in table_names}
    for item in field("primary_keys", list):
        for index in item if isinstance(item, list) else [item]:
            table, column = ref(index, "primary_keys")
            primary_key[table].append(column)
    foreign_keys = []
    for pair in field("foreign_keys", list):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{where}: foreign_keys: expected pairs of column indices, found {pair!r:.80}"
            )
        foreign_keys.append((ref(pair[0], "foreign_keys"), ref(pair[1], "foreign_keys")))
    tables = tuple(
        Table(name, tuple(cols), tuple(primary_key[name]))
        for name, cols in zip(table_names, columns, strict=True)
    )
    return Schema(db_id, tables, tuple(foreign_keys))


def schema_from_sqlite(
    db_path: Path, db_id: str | None = None, has_virtual: bool = False
) -> Schema:
    """Read the schema of any SQLite file, without writing to it.

    db_id: by default the stem of the file's name. has_virtual: include virtual tables (FTS,
    R-tree), which no query may read, and the tables that hold their content.

    Tables and views come in the order of their creation, without SQLite's own (`sqlite_...`). Types
    are the declared ones in lower case. A foreign key that names no column refers to the other
    table's primary key. Left out are a foreign key to a table that does not exist and a view that
    SQLite cannot resolve, since no query can read it. ValueError names the file if it is missing or
    not a database.
    """
    try:
        found = read_schema(db_path)
    except DatabaseFileError as error:
        raise ValueError(str(error)) from error
    if not has_virtual:
        found = [entry for entry in found if not entry[3]]
    tables: dict[str, Table] = {}  # by folded name
    for name, rows, _, _ in found:
        columns = [Column(column, " ".join(kind.lower().split())) for column, kind, _ in rows]
        key = sorted((position, column) for column, _, position in rows if position)
        tables[fold(name)] = Table(name, tuple(columns), tuple(column for _, column in key))
    links: list[tuple[ColumnRef, ColumnRef]] = []
    for name, _, keys, _ in found:
        links += _foreign_keys(tables[fold(name)], keys, tables)
    return Schema(db_id or Path(db_path).stem, tuple(tables.values()), tuple(links))


def first_difference(schema: Schema, own: Schema) -> str:
    """The first table or column of `schema` that `own`, read from the file, does not have, such as
    "column singer.Nme"; empty if it has all of them.

    Names are compared as SQLite compares them. SQLite's own tables (`sqlite_...`) are ignored:
    official files list some, and `own` has none.
    """
    columns: dict[str, set[str]] = {}
    for table in own.tables:
        columns[fold(table.name)] = {fold(column.name) for column in table.columns}
    for table in schema.tables:
        name = fold(table.name)
        if name.startswith("sqlite_"):
            continue
        if name not in columns:
            return f"table {quoted(table.name)}"
        for column in table.columns:
            if fold(column.name) not in columns[name]:
                return f"column {_ref_text(table.name, column.name)}"
    return ""


def _foreign_keys(
    table: Table, rows: list[tuple], tables: dict[str, Table]
) -> list[tuple[ColumnRef, ColumnRef]]:
    """The foreign keys of a table, from the rows that `read_schema` gives."""
    found = []
    for other_name, column, other_column, position in rows:
        other = tables.get(fold(other_name))
        if other is None:
            continue
        if other_column is None and position < len(other.primary_key):
            other_column = other.primary_key[position]
        referring = _own_case(table, column)
        referred = _own_case(other, other_column or "")
        if referring is not None and referred is not None:
            found.append((referring, referred))
    return found


def _own_case(table: Table, column: str) -> ColumnRef | None:
    """The column as its table spells it, because a foreign key may spell it in another case."""
    for own in table.columns:
        if fold(own.name) == fold(column):
            return table.name, own.name
    return None


def schema_text(schema: Schema) -> str:
    """The schema as the model reads it. A name that SQL must quote is quoted.

    stadium(Stadium_ID number, Name text)
    concert(concert_ID number, Stadium_ID text)
    PK: stadium.Stadium_ID, concert.concert_ID
    FK: concert.Stadium_ID = stadium.Stadium_ID
    """
    lines = []
    keys = []
    for table in schema.tables:
        columns = [f"{quoted(column.name)} {column.type}".rstrip() for column in table.columns]
        lines.append(f"{quoted(table.name)}({', '.join(columns)})")
        keys += [_ref_text(table.name, column) for column in table.primary_key]
    if keys:
        lines.append("PK: " + ", ".join(keys))
    links = [f"{_ref_text(*ref)} = {_ref_text(*other)}" for ref, other in schema.foreign_keys]
    if links:
        lines.append("FK: " + ", ".join(links))
    return "\n".join(lines)


def _ref_text(table: str, column: str) -> str:
    return f"{quoted(table)}.{quoted(column)}"
