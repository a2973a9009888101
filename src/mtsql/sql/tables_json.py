"""A schema as an entry of the official tables.json (`load_schemas` in schema.py reads it)."""

import re

from mtsql.sql.names import fold
from mtsql.sql.schema import ColumnRef, Schema

_KINDS = (
    ("boolean", r"bool|^bit$"),
    ("time", r"date|time|year"),
    ("number", r"int|num|dec|real|floa|doub|money|serial"),
    ("text", r"char|text|clob|string|enum|^$"),
)
"""(official type, pattern of the declared types that it stands for). The first match counts."""


def tables_entry(schema: Schema) -> dict:
    """The entry of a schema. `load_schemas` reads it back with the official types of columns."""
    column_names: list[list] = [[-1, "*"]]
    column_types = ["text"]
    places: dict[tuple[str, str], int] = {}
    for number, table in enumerate(schema.tables):
        for column in table.columns:
            places[fold(table.name), fold(column.name)] = len(column_names)
            column_names.append([number, column.name])
            column_types.append(official_type(column.type))
    primary_keys = []
    for table in schema.tables:
        for key in table.primary_key:
            primary_keys.append(_place((table.name, key), places))
    foreign_keys = []
    for referring, referred in schema.foreign_keys:
        foreign_keys.append([_place(referring, places), _place(referred, places)])
    return {
        "db_id": schema.db_id,
        "table_names_original": [table.name for table in schema.tables],
        "table_names": [_readable(table.name) for table in schema.tables],
        "column_names_original": column_names,
        "column_names": [[number, _readable(name)] for number, name in column_names],
        "column_types": column_types,
        "primary_keys": primary_keys,
        "foreign_keys": foreign_keys,
    }


def _place(ref: ColumnRef, places: dict[tuple[str, str], int]) -> int:
    table, column = ref
    return places[fold(table), fold(column)]


def official_type(declared: str) -> str:
    """text, number, time, boolean or others, for a type as CREATE TABLE declares it."""
    name = declared.strip().lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "others")


def _readable(name: str) -> str:
    """A name as the official files write it in `table_names` and `column_names`."""
    return name.lower().replace("_", " ")
