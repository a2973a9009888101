"""Gold and prediction files in the official format.

Gold: `SQL<TAB>db_id` a line; prediction: one SQL a line, what follows a tab is no part of it. A
blank line ends an interaction in both. Every line is stripped.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtsql.files import read_text
from mtsql.sql.database_files import DatabaseFolder
from mtsql.sql.names import RESERVED, checked_id

NO_ANSWER = "no answer"
"""The line of a turn without an answer. The official program counts it as wrong; an empty line
would end the dialogue."""


@dataclass(frozen=True)
class GoldLine:
    line: int  # from 1
    sql: str
    db_id: str


def read_gold(path: Path) -> list[list[GoldLine]]:
    """Interactions of (SQL, database id). ValueError naming file and line where the tab is missing
    or the id is no plain name."""
    interactions = []
    for lines in _read_interactions(path):
        turns = []
        for number, text in lines:
            sql, tab, rest = text.partition("\t")
            where = f"{path}:{number}"
            if not tab:
                raise ValueError(f"{where}: expected SQL<TAB>database id, found no tab")
            db_id = checked_id(rest.split("\t")[0].strip(), where)
            turns.append(GoldLine(number, sql, db_id))
        interactions.append(turns)
    return interactions


def read_predictions(path: Path) -> list[list[str]]:
    """Interactions of SQL texts; what follows a tab is no part of them."""
    return [[text.split("\t")[0] for _, text in lines] for lines in _read_interactions(path)]


def _read_interactions(path: Path) -> list[list[tuple[int, str]]]:
    """Numbered lines, stripped. Quirk: each blank line closes an interaction, also one without
    turns. Blank lines at the end of the file close none, as an editor may leave some there."""
    interactions: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            interactions[-1].append((number, line.strip()))
        else:
            interactions.append([])
    while interactions and not interactions[-1]:
        interactions.pop()
    return interactions


SQLITE_START = b"SQLite format 3\0"


def database_files(db_id: str, folders: Sequence[Path]) -> list[Path]:
    """All databases of the first folder with <db_id>/*.sqlite*. Several make a test suite: all must
    agree. Where a folder has none, the one file that DatabaseFolder finds. ValueError, naming the
    file that is looked for, if there is none, or a file that is no database."""
    checked_id(db_id, ", ".join(map(str, folders)))
    for folder in folders:
        found = sorted(Path(folder, db_id).glob("*.sqlite*"))
        found = [path for path in found if not path.name.endswith(("-journal", "-wal", "-shm"))]
        found = [path for path in found if not path.name.startswith(".")]  # of other programs
        if not found and Path(folder).is_dir():
            found = [path for path in [DatabaseFolder(folder).find(db_id)] if path is not None]
        for path in found:
            _require_database(path)
        if found:
            return found
    raise ValueError(f"{', '.join(map(str, folders))}: no {db_id}{os.sep}{db_id}.sqlite")


def _require_database(path: Path) -> None:
    """ValueError for a file that is no SQLite database, such as a page of a failed download or a
    pointer of Git LFS. An empty file is a database without tables."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(SQLITE_START))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if start not in (b"", SQLITE_START):
        raise ValueError(f"{path}: no SQLite database: get this file again")


def predictions_text(predictions: Iterable[tuple[str, str | None]]) -> str:
    """The official prediction file of (dialogue, SQL) in their order: a line each, and a blank line
    between two dialogues."""
    lines, last = [], None
    for dialogue, sql in predictions:
        if last is not None and dialogue != last:
            lines.append("")
        lines.append(prediction_line(sql))
        last = dialogue
    return "\n".join(lines) + "\n"


_BREAKS = re.compile(r"[\n\r\t]")
_START = re.compile(r"\A[\s\ufeff]+")
_PIECE = re.compile(
    r"""
      (?P<text>'(?:[^']|'')*+' | "(?:[^"]|"")*+")
    | (?P<name>`(?:[^`]|``)*+` | \[[^\]]*+\])
    | (?P<block>/\*.*?(?:\*/|\Z))
    | (?P<comment>--[^\n]*+(?P<end>\n?))
    | (?P<plain>[^'"`\[/-]++ | .)
    """,
    re.VERBOSE | re.DOTALL,
)


_LAST_WORD = re.compile(r"(\w+|\S)\s*\Z")
_VALUE_FOLLOWS = (RESERVED - {"AS", "NULL"}) | {"BY", "GLOB", "LIKE", "MATCH", "REGEXP"}
"""Words behind which a literal is a value; behind other words it is a name."""


def prediction_line(sql: str | None) -> str:
    """A prediction as one line, without tabs, that SQLite and the official program read as the same
    query. A text that is such a line already stays as it is, but for blanks around it.

    Line breaks and tabs become blanks. In a literal they become `char(10)`, since there they count:
    the literal is `('...'||char(10)||'...')`, which exact match does not know. A comment that ends
    with its line is left out. A name with a line break in it (in backquotes or brackets, or behind
    AS) cannot be written in one line: it gets a blank. Half a character becomes a question mark.

    For None and a text without anything in it: NO_ANSWER.
    """
    text = (sql or "").encode("utf-8", "replace").decode("utf-8")
    text = _START.sub("", text).rstrip()  # a byte order mark would be lost with the file's own
    if not _BREAKS.search(text):
        return text or NO_ANSWER
    pieces: list[str] = []
    last_word = ""
    for piece in _PIECE.finditer(text):
        if piece["comment"]:
            pieces.append(" " if piece["end"] else _BREAKS.sub(" ", piece[0]))
            continue
        is_value = last_word.upper() in _VALUE_FOLLOWS or not re.match(r"[\w)'.]", last_word)
        if piece["text"] and is_value and _BREAKS.search(piece[0]):
            pieces.append(_concatenated(piece[0]))
        else:
            pieces.append(_BREAKS.sub(" ", piece[0]))
        if piece["text"] or piece["name"]:
            last_word = "'"
        elif not piece["block"] and (found := _LAST_WORD.search(piece[0])):
            last_word = found[1]
    return "".join(pieces).strip() or NO_ANSWER


def _concatenated(literal: str) -> str:
    """A literal with line breaks or tabs as an expression without them."""
    quote = literal[0]
    inner = literal[1:-1].replace(quote * 2, quote).replace("'", "''")
    parts = re.split(r"([\n\r\t])", inner)
    texts = [f"char({ord(part)})" if i % 2 else f"'{part}'" for i, part in enumerate(parts)]
    return f"({'||'.join(texts)})"
