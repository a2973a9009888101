"""Tables, columns and keys of a database, from tables.json or a database file; their text for the
prompt."""

from dataclasses import dataclass
from pathlib import Path

from mtsql.sql.names import checked_id, fold, quoted
from mtsql.sql.questions import read_json_list
from mtsql.sql.sandbox import DatabaseFileError, read_schema

ColumnRef = tuple[str, str]
"""(table name, column name)."""


@dataclass(frozen=True)
class Column:
    name: str
    type: str


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """Names keep the case and the order of their source: indices in tables.json count columns in
    this order.

    A foreign key is a pair (referring column, referred column). A key over several columns is
    several pairs, as in tables.json.
    """

    db_id: str
    tables: tuple[Table, ...]
    foreign_keys: tuple[tuple[ColumnRef, ColumnRef], ...] = ()

    def __hash__(self) -> int:
        # Caches key parses by schema: hashing every column each time would cost more.
        return hash(self.db_id)


@dataclass(frozen=True)
class Database:
    """A database in use: its schema, as the model is shown it, and its SQLite file."""

    schema: Schema
    path: Path


def load_schemas(tables_json: Path) -> dict[str, Schema]:
    """Read a Spider-style tables.json into {database id: Schema}.

    Primary keys may be column indices (Spider 2018-2020) or lists of them (composite keys in later
    variants). Raises ValueError naming the file and, where one is at fault, the entry and its key.
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

    def field(key: str, kind: type) -> object:
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
        refs.append(None if table_index == -1 else (table_names[table_index], name))
        if table_index != -1:
            columns[table_index].append(Column(name, kind))

    def ref(index: object, key: str) -> ColumnRef:
        if type(index) is not int or not 0 <= index < len(refs) or refs[index] is None:
            raise ValueError(f"{where}: {key}: {index!r:.80} is not the index of a column")
        return refs[index]

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
    """Read the schema of any SQLite file, without writing to it. db_id: by default the file's
    stem.

    Tables and views in order of creation, without SQLite's own (`sqlite_...`). Virtual tables (FTS,
    R-tree), which no query may read, and the tables in which they keep their content come with
    `has_virtual` only. Types are the
    declared ones, lower-cased. A foreign key that names no column refers to the other table's
    primary key; one to a table that is not there is left out, and so is a view that SQLite cannot
    resolve, since no query can read it. Raises ValueError naming the file if it is missing or no
    database.
    """
    try:
        found = read_schema(db_path)
    except DatabaseFileError as error:
        raise ValueError(str(error)) from error
    tables: dict[str, Table] = {}  # by folded name
    found = [table for table in found if has_virtual or not table[3]]
    for name, rows, _, _ in found:
        columns = tuple(Column(column, " ".join(kind.lower().split())) for column, kind, _ in rows)
        key = sorted((position, column) for column, _, position in rows if position)
        tables[fold(name)] = Table(name, columns, tuple(column for _, column in key))
    links = [
        link
        for name, _, keys, _ in found
        for link in _foreign_keys(tables[fold(name)], keys, tables)
    ]
    return Schema(db_id or Path(db_path).stem, tuple(tables.values()), tuple(links))


def first_difference(schema: Schema, own: Schema) -> str:
    """The first table or column of `schema` that `own`, read from the file, does not have, such as
    "column singer.Nme"; empty if it has all. Names are compared as SQLite compares them. SQLite's
    own tables (`sqlite_...`) do not count: official files list some, and `own` has none."""
    columns = {
        fold(table.name): {fold(column.name) for column in table.columns} for table in own.tables
    }
    for table in schema.tables:
        if fold(table.name).startswith("sqlite_"):
            continue
        if fold(table.name) not in columns:
            return f"table {quoted(table.name)}"
        for column in table.columns:
            if fold(column.name) not in columns[fold(table.name)]:
                return f"column {_ref_text(table.name, column.name)}"
    return ""


def _foreign_keys(
    table: Table, rows: list[tuple], tables: dict[str, Table]
) -> list[tuple[ColumnRef, ColumnRef]]:
    found = []
    for other_name, column, other_column, position in rows:
        other = tables.get(fold(other_name))
        if other is None:
            continue
        if other_column is None:
            other_column = other.primary_key[position] if position < len(other.primary_key) else ""
        refs = _own_case(table, column), _own_case(other, other_column)
        if None not in refs:
            found.append(refs)
    return found


def _own_case(table: Table, column: str) -> ColumnRef | None:
    """The column as its table spells it; declarations of keys may spell it in another case."""
    for own in table.columns:
        if fold(own.name) == fold(column):
            return table.name, own.name
    return None


def schema_text(schema: Schema) -> str:
    """The schema as the model reads it; a name that SQL must quote is quoted.

    stadium(Stadium_ID number, Name text)
    concert(concert_ID number, Stadium_ID text)
    PK: stadium.Stadium_ID, concert.concert_ID
    FK: concert.Stadium_ID = stadium.Stadium_ID
    """
    lines = []
    for table in schema.tables:
        columns = ", ".join(
            f"{quoted(column.name)} {column.type}".rstrip() for column in table.columns
        )
        lines.append(f"{quoted(table.name)}({columns})")
    keys = [
        _ref_text(table.name, column) for table in schema.tables for column in table.primary_key
    ]
    if keys:
        lines.append("PK: " + ", ".join(keys))
    links = [f"{_ref_text(*ref)} = {_ref_text(*other)}" for ref, other in schema.foreign_keys]
    if links:
        lines.append("FK: " + ", ".join(links))
    return "\n".join(lines)


def _ref_text(table: str, column: str) -> str:
    return f"{quoted(table)}.{quoted(column)}"
