"""Where the file of a database is, by its id.

A folder of databases has `<id>/<id>.sqlite`, or `<id>.sqlite` in the folder itself. Other endings
are .sqlite3, .db and .db3, in any case. The id is compared exactly, upper and lower case included.
"""

import os
from pathlib import Path

from mtsql.sql.names import checked_id, fold

SUFFIXES = (".sqlite", ".sqlite3", ".db", ".db3")
"""Endings of a database file, in lower case."""


class DatabaseFolder:
    """A folder of databases. It is listed once. ValueError that names it if it cannot be listed.

    path: the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            is_file = self.path.is_file()
            fault = "a file, name the folder it is in" if is_file else "no such folder of databases"
            raise ValueError(f"{self.path}: {fault}")
        self.names = _names_in(self.path)
        self.flat: dict[str, list[Path]] = {}  # id -> files of the folder itself
        for name in self.names:
            if is_database_name(name):
                self.flat.setdefault(Path(name).stem, []).append(self.path / name)

    def find(self, db_id: str) -> Path | None:
        """The file of a database, or None if there is none. ValueError that names the files if
        there are several."""
        checked_id(db_id, str(self.path))
        folder = self.path / db_id
        found = [path for path in self.flat.get(db_id, []) if path.is_file()]
        if db_id in self.names and folder.is_dir():
            names = [name for name in _names_in(folder) if is_database_name(name)]
            paths = [folder / name for name in names if Path(name).stem == db_id]
            found += [path for path in paths if path.is_file()]
        found = list({path.resolve(): path for path in found}.values())  # a link is no second file
        if len(found) > 1:
            paths = ", ".join(map(str, sorted(found)))
            raise ValueError(f"database {db_id!r} has {len(found)} files, keep one: {paths}")
        return found[0] if found else None

    def missing(self, db_id: str) -> str:
        """Why there is no file, for a message: the path that is expected first."""
        return f"no database file {self.path / db_id / f'{db_id}.sqlite'}{self._near(db_id)}"

    def _near(self, db_id: str) -> str:
        """What the folder has instead, for a message; empty if it has nothing like it."""
        expected = {db_id, *(f"{db_id}{suffix}" for suffix in SUFFIXES)}
        same = {fold(name) for name in expected}
        inside = _names_in(self.path / db_id) if (self.path / db_id).is_dir() else []
        for name in (*self.names, *inside):
            if name not in expected and fold(name) in same:
                return f" (there is {name}, in another case)"
        databases = [name for name in inside if is_database_name(name) and name[:1] != "."]
        if databases and databases[0] not in expected:
            return f" (there is {databases[0]}: give it the name of its folder)"
        for name in self.names:
            if (self.path / name / db_id).is_dir():
                return f" (it is in {self.path / name}: name that folder)"
        return ""

    def all(self) -> dict[str, Path]:
        """Every database of the folder by its id, sorted. ValueError as `find`."""
        ids = {name for name in self.names if (self.path / name).is_dir()} | self.flat.keys()
        ids = {db_id for db_id in ids if not db_id.startswith(".")}  # hidden: of other programs
        found = {db_id: self.find(db_id) for db_id in sorted(ids)}
        return {db_id: path for db_id, path in found.items() if path is not None}


def is_database_name(name: str) -> bool:
    """Whether a file of this name is meant to be a database."""
    return Path(name).suffix.lower() in SUFFIXES


def unread_changes(path: Path) -> str:
    """What to say of changes beside the file that no reader of it sees; empty if there are none."""
    wal = Path(f"{path}-wal")
    if not wal.is_file() or wal.stat().st_size == 0:
        return ""
    return f" ({wal.name} holds changes that are not read: open and close the file with sqlite3)"


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror}") from error
