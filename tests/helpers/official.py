"""A small schema, and the verdicts and queries of the official data."""

import csv
import json
from functools import lru_cache
from pathlib import Path

from mtsql.sql.schema import Column, Schema, Table

TESTS = Path(__file__).resolve().parents[1]
GOLD_FILES = (
    "sparc/dev",
    "sparc/train",
    "cosql/dev",
    "cosql/train",
    "spider/dev",
    "spider/train_spider",
)

SINGER = Table(
    "singer",
    (Column("singer_id", "number"), Column("name", "text"), Column("age", "number")),
)
SONG = Table(
    "song",
    (Column("song_id", "number"), Column("singer_id", "number"), Column("name", "text")),
)
SHOWS = Schema("shows", (SINGER, SONG), ((("song", "singer_id"), ("singer", "singer_id")),))


def table_rows(name: str) -> list[dict[str, str]]:
    """The rows of a tab-separated file in tests/, with the names of its columns as keys."""
    with open(TESTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def conformance_pairs(shared: Path) -> list[dict]:
    """Predictions and gold queries with the verdicts of the official program."""
    text = (shared / "conformance" / "metrics_examples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@lru_cache(maxsize=1)
def all_golds(shared: Path) -> list[tuple[str, str]]:
    """(database id, SQL) of every distinct gold of SParC, CoSQL and Spider."""
    found = set()
    for name in GOLD_FILES:
        for item in json.loads((shared / "data" / f"{name}.json").read_text()):
            db_id = item.get("database_id") or item["db_id"]
            for turn in item.get("interaction", [item]):
                if turn["query"]:
                    found.add((db_id, turn["query"]))
    return sorted(found)
