"""Official files on a tiny database."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from mtsql.judge.score_files import Report, ScorerConfig, score_files

NAMES = "SELECT name FROM singer"
AGES = "SELECT age FROM singer ORDER BY age"
OLDEST = "SELECT name FROM singer WHERE age > 35 ORDER BY age LIMIT 1"
ENTRY = {
    "db_id": "shows",
    "table_names_original": ["singer"],
    "column_names_original": [[-1, "*"], [0, "name"], [0, "age"]],
    "column_types": ["text", "text", "number"],
    "primary_keys": [],
    "foreign_keys": [],
}


def make_scoring_folder(folder: Path) -> Path:
    """Write tables.json and a database; the database "gone" has an entry but no file."""
    (folder / "tables.json").write_text(json.dumps([ENTRY, ENTRY | {"db_id": "gone"}]))
    add_database(folder, "shows", "('Ann', 30), ('Bob', 40)")
    return folder


def add_database(folder: Path, name: str, values: str) -> None:
    """Write one more file of the database "shows"."""
    (folder / "shows").mkdir(exist_ok=True)
    with closing(sqlite3.connect(folder / "shows" / f"{name}.sqlite")) as connection:
        connection.executescript(
            f"CREATE TABLE singer (name TEXT, age INT); INSERT INTO singer VALUES {values};"
        )


def score(
    folder: Path, golds: list[str], preds: list[str], db_id: str = "shows", **options: object
) -> Report:
    """Write gold.txt and pred.txt and score them. A blank text ends an interaction."""
    gold_lines = [f"{sql}\t{db_id}" if sql else "" for sql in golds]
    (folder / "gold.txt").write_text("\n".join(gold_lines))
    (folder / "pred.txt").write_text("\n".join(preds))
    files = (folder / name for name in ("gold.txt", "pred.txt", "tables.json"))
    return score_files(*files, [folder], ScorerConfig(**options))
