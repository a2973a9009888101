"""Questions with their SQL, read from the formats of the public data sets and from CSV.

- SParC and CoSQL: a JSON list of `{"database_id", "interaction": [{"utterance", "query"}, ...]}`,
  with the goal of the dialogue as `"final": {"utterance", "query"}`.
- Spider: a JSON list of `{"db_id", "question", "query"}`. BIRD: the same with `SQL`,
  `evidence` and, in its dev sets, `difficulty`.
- `.jsonl`: one such object a line.
- `.csv` (or `.tsv`): a header with `db_id,question,sql` and, optionally, `evidence` and
  `dialogue`.

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

DB_KEYS = ("db_id", "database_id")
QUESTION_KEYS = ("question", "utterance")
SQL_KEYS = ("query", "SQL", "sql")
DIALOGUE_KEYS = ("dialogue", "dialogue_id")
EXPECTED = "expected db_id, question and the SQL as query, SQL or sql"
DELIMITERS = (",", ";", "\t")
"""The delimiters of .csv files that are tried. Spreadsheet programs write semicolons in countries
with decimal commas."""


@dataclass(frozen=True)
class Question:
    """One question. sql: empty if the file has none for the question. evidence, difficulty: only
    BIRD has them. is_bird: the entry has the keys of BIRD."""

    text: str
    sql: str
    evidence: str = ""
    difficulty: str = ""
    is_bird: bool = False


@dataclass(frozen=True)
class Conversation:
    """Questions on one database, in their order. where: the file and its entry, for messages.
    goal: what the user of a SParC or CoSQL dialogue wants to know in the end, as one question."""

    db_id: str
    questions: tuple[Question, ...]
    where: str
    goal: Question | None = None


def read_conversations(file: Path, has_goals: bool = False) -> list[Conversation]:
    """All conversations of a file. The ending of its name and its entries decide the format.

    has_goals: read the goals, too. ValueError, in one line, that names the file, the entry or line,
    and the key at fault.
    """
    suffix = file.suffix.lower()
    entries: Iterator[tuple[str, object]]
    if suffix in (".csv", ".tsv"):
        entries = _read_rows(file)
    elif suffix in (".jsonl", ".ndjson"):
        entries = _read_json_lines(file)
    else:
        entries = _read_json_entries(file)
    return list(_joined(entries, has_goals))


def _read_json_entries(file: Path) -> Iterator[tuple[str, object]]:
    """-> (place, entry) of each entry of a JSON list."""
    try:
        entries = read_json_list(file)
    except ValueError as error:
        if "not JSON: Extra data" in str(error):
            raise ValueError(f"{error}; one object a line? Then name it .jsonl") from error
        raise
    for index, entry in enumerate(entries):
        yield f"{file}: entry {index}", entry


def _read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """-> (place, value) of each line that is not blank."""
    lines = read_lines(file)
    if lines and lines[0].lstrip().startswith("["):
        raise ValueError(
            f"{file}, line 1: expected an object, found a list: if the file is one JSON list, "
            "name it .json"
        )
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, parse_json(line, where, is_strict=True)


def read_json_list(path: Path | str) -> list:
    """The list that a JSON file holds. ValueError that names the file if it cannot be read or does
    not hold a list."""
    entries = read_json(path, is_strict=True)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list, found {type(entries).__name__}")
    return entries


def _joined(entries: Iterator[tuple[str, object]], has_goals: bool) -> Iterator[Conversation]:
    """Conversations from (place, entry). Consecutive entries of the same dialogue are joined."""
    ended: set[str] = set()  # dialogues that may not appear again
    last: str | None = None  # the dialogue of `current`
    current: Conversation | None = None  # not yielded yet, because the next entry may extend it
    for where, entry in entries:
        conversation, dialogue = _read_entry(entry, where, has_goals)
        if current is not None and dialogue is not None and dialogue == last:
            if conversation.db_id != current.db_id:
                ids = f"{current.db_id!r} and {conversation.db_id!r}"
                raise ValueError(f"{where}: dialogue {dialogue!r} is on two databases, {ids}")
            questions = current.questions + conversation.questions
            current = Conversation(current.db_id, questions, current.where)
            continue
        if dialogue in ended:
            raise ValueError(
                f"{where}: dialogue {dialogue!r} continues after another one: "
                "write the questions of a conversation one after the other"
            )
        if current is not None:
            yield current
        if last is not None:
            ended.add(last)
        last = dialogue
        current = conversation
    if current is not None:
        yield current


def _read_entry(entry: object, where: str, has_goals: bool) -> tuple[Conversation, str | None]:
    """-> (conversation, the name of the dialogue that it is a part of or None)."""
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
        dialogue = _dialogue_name(entry, where)
        return Conversation(db_id, (_question(entry, where),), where), dialogue
    turns = entry["interaction"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: interaction: expected a list of objects")
    questions = tuple(
        _question(turn, f"{where}: interaction[{index}]") for index, turn in enumerate(turns)
    )
    goal = _goal(entry, where) if has_goals else None
    return Conversation(db_id, questions, where, goal), None


def _goal(entry: dict, where: str) -> Question | None:
    """The goal of an interaction, if it has one."""
    goal = entry.get("final") or None
    if goal is not None and not isinstance(goal, dict):
        raise ValueError(f"{where}: final: expected an object, found {goal!r:.80}")
    return None if goal is None else _question(goal, f"{where}: final")


def _dialogue_name(entry: dict, where: str) -> str | None:
    dialogue = entry.get(_key_of(entry, DIALOGUE_KEYS, "dialogue", where))
    if dialogue is None or dialogue == "":
        return None
    # A column of numbers that has gaps is written by pandas as 1.0, 2.0 and null.
    if not isinstance(dialogue, (str, int, float)):
        raise ValueError(f"{where}: dialogue: expected a text or number, found {dialogue!r:.80}")
    return str(dialogue)


def _question(entry: dict, where: str) -> Question:
    text = _text(entry, _key_of(entry, QUESTION_KEYS, "utterance", where), where)
    evidence = entry.get("evidence") or ""
    if not isinstance(evidence, str):
        raise ValueError(f"{where}: evidence: expected a string, found {evidence!r:.80}")
    difficulty = entry.get("difficulty")
    return Question(
        text,
        _sql(entry, where),
        evidence.strip(),
        difficulty if isinstance(difficulty, str) else "",
        is_bird="SQL" in entry and "evidence" in entry,
    )


def _sql(entry: dict, where: str) -> str:
    """The SQL of an entry; empty if its value is null or blank."""
    # Spider and SParC files hold the parsed query as an object `sql`, beside the text `query`.
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
    """The first of the keys that the entry has, or the default. ValueError if it has several keys
    with different values."""
    found = [key for key in keys if key in entry]
    if any(entry[key] != entry[found[0]] for key in found):
        raise ValueError(f"{where}: {' and '.join(found)} hold different values: keep one of them")
    return found[0] if found else default


def _text(entry: dict, key: str, where: str) -> str:
    if key not in entry:
        raise ValueError(f"{where}: {key}: expected a string, found None; it {_has(entry)}")
    text = entry[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key}: expected a string, found {text!r:.80}")
    return text


def _has(entry: dict) -> str:
    """The part of an error that lists the keys of an entry."""
    if not entry:
        return "has no keys"
    return f"has the keys {', '.join(map(ascii, entry))}"[:200]


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
    text, first_line = _text_from_header(file)
    delimiter = max(DELIMITERS, key=lambda sign: _num_known(_header(text, sign)))
    header = _header(text, delimiter)
    columns = _checked_columns(header, f"{file}, line {first_line}")
    last_needed = max(columns[key] for key in ("db_id", "question", "sql"))
    rows = _rows(text, delimiter, file, first_line)
    next(rows)  # the header
    for number, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{file}, line {number}"
        fitted = _fitted(cells, len(header), last_needed)
        if fitted is None:
            raise ValueError(
                f"{where}: {len(cells)} cells, but the header has {len(header)}: a cell with the "
                "delimiter, a quote or a line break in it needs double quotes around it"
            )
        row = {key: fitted[place] for key, place in columns.items()}
        for key in ("db_id", "dialogue"):
            if key in row:
                row[key] = row[key].strip()
        yield where, row


def _text_from_header(file: Path) -> tuple[str, int]:
    """-> (the text of a file from its header on, the number of the header's line)."""
    text = read_text(file)
    first_line = 1
    if re.match(r"(?i)sep=.\n", text):  # a line that only tells Excel the delimiter
        text = text.partition("\n")[2]
        first_line += 1
    if not text.strip():
        raise ValueError(f"{file}: no usable turn: the file is empty")
    num_blank_lines = len(text) - len(text.lstrip("\n"))
    return text[num_blank_lines:], first_line + num_blank_lines


def _checked_columns(header: list[str], where: str) -> dict[str, int]:
    """Key -> the place of its column. ValueError if one is missing or there twice."""
    columns = {}
    for key, places in _places(header).items():
        if len(places) == 1:
            columns[key] = places[0]
        elif places or key not in _OPTIONAL:
            wrong = f"{len(places)} columns for {key}" if places else f"no column {key}"
            names = ", ".join(map(ascii, header))
            raise ValueError(
                f"{where}: {wrong}: the header has the columns {names:.200}, "
                "expected db_id, question, sql and, if wanted, evidence and dialogue"
            )
    return columns


def _fitted(cells: list[str], width: int, last_needed: int) -> list[str] | None:
    """A row as wide as the header. Excel omits empty cells at the end of a row, or adds some.

    None if the row may be broken: a cell beyond the header has a text, or a needed cell is missing.
    """
    if any(cell.strip() for cell in cells[width:]) or len(cells) <= last_needed:
        return None
    return (cells + [""] * (width - len(cells)))[:width]


def _header(text: str, delimiter: str) -> list[str]:
    """The first row of a text; empty if it is no row with this delimiter."""
    try:
        return next(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:  # a cell that is too long to be a name
        return []


def _num_known(header: list[str]) -> int:
    """How many keys have a column in a header."""
    return sum(bool(places) for places in _places(header).values())


def _places(header: list[str]) -> dict[str, list[int]]:
    """Key -> the places of its columns in a header."""
    places: dict[str, list[int]] = {key: [] for key in _COLUMNS}
    for place, name in enumerate(header):
        for key, known in _COLUMNS.items():
            if name.strip().lower() in known:
                places[key].append(place)
    return places


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
