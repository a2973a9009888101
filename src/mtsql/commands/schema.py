"""Write the official tables.json of database files.

    mtsql schema my.sqlite > tables.json
    mtsql schema database > tables.json       # a folder of databases

Each FILE is a SQLite database, and the name of the file without its ending is
its id. A FOLDER stands for all its databases: <id>/<id>.sqlite and
<id>.sqlite, also with .sqlite3, .db or .db3. The result is printed to the
standard output after all files have been read.

Tables and views are listed in the order of their creation. The official
format has five types of columns (text, number, time, boolean, others), so the
declared types are lost. A key over several columns is written as several
entries. Everything else can be read back as it is in the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mtsql.commands.arguments import positional
from mtsql.files import print_line
from mtsql.sql.database_files import DatabaseFolder, unread_changes
from mtsql.sql.names import checked_id
from mtsql.sql.schema import schema_from_sqlite
from mtsql.sql.tables_json import tables_entry


def main(words: Sequence[str]) -> None:
    """Read the databases that the words name and print tables.json."""
    paths = positional(words, __doc__, "FILE_OR_FOLDER")
    print_line(json.dumps(entries_of([Path(path) for path in paths]), indent=1))


def entries_of(paths: Sequence[Path]) -> list[dict]:
    """The entries of tables.json for files and folders, in their order.

    ValueError names a file that cannot be read, has no tables, or has the id of another file.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            found = DatabaseFolder(path).all()
            if not found:
                raise ValueError(f"{path}: no database in this folder (ID/ID.sqlite or ID.sqlite)")
        else:
            found = {checked_id(path.stem, str(path)): path}
        for db_id, file in found.items():
            if db_id in files:
                raise ValueError(f"two files for the database {db_id!r}: {files[db_id]}, {file}")
            files[db_id] = file
    entries = []
    for db_id, file in files.items():
        schema = schema_from_sqlite(file, db_id)
        if not schema.tables:
            raise ValueError(f"{file}: the database has no tables{unread_changes(file)}")
        entries.append(tables_entry(schema))
    return entries
