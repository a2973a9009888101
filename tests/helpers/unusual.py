"""A database with the features of SQLite that altered copies must keep."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

SCRIPT = """
CREATE TABLE place (code TEXT PRIMARY KEY COLLATE NOCASE, name TEXT) WITHOUT ROWID;
CREATE TABLE shop (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT COLLATE NOCASE, place TEXT REFERENCES place,
    zip TEXT, grp INT, twice INT AS (grp * 2), opened TEXT, kind TEXT CHECK (kind IN ('a', 'b'))
);
CREATE INDEX by_group ON shop (grp);
CREATE UNIQUE INDEX by_name ON shop (name);
CREATE VIEW big AS SELECT name, grp, zip FROM shop WHERE grp > 1;
CREATE TABLE strict_one (a INT, b TEXT) STRICT;
CREATE TABLE fact (k TEXT, v);
"""
CODES = [f"c{i}" for i in range(8)]
NUM_SHOPS = 120
NUMBER_LIKE = ("1e5", "1_000", "Infinity", " 42", "02139", "nan")
"""Texts that some programs read as numbers."""


def make_unusual(path: Path) -> Path:
    """Write the database file."""
    rng = random.Random(0)
    places = [(code, f"Place {code}") for code in CODES]
    shops = [
        (
            f"Shop {i}",
            rng.choice(CODES),
            f"{2100 + i % 40:05}",
            i % 7,
            f"20{i % 20:02}-0{1 + i % 9}-11",
            "ab"[i % 2],
        )
        for i in range(NUM_SHOPS)
    ]
    strict = [(i % 9, f"t{i % 5}") for i in range(40)]
    facts = [(value, value) for value in NUMBER_LIKE * 10]
    columns = "name, place, zip, grp, opened, kind"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCRIPT)
        connection.executemany("INSERT INTO place VALUES (?, ?)", places)
        connection.executemany(f"INSERT INTO shop ({columns}) VALUES (?, ?, ?, ?, ?, ?)", shops)
        connection.executemany("INSERT INTO strict_one VALUES (?, ?)", strict)
        connection.executemany("INSERT INTO fact VALUES (?, ?)", facts)
    return path
