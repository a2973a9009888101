"""Find the file of a database by its id.

A folder of databases has `<id>/<id>.sqlite`, or `<id>.sqlite` in the folder itself. Other endings
are .sqlite3, .db and .db3, in upper or lower case. The comparison of ids is case-sensitive.
"""

import os
from pathlib import Path

from mtsql.sql.names import checked_id, fold

SUFFIXES = (".sqlite", ".sqlite3", ".db", ".db3")
"""Endings of a database file, in lower case."""


class DatabaseFolder:
    """A folder of databases. It is listed once. ValueError that names it if it cannot be listed.

    names: everything in the folder. flat: id -> database files of the folder itself.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            fault = "no such folder of databases"
            if self.path.is_file():
                fault = "this is a file: name the folder that it is in"
            raise ValueError(f"{self.path}: {fault}")
        self.names = _names_in(self.path)
        self.flat: dict[str, list[Path]] = {}
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
            for name in _names_in(folder):
                path = folder / name
                if is_database_name(name) and path.stem == db_id and path.is_file():
                    found.append(path)
        # A link to a file does not count as a second file.
        found = list({path.resolve(): path for path in found}.values())
        if len(found) > 1:
            paths = ", ".join(map(str, sorted(found)))
            raise ValueError(f"database {db_id!r} has {len(found)} files, keep one: {paths}")
        return found[0] if found else None

    def missing(self, db_id: str) -> str:
        """A message that there is no file: the most common path, and what was found instead."""
        expected = self.path / db_id / f"{db_id}.sqlite"
        return f"no database file {expected}{self._similar(db_id)}"

    def _similar(self, db_id: str) -> str:
        """The part of a message that names a similar file or folder; empty if there is none."""
        expected = {db_id} | {f"{db_id}{suffix}" for suffix in SUFFIXES}
        folded = {fold(name) for name in expected}
        folder = self.path / db_id
        inside = _names_in(folder) if folder.is_dir() else []
        for name in (*self.names, *inside):
            if name not in expected and fold(name) in folded:
                return f" (there is {name}, in another case)"
        databases = [name for name in inside if is_database_name(name) and not _is_hidden(name)]
        if databases and databases[0] not in expected:
            return f" (there is {databases[0]}: give it the name of its folder)"
        for name in self.names:
            if (self.path / name / db_id).is_dir():
                return f" (it is in {self.path / name}: name that folder)"
        return ""

    def all(self) -> dict[str, Path]:
        """id -> file of every database of the folder, sorted by id. ValueError like `find`."""
        folders = {name for name in self.names if (self.path / name).is_dir()}
        found = {}
        for db_id in sorted(folders | self.flat.keys()):
            if _is_hidden(db_id):
                continue
            path = self.find(db_id)
            if path is not None:
                found[db_id] = path
        return found


def is_database_name(name: str) -> bool:
    """Whether a file of this name is meant to be a database."""
    return Path(name).suffix.lower() in SUFFIXES


def unread_changes(path: Path) -> str:
    """The part of a message that warns of changes in a `-wal` file, which is not read. Empty if
    there is no such file."""
    wal = Path(f"{path}-wal")
    if not wal.is_file() or wal.stat().st_size == 0:
        return ""
    return f" ({wal.name} holds changes that are not read: open and close the file with sqlite3)"


def _is_hidden(name: str) -> bool:
    """Whether another program keeps this file for itself, such as `._one.sqlite` of macOS."""
    return name.startswith(".")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror}") from error
