"""What a conversation starts with: a database, a model, and what was learned about both."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from mtsql.files import read_text
from mtsql.sql.database_files import DatabaseFolder, unread_changes
from mtsql.sql.datasets import DataConfig, toy_files
from mtsql.sql.names import checked_id
from mtsql.sql.questions import read_conversations
from mtsql.sql.schema import Database, schema_from_sqlite

RUNS = Path("runs")
"""Where the scripts leave their runs, unless they are told otherwise."""
WARM_STARTS = RUNS / "warm-start"


@dataclass(frozen=True)
class Embedded:
    """A model that was trained on the embedded world, and the embedded world's folder."""

    model: Path
    toy_folder: str
    toy_seed: int


def open_database(file: Path) -> Database:
    """The database of any SQLite file, its schema read from the file.

    ValueError that names the file if it is missing, is no database, has no tables, or has a name
    that cannot be the id of a database.
    """
    db_id = checked_id(file.stem, str(file))
    schema = schema_from_sqlite(file, db_id)
    if not schema.tables:
        raise ValueError(f"{file}: the database has no tables{unread_changes(file)}")
    return Database(schema, file)


def newest_embedded() -> Embedded | None:
    """The model of the newest finished run on the embedded world or, without one, of the newest
    warm start. None if there is neither."""
    for folder in (RUNS, WARM_STARTS):
        found = [one for one in map(_embedded_in, _folders(folder)) if one is not None]
        if found:
            return max(found, key=lambda one: (one.model / "config.json").stat().st_mtime)
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _embedded_in(run: Path) -> Embedded | None:
    """The model of a run folder, if the run is finished and its data are the embedded world's."""
    recipe = run / "config.yaml"
    model = run / "model"
    if run.name.endswith("-dry"):  # a random model
        return None
    if not recipe.is_file() or not (model / "config.json").is_file():
        return None
    try:
        data = (yaml.safe_load(read_text(recipe)) or {}).get("data", {})
        if data["dev"] is not None:
            return None
        return Embedded(model, str(data["toy_folder"]), int(data["toy_seed"]))
    except (ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return None  # a file of another program, or a damaged one


def toy_database(embedded: Embedded) -> tuple[Path, list[str]]:
    """The file of a database of the embedded world, and the questions of a dialogue on it that no
    training has seen. The world is written if it is not there."""
    folder = Path(embedded.toy_folder)
    if not folder.is_dir():
        toy_files(DataConfig(toy_folder=embedded.toy_folder, toy_seed=embedded.toy_seed))
    first = read_conversations(folder / "dev_seen.json")[0]
    file = DatabaseFolder(folder / "database").find(first.db_id)
    if file is None:
        raise ValueError(f"{folder}: no database {first.db_id}: remove the folder")
    return file, [question.text for question in first.questions]
