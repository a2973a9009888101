"""Questions with their SQL, in the formats that data sets have.

- SParC and CoSQL: a JSON list of `{"database_id", "interaction": [{"utterance", "query"}, ...]}`.
- Spider: a JSON list of `{"db_id", "question", "query"}`. BIRD: the same with `SQL` and `evidence`.
- `.jsonl`: one such object a line.
- `.csv` (or `.tsv`): a header with `db_id,question,sql`, and `evidence` and `dialogue` if there are
  any.

Consecutive objects or rows with the same `dialogue` (or `dialogue_id`) are one conversation.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtsql.files import parse_json, read_json, read_lines, read_text
from mtsql.sql.names import checked_id

DB_KEYS, QUESTION_KEYS = ("db_id", "database_id"), ("question", "utterance")
SQL_KEYS = ("query", "SQL", "sql")
DIALOGUE_KEYS = ("dialogue", "dialogue_id")
EXPECTED = "expected db_id, question and the SQL as query, SQL or sql"
DELIMITERS = (",", ";", "\t")
"""Of .csv files. Spreadsheet programs write semicolons in countries with decimal commas."""


@dataclass(frozen=True)
class Question:
    """One question. sql: empty if the file has none for it. evidence: often empty."""

    text: str
    sql: str
    evidence: str = ""


@dataclass(frozen=True)
class Conversation:
    """Questions on one database, in their order. where: the file and place, for messages."""

    db_id: str
    questions: tuple[Question, ...]
    where: str


def read_conversations(file: Path) -> list[Conversation]:
    """All conversations of a file, as its ending and its entries tell the format.

    ValueError, in a line that names the file, the entry or line, and the key, for what is wrong.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        found = _joined(_read_rows(file))
    elif suffix in (".jsonl", ".ndjson"):
        lines = enumerate(_lines_of_objects(file), 1)
        places = ((f"{file}, line {number}", line) for number, line in lines if line.strip())
        found = _joined((where, parse_json(line, where, is_strict=True)) for where, line in places)
    else:
        try:
            entries = enumerate(read_json_list(file))
        except ValueError as error:
            if "not JSON: Extra data" in str(error):
                raise ValueError(f"{error}; one object a line? Then name it .jsonl") from error
            raise
        found = _joined((f"{file}: entry {index}", entry) for index, entry in entries)
    return list(found)


def _lines_of_objects(file: Path) -> list[str]:
    lines = read_lines(file)
    if lines and lines[0].lstrip().startswith("["):
        raise ValueError(
            f"{file}, line 1: expected an object, found a list: if the file is one JSON list, "
            "name it .json"
        )
    return lines


def read_json_list(path: Path) -> list:
    """The list that a JSON file holds. ValueError that names the file if it cannot be read or holds
    anything else."""
    entries = read_json(path, is_strict=True)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list, found {type(entries).__name__}")
    return entries


def _joined(entries: Iterator[tuple[str, object]]) -> Iterator[Conversation]:
    """Conversations from objects; those with the same dialogue, one after the other, are joined."""
    ended: set[str] = set()
    last, open_one = None, None
    for where, entry in entries:
        conversation, dialogue = _read_entry(entry, where)
        if dialogue is not None and dialogue == last:
            if conversation.db_id != open_one.db_id:
                ids = f"{open_one.db_id!r} and {conversation.db_id!r}"
                raise ValueError(f"{where}: dialogue {dialogue!r} is on two databases, {ids}")
            questions = open_one.questions + conversation.questions
            open_one = Conversation(open_one.db_id, questions, open_one.where)
            continue
        if dialogue in ended:
            raise ValueError(
                f"{where}: dialogue {dialogue!r} goes on after another one: "
                "write the questions of a conversation one after the other"
            )
        if open_one is not None:
            yield open_one
        if last is not None:
            ended.add(last)
        last, open_one = dialogue, conversation
    if open_one is not None:
        yield open_one


