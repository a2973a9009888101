"""Gold and prediction files in the official format.

Gold: `SQL<TAB>db_id` a line; prediction: one SQL a line, which ends at a tab if there is one. A
blank line ends an interaction in both. Blanks around a line do not count. Predictions may also have
the form of BIRD, whose gold files are like these.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtsql.files import read_json, read_text
from mtsql.sql.database_files import DatabaseFolder
from mtsql.sql.names import RESERVED, checked_id

NO_ANSWER = "no answer"
"""The line of a turn without an answer. The official program counts it as wrong; an empty line
would end the dialogue."""
BIRD_SEPARATOR = "\t----- bird -----\t"
"""What stands between SQL and database id in the predictions of BIRD."""
SQLITE_START = b"SQLite format 3\0"
"""The first bytes of a database file."""


@dataclass(frozen=True)
class GoldLine:
    """One line of a gold file; lines count from 1."""

    line: int
    sql: str
    db_id: str


def read_gold(path: Path) -> list[list[GoldLine]]:
    """Read the interactions of a gold file.

    ValueError that names file and line if the tab is missing or the id is not a plain name.
    """
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
    """Read the interactions of a prediction file: lists of SQL texts.

    A .json file is one of BIRD, {"0": "SQL<TAB>----- bird -----<TAB>db_id", ...}: one interaction.
    As for its evaluator, a value that is no text is no answer. ValueError that names the file and
    the number of a prediction that is missing.
    """
    if path.suffix.lower() == ".json":
        return [_read_bird(path)]
    interactions = []
    for lines in _read_interactions(path):
        interactions.append([text.split("\t")[0] for _, text in lines])
    return interactions


def _read_bird(path: Path) -> list[str]:
    found = read_json(path, is_strict=True)
    if not isinstance(found, dict):
        raise ValueError(f'{path}: expected an object such as {{"0": "SELECT ..."}}')
    texts = []
    for number in range(len(found)):
        if str(number) not in found:
            raise ValueError(f"{path}: no prediction {number}, but there are {len(found)}")
        text = found[str(number)]
        is_text = isinstance(text, str)
        texts.append(text.split(BIRD_SEPARATOR)[0].strip() if is_text else NO_ANSWER)
    return texts


def _read_interactions(path: Path) -> list[list[tuple[int, str]]]:
    """Interactions of (line number, stripped line).

    Quirk: each blank line ends an interaction, even one without turns. Blank lines at the end of
    the file end none, because an editor may leave some there.
    """
    interactions: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            interactions[-1].append((number, line.strip()))
        else:
            interactions.append([])
    while interactions and not interactions[-1]:
        interactions.pop()
    return interactions


def database_files(db_id: str, folders: Sequence[Path]) -> list[Path]:
    """Find the files of a database in the first folder that has any.

    All files `<db_id>/*.sqlite*` belong to the database. Several files are a test suite, and a
    prediction must agree on each. In a folder without such files, it is the one file that
    DatabaseFolder finds. ValueError that names the file if there is none or it is not a database.
    """
    names = ", ".join(map(str, folders))
    checked_id(db_id, names)
    for folder in folders:
        candidates = sorted(Path(folder, db_id).glob("*.sqlite*"))
        found = [path for path in candidates if _may_be_database(path)]
        if not found and Path(folder).is_dir():
            other = DatabaseFolder(folder).find(db_id)
            if other is not None:
                found.append(other)
        for path in found:
            _require_database(path)
        if found:
            return found
    raise ValueError(f"{names}: no {db_id}{os.sep}{db_id}.sqlite")


def _may_be_database(path: Path) -> bool:
    """Whether this is neither the name of a temporary file of SQLite nor that of a hidden file."""
    is_working_file = path.name.endswith(("-journal", "-wal", "-shm"))
    return not is_working_file and not path.name.startswith(".")


def _require_database(path: Path) -> None:
    """Raise ValueError for a file that is no SQLite database.

    Examples are the page of a failed download and a pointer of Git LFS. An empty file is a
    database without tables.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(SQLITE_START))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if start not in (b"", SQLITE_START):
        raise ValueError(f"{path}: not an SQLite database: download this file again")


def predictions_text(predictions: Iterable[tuple[str, str | None]]) -> str:
    """The prediction file of (dialogue, SQL) pairs, with a blank line between two dialogues."""
    return _in_interactions((dialogue, prediction_line(sql)) for dialogue, sql in predictions)


def gold_text(golds: Iterable[tuple[str, str, str]]) -> str:
    """The gold file of (dialogue, SQL, database id), with a blank line between two dialogues."""
    return _in_interactions(
        (name, f"{prediction_line(sql)}\t{db_id}") for name, sql, db_id in golds
    )


def _in_interactions(pairs: Iterable[tuple[str, str]]) -> str:
    lines = []
    last = None
    for dialogue, line in pairs:
        if last is not None and dialogue != last:
            lines.append("")
        lines.append(line)
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
_ENDS_OPERAND = re.compile(r"[\w)'.]")
_VALUE_FOLLOWS = (RESERVED - {"AS", "NULL"}) | {"BY", "GLOB", "LIKE", "MATCH", "REGEXP"}
"""A quoted text after one of these words is a value. After any other word it is a name."""


def prediction_line(sql: str | None) -> str:
    """Write a prediction as one line that SQLite and the official program read as the same query.

    A text that is already one line without tabs stays as it is, except for blanks around it. Else:

    - Line breaks and tabs become blanks.
    - In a literal they have a meaning, so there they become `char(10)`. The literal is then
      `('...'||char(10)||'...')`, which exact match does not know.
    - A comment that ends with its line is left out.
    - A name with a line break (in backquotes, in brackets, or after AS) cannot be written in one
      line. The break becomes a blank.
    - Half of a surrogate pair becomes a question mark.

    None and a text without content give NO_ANSWER.
    """
    text = (sql or "").encode("utf-8", "replace").decode("utf-8")
    # A byte order mark here would be lost when the file is read, like the file's own.
    whole = _START.sub("", text)
    text = whole.rstrip()
    # SQLite reads a comment that is not closed, but refuses one without a character in it.
    while text != whole and text.endswith("/*"):
        text = text[:-2].rstrip()
    if _BREAKS.search(text):
        text = _in_one_line(text)
    return text or NO_ANSWER


def _in_one_line(text: str) -> str:
    pieces: list[str] = []
    last_word = ""
    for piece in _PIECE.finditer(text):
        without_breaks = _BREAKS.sub(" ", piece[0])
        if piece["comment"]:
            pieces.append(" " if piece["end"] else without_breaks)
            continue
        has_breaks = without_breaks != piece[0]
        is_value = last_word.upper() in _VALUE_FOLLOWS or not _ENDS_OPERAND.match(last_word)
        if piece["text"] and is_value and has_breaks:
            pieces.append(_concatenated(piece[0]))
        else:
            pieces.append(without_breaks)
        if piece["text"] or piece["name"]:
            last_word = "'"
        elif not piece["block"] and (found := _LAST_WORD.search(piece[0])):
            last_word = found[1]
    return "".join(pieces).strip()


def _concatenated(literal: str) -> str:
    """A literal with line breaks or tabs as an expression without them."""
    quote = literal[0]
    inner = literal[1:-1].replace(quote * 2, quote).replace("'", "''")
    parts = []
    for part in re.split(r"([\n\r\t])", inner):
        parts.append(f"char({ord(part)})" if _BREAKS.fullmatch(part) else f"'{part}'")
    return f"({'||'.join(parts)})"
