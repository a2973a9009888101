"""A schema as an entry of the official tables.json (`load_schemas` in schema.py reads it)."""

import re

from mtsql.sql.names import fold
from mtsql.sql.schema import Schema

_KINDS = (
    ("boolean", r"bool|^bit$"),
    ("time", r"date|time|year"),
    ("number", r"int|num|dec|real|floa|doub|money|serial"),
    ("text", r"char|text|clob|string|enum|^$"),
)
"""Official type -> what a declared type of this kind has in it. The first one that fits counts."""


def tables_entry(schema: Schema) -> dict:
    """The entry of a schema: `load_schemas` reads it back with the official types of columns."""
    column_names: list[list] = [[-1, "*"]]
    column_types = ["text"]
    places: dict[tuple[str, str], int] = {}
    for number, table in enumerate(schema.tables):
        for column in table.columns:
            places[fold(table.name), fold(column.name)] = len(column_names)
            column_names.append([number, column.name])
            column_types.append(official_type(column.type))
    return {
        "db_id": schema.db_id,
        "table_names_original": [table.name for table in schema.tables],
        "table_names": [_readable(table.name) for table in schema.tables],
        "column_names_original": column_names,
        "column_names": [[number, _readable(name)] for number, name in column_names],
        "column_types": column_types,
        "primary_keys": [
            places[fold(table.name), fold(column)]
            for table in schema.tables
            for column in table.primary_key
        ],
        "foreign_keys": [
            [places[fold(table), fold(column)] for table, column in key]
            for key in schema.foreign_keys
        ],
    }


def official_type(declared: str) -> str:
    """text, number, time, boolean or others, for a type as CREATE TABLE has it."""
    name = declared.strip().lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "others")


def _readable(name: str) -> str:
    """A name as the official files write it for people."""
    return name.lower().replace("_", " ")
