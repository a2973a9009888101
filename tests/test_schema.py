"""Schemas from tables.json, from a .sqlite file, and as text."""

import json

import pytest

from helpers.databases import make_database
from mtsql.sql.schema import Column, Schema, Table, load_schemas, schema_from_sqlite, schema_text

ENTRY = {
    "db_id": "shows",
    "table_names_original": ["Stadium", "concert"],
    "column_names_original": [
        [-1, "*"],
        [0, "Stadium_ID"],
        [0, "Home Town"],
        [1, "concert_ID"],
        [1, "Stadium_ID"],
    ],
    "column_types": ["text", "number", "text", "number", "text"],
    "primary_keys": [1, 3],
    "foreign_keys": [[4, 1]],
}
SCHEMA = Schema(
    "shows",
    (
        Table(
            "Stadium",
            (Column("Stadium_ID", "number"), Column("Home Town", "text")),
            ("Stadium_ID",),
        ),
        Table(
            "concert",
            (Column("concert_ID", "number"), Column("Stadium_ID", "text")),
            ("concert_ID",),
        ),
    ),
    ((("concert", "Stadium_ID"), ("Stadium", "Stadium_ID")),),
)


WRONG_TABLE_INDEX = [[-1, "*"], [7, "a"], [0, "b"], [0, "c"], [1, "d"]]


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_a_tables_json_is_read_as_a_schema(tmp_path):
    assert load_schemas(write(tmp_path / "tables.json", [ENTRY])) == {"shows": SCHEMA}


def test_composite_primary_keys_may_be_lists(tmp_path):
    path = write(tmp_path / "tables.json", [ENTRY | {"primary_keys": [1, [3, 4]]}])
    assert load_schemas(path)["shows"].tables[1].primary_key == ("concert_ID", "Stadium_ID")


@pytest.mark.parametrize(
    "value, words",
    [
        ("[{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ({"db_id": "x"}, ["expected a list", "dict"]),
        (["x"], ["entry 0", "str"]),
        ([ENTRY, {}], ["entry 1", "db_id", "nothing"]),
        ([ENTRY, ENTRY], ["entry 1", "'shows'", "twice"]),
        (
            [{k: v for k, v in ENTRY.items() if k != "primary_keys"}],
            ["entry 0 (shows)", "primary_keys"],
        ),
        ([ENTRY | {"table_names_original": [1]}], ["shows", "table_names_original"]),
        ([ENTRY | {"column_types": ["text"]}], ["shows", "column_types"]),
        (
            [ENTRY | {"column_names_original": WRONG_TABLE_INDEX}],
            ["shows", "column_names_original[1]", "7"],
        ),
        ([ENTRY | {"primary_keys": [99]}], ["shows", "primary_keys", "99"]),
        ([ENTRY | {"primary_keys": [0]}], ["shows", "primary_keys", "0"]),
        ([ENTRY | {"foreign_keys": [[4]]}], ["shows", "foreign_keys", "[4]"]),
        ([ENTRY | {"foreign_keys": [[4, -1]]}], ["shows", "foreign_keys", "-1"]),
    ],
)
def test_malformed_tables_json_is_named(tmp_path, value, words):
    path = write(tmp_path / "tables.json", value)
    with pytest.raises(ValueError) as caught:
        load_schemas(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_tables_json_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: cannot be read: No such file"):
        load_schemas(tmp_path / "nowhere.json")


SHOWS = """
    CREATE TABLE Stadium
        (Stadium_ID INTEGER PRIMARY KEY AUTOINCREMENT, Name VARCHAR(20), anything);
    CREATE TABLE part (b INT, a INT, twice AS (a + a), PRIMARY KEY (a, b));
    CREATE TABLE concert (
        stadium INT REFERENCES stadium, name TEXT REFERENCES STADIUM(name),
        x INT REFERENCES gone(x), p INT, q INT, FOREIGN KEY (p, q) REFERENCES part);
    CREATE VIEW names AS SELECT name FROM Stadium;
    CREATE VIEW broken AS SELECT name FROM gone;
"""


def test_a_database_file_is_read_as_a_schema(tmp_path):
    path = make_database(tmp_path / "shows.sqlite", SHOWS)
    before = path.read_bytes()
    schema = schema_from_sqlite(path)
    assert schema_text(schema).splitlines() == [
        "Stadium(Stadium_ID integer, Name varchar(20), anything)",
        "part(b int, a int, twice)",
        "concert(stadium int, name text, x int, p int, q int)",
        "names(Name varchar(20))",
        "PK: Stadium.Stadium_ID, part.a, part.b",
        "FK: concert.stadium = Stadium.Stadium_ID, concert.name = Stadium.Name, "
        "concert.p = part.a, concert.q = part.b",
    ]
    assert schema.db_id == "shows"
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["shows.sqlite"]


@pytest.mark.parametrize("content", [None, b"", b"no database at all" * 100])
def test_the_error_names_a_file_that_is_no_database(tmp_path, content):
    path = tmp_path / "bad.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.sqlite"):
        schema_from_sqlite(path)


def test_schema_text_quotes_what_sql_must_quote():
    assert schema_text(SCHEMA) == (
        'Stadium(Stadium_ID number, "Home Town" text)\n'
        "concert(concert_ID number, Stadium_ID text)\n"
        "PK: Stadium.Stadium_ID, concert.concert_ID\n"
        "FK: concert.Stadium_ID = Stadium.Stadium_ID"
    )
    assert schema_text(Schema("x", (Table('a"b', (Column("c", ""),)),))) == '"a""b"(c)'


def test_official_schemas_agree_with_the_official_files(shared):
    """Tables and columns have the same order. Only SQLite's own table, which tables.json lists for
    two databases, differs."""
    schemas = load_schemas(shared / "data" / "tables.json")
    assert len(schemas) == 166
    differing = []
    num_files = 0
    for db_id, schema in schemas.items():
        path = shared / "data" / "database" / db_id / f"{db_id}.sqlite"
        if path.exists():
            num_files += 1
            if _names(schema) != _names(schema_from_sqlite(path)):
                differing.append(db_id)
    assert num_files == 163 and differing == ["world_1", "store_1"]
    types = set()
    for schema in schemas.values():
        for table in schema.tables:
            types |= {column.type for column in table.columns}
    assert types == {"text", "number", "time", "boolean", "others"}


def _names(schema):
    names = []
    for table in schema.tables:
        names.append((table.name.lower(), [column.name.lower() for column in table.columns]))
    return names