def _read_entry(entry: object, where: str) -> tuple[Conversation, str | None]:
    """-> (conversation, the dialogue that it belongs to or None)."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with `interaction` or `question`")
    if "interaction" not in entry and not any(key in entry for key in QUESTION_KEYS):
        raise ValueError(
            f"{where}: {_has(entry)}, {EXPECTED}, or database_id and `interaction` with a "
            "list of turns"
        )
    default = "database_id" if "interaction" in entry else "db_id"
    key = _key_of(entry, DB_KEYS, default, where)
    db_id = checked_id(_text(entry, key, where), f"{where}: {key}")
    if "interaction" not in entry:
        dialogue = entry.get(_key_of(entry, DIALOGUE_KEYS, "dialogue", where))
        if not isinstance(dialogue, (str, int, float, type(None))):  # pandas writes 1.0 beside null
            raise ValueError(
                f"{where}: dialogue: expected a text or number, found {dialogue!r:.80}"
            )
        name = None if dialogue is None or dialogue == "" else str(dialogue)
        return Conversation(db_id, (_question(entry, where),), where), name
    turns = entry["interaction"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: interaction: expected a list of objects")
    questions = tuple(
        _question(turn, f"{where}: interaction[{index}]") for index, turn in enumerate(turns)
    )
    return Conversation(db_id, questions, where), None


def _question(entry: dict, where: str) -> Question:
    text = _text(entry, _key_of(entry, QUESTION_KEYS, "utterance", where), where)
    evidence = entry.get("evidence") or ""
    if not isinstance(evidence, str):
        raise ValueError(f"{where}: evidence: expected a string, found {evidence!r:.80}")
    return Question(text, _sql(entry, where), evidence.strip())


def _sql(entry: dict, where: str) -> str:
    """The SQL of an entry; empty if its value is null or blank."""
    # Spider and SParC have the parsed query as `sql`, beside `query`.
    keys = [key for key in SQL_KEYS if key in entry and not isinstance(entry[key], dict)]
    if not keys:
        raise ValueError(f"{where}: {_has(entry)}, expected the SQL as {', '.join(SQL_KEYS)}")
    found = {key: entry[key] for key in keys if entry[key] is not None}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key}: expected a string, found {value!r:.80}")
    texts = {value.strip() for value in found.values()}
    if len(texts) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} hold different SQL: keep one of them")
    return texts.pop() if texts else ""


def _key_of(entry: dict, keys: tuple[str, ...], default: str, where: str) -> str:
    """The one of the keys that the entry has. ValueError if it has several with other values."""
    found = [key for key in keys if key in entry]
    if any(entry[key] != entry[found[0]] for key in found):
        raise ValueError(f"{where}: {' and '.join(found)} hold different values: keep one of them")
    return found[0] if found else default


def _text(entry: dict, key: str, where: str) -> str:
    if key not in entry:
        raise ValueError(f"{where}: {key}: expected a string, found None; it {_has(entry)}")
    if not isinstance(entry[key], str):
        raise ValueError(f"{where}: {key}: expected a string, found {entry[key]!r:.80}")
    return entry[key]


def _has(entry: dict) -> str:
    return f"has the keys {', '.join(map(ascii, entry))}"[:200] if entry else "has no keys"


# CSV.

_COLUMNS = {
    "db_id": DB_KEYS,
    "question": QUESTION_KEYS,
    "sql": ("query", "sql"),
    "evidence": ("evidence",),
    "dialogue": DIALOGUE_KEYS,
}
"""Key of an entry -> the names that its column may have, in lower case."""
_OPTIONAL = ("evidence", "dialogue")


def _read_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """-> (place, {key: cell}) of each row, with the columns that are known."""
    text, first_line = read_text(file), 1
    if re.match(r"(?i)sep=.\n", text):  # a line that only tells Excel the delimiter
        text, first_line = text.partition("\n")[2], 2
    if not text.strip():
        raise ValueError(f"{file}: no usable turn: the file is empty")
    blank = re.match(r"\n*", text)[0]
    text, first_line = text[len(blank) :], first_line + len(blank)
    headers = {sign: _header(text, sign) for sign in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda sign: sum(map(bool, _places(headers[sign]).values())))
    header = headers[delimiter]
    columns: dict[str, int] = {}
    for key, places in _places(header).items():
        if len(places) > 1 or not (places or key in _OPTIONAL):
            wrong = f"{len(places)} columns for {key}" if places else f"no column {key}"
            names = ", ".join(map(ascii, header))
            raise ValueError(
                f"{file}, line {first_line}: {wrong}: the header has the columns {names:.200}, "
                "expected db_id, question, sql and, if wanted, evidence and dialogue"
            )
        if places:
            columns[key] = places[0]
    rows = _rows(text, delimiter, file, first_line)
    next(rows)  # the header
    for number, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{file}, line {number}"
        num_cells = len(cells)
        cells = _fitted(
            cells, len(header), max(columns[key] for key in ("db_id", "question", "sql"))
        )
        if cells is None:
            raise ValueError(
                f"{where}: {num_cells} cells, but the header has {len(header)}: a cell with the "
                "delimiter, a quote or a line break in it needs double quotes around it"
            )
        row = {key: cells[place] for key, place in columns.items()}
        names = {key: row[key].strip() for key in ("db_id", "dialogue") if key in row}
        yield where, row | names


def _fitted(cells: list[str], width: int, last_needed: int) -> list[str] | None:
    """A row as wide as the header. Excel leaves empty cells at the end of rows away, and adds some.
    None if the cells cannot be told from parts of a broken row."""
    if any(cell.strip() for cell in cells[width:]) or len(cells) <= last_needed:
        return None
    return (cells + [""] * (width - len(cells)))[:width]


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:  # a cell that is too long to be a name
        return []


def _places(header: list[str]) -> dict[str, list[int]]:
    """Key -> the places of its columns in a header."""
    names = [name.strip().lower() for name in header]
    return {
        key: [place for place, name in enumerate(names) if name in known]
        for key, known in _COLUMNS.items()
    }


def _rows(
    text: str, delimiter: str, file: Path, first_line: int
) -> Iterator[tuple[int, list[str]]]:
    """-> (number of the line in which the row begins, cells)."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        number = first_line + reader.line_num
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}, line {number}: not CSV: {error}") from error
