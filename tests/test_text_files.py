"""Every text file of a user, as editors and other programs write it, and with faults."""

import json
import re

import pytest

from helpers.databases import make_database
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict
from mtsql.audit.report import Case, Report, leave_out_lines
from mtsql.judge.official_files import read_gold, read_predictions
from mtsql.rl.replay import read_demonstrations
from mtsql.sql.datasets import DataConfig, load_split, read_leave_out
from mtsql.sql.questions import read_conversations
from mtsql.sql.schema import load_schemas

TABLES = {
    "db_id": "one",
    "table_names_original": ["t"],
    "table_names": ["t"],
    "column_names_original": [[-1, "*"], [0, "a\u2028"]],
    "column_names": [[-1, "*"], [0, "a"]],
    "column_types": ["text", "text"],
    "primary_keys": [1],
    "foreign_keys": [],
}
STEP = {
    "action": "exec_sql",
    "think": "a\u2028b",
    "exec_verdict": None,
    "memory_verdict": None,
    "sql": "SELECT 1",
}
ANSWER = {**STEP, "action": "answer", "exec_verdict": "pass"}
DEMONSTRATION = {"turn_id": "train:0:0", "steps": [STEP, ANSWER]}
FLAT = {"db_id": "one", "question": "a\u2028b", "sql": "SELECT 1"}
SPARC = {"database_id": "one", "interaction": [{"utterance": "a\u2028b", "query": "SELECT 1"}]}


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


FILES = {
    "tables.json": (load_schemas, dumps([TABLES, {**TABLES, "db_id": "two"}])),
    "sparc.json": (read_conversations, dumps([SPARC, SPARC])),
    "flat.jsonl": (read_conversations, dumps(FLAT) + "\n" + dumps(FLAT)),
    "flat.csv": (read_conversations, "db_id,question,sql\none,a\u2028b,SELECT 1\none,b,SELECT 2"),
    "demonstrations.jsonl": (
        read_demonstrations,
        dumps(DEMONSTRATION) + "\n" + dumps({**DEMONSTRATION, "turn_id": "b"}),
    ),
    "leave_out.tsv": (read_leave_out, "train:0:0\ta\u2028b\ntrain:0:1\tc"),
    "gold.txt": (read_gold, "SELECT '\u2028'\tone\n\nSELECT 2\tone"),
    "pred.txt": (read_predictions, "SELECT '\u2028'\n\nSELECT 2"),
}
WRITTEN = {
    "byte order mark": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n") + "\r\n",
    "CR": lambda text: text.replace("\n", "\r"),
    "blank last lines": lambda text: text + "\n\n \n\n",
    "all": lambda text: "\ufeff" + text.replace("\n", "\r\n") + "\r\n\r\n\r\n",
}


def repr_without_places(value):
    return re.sub(r"where='[^']*'", "", repr(value))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", WRITTEN)
def test_byte_order_marks_and_line_ends_make_no_difference(tmp_path, name, how):
    read, text = FILES[name]
    file = tmp_path / name
    file.write_bytes(text.encode())
    plain = read(file)
    file.write_bytes(WRITTEN[how](text).encode())
    assert len(plain) == 2 and repr_without_places(read(file)) == repr_without_places(plain)
    assert r"\u2028" in repr(plain)


def with_ids_replaced(text, new):
    """The bytes of a text with something else in the place of a database or turn id."""
    return text.replace('"one"', new).replace('"train:0:0"', new).encode()


FAULTS = {
    "UTF-16": (lambda text: text.encode("utf-16"), "not UTF-8"),
    "Latin 1": (lambda text: text.encode() + b"\xe9", "not UTF-8"),
    "NaN": (lambda text: with_ids_replaced(text, "NaN"), "NaN"),
    "deep": (lambda text: with_ids_replaced(text, "[" * 100_000), "nested too deeply"),
    "truncated": (lambda text: text[:-3].encode(), "not JSON"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_of_a_faulty_file_is_one_line_that_names_it(tmp_path, name, fault):
    read, text = FILES[name]
    change, words = FAULTS[fault]
    if "json" not in name and fault not in ("UTF-16", "Latin 1"):
        return  # a fault of JSON in a file that is no JSON
    file = tmp_path / name
    file.write_bytes(change(text))
    with pytest.raises(ValueError, match=words) as error:
        read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["none", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, kind):
    if kind == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: cannot be read: (No such file|Is a directory)"):
        FILES[name][0](tmp_path / name)


def places(value, place=()):
    """The place of each value inside a JSON value: the keys and indices that lead to it."""
    inner = {}
    if isinstance(value, dict):
        inner = value
    elif isinstance(value, list):
        inner = dict(enumerate(value))
    for key, item in inner.items():
        yield (*place, key)
        yield from places(item, (*place, key))


def changed(value, place, new):
    """A copy of a JSON value with another value at a place."""
    value = json.loads(json.dumps(value))
    part = value
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = new
    return value


@pytest.mark.parametrize(
    "place", [p for p in places(TABLES) if p[0] not in ("table_names", "column_names")], ids=str
)
@pytest.mark.parametrize("new", [None, {}, 1.5, True, "", -2, 99])
def test_a_wrong_value_of_tables_json_is_named_by_its_own_key(tmp_path, place, new):
    """The file loads, or the error names the key where the value was put."""
    file = tmp_path / "tables.json"
    file.write_text(json.dumps([changed(TABLES, place, new)]))
    try:
        load_schemas(file)
    except ValueError as error:
        assert re.search(rf"tables\.json: entry 0( \(one\))?: {place[0]}", str(error)), error
        assert "\n" not in str(error)
    else:
        assert isinstance(new, str)


@pytest.mark.parametrize(
    "entry, place",
    [(e, p) for e in (TABLES, SPARC, FLAT, DEMONSTRATION) for p in places(e)],
    ids=str,
)
def test_half_a_character_is_refused_in_every_json_file(tmp_path, entry, place):
    part = entry
    for key in place:
        part = part[key]
    if not isinstance(part, str):
        return
    name = "tables.json" if entry is TABLES else "sparc.json"
    if entry is DEMONSTRATION:
        name = "demonstrations.jsonl"
    read, _ = FILES[name]
    value = changed(entry, place, part + "\ud83d")
    text = json.dumps(value) if name.endswith("jsonl") else json.dumps([value])
    (tmp_path / name).write_text(text)
    keys = [key for key in place if isinstance(key, str)]
    where = "line 1" if name.endswith("jsonl") else "entry 0"
    with pytest.raises(ValueError, match=f"{name}(:|,) {where}: .*{keys[-1]}.*half a character"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], "expected an object, found list"),
        ({}, "turn_id: expected a string, found None"),
        ({**DEMONSTRATION, "steps": {}}, "steps: expected a list"),
        ({**DEMONSTRATION, "steps": []}, "steps: the last action, and no other, must be `answer`"),
        ({**DEMONSTRATION, "steps": [STEP]}, "steps: the last action"),
        ({**DEMONSTRATION, "steps": [ANSWER, ANSWER]}, "steps: the last action"),
        ({**DEMONSTRATION, "steps": [7]}, "steps[0]: expected an object, found int"),
        (
            {**DEMONSTRATION, "steps": [STEP, {**ANSWER, "action": "run"}]},
            "steps[1]: action: expected one of exec_sql,",
        ),
        (
            {**DEMONSTRATION, "steps": [{**ANSWER, "think": None}]},
            "steps[0]: think: expected a string",
        ),
        (
            {**DEMONSTRATION, "steps": [{**ANSWER, "sql": 1}]},
            "steps[0]: sql: expected a string, found 1",
        ),
        (
            {**DEMONSTRATION, "steps": [{**ANSWER, "exec_verdict": "ok"}]},
            "steps[0]: exec_verdict: expected one of pass",
        ),
        ({**DEMONSTRATION, "turn_id": "b"}, "turn_id: 'b' has a demonstration already"),
    ],
)
def test_a_malformed_demonstration_is_named_by_its_key(tmp_path, record, words):
    file = tmp_path / "d.jsonl"
    file.write_text(f"{json.dumps({**DEMONSTRATION, 'turn_id': 'b'})}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError) as error:
        read_demonstrations(file)
    assert str(error.value).startswith(f"{file}, line 2: {words}")


def test_a_demonstration_is_read_as_replies(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(DEMONSTRATION))
    call = Reply(ToolCall("exec_sql", {"code": "SELECT 1"}), "a\u2028b")
    answer = Reply(Answer("SELECT 1"), "a\u2028b", exec_verdict=Verdict.PASS)
    assert read_demonstrations(tmp_path / "d.jsonl") == {"train:0:0": [call, answer]}


def test_an_empty_leave_out_file_leaves_out_nothing(tmp_path):
    file = tmp_path / "out.tsv"
    for text in ("", "\n", "\ufeff\r\n"):
        file.write_text(text, encoding="utf-8")
        assert read_leave_out(file) == {}


def test_a_leave_out_file_of_the_audit_can_be_read(tmp_path):
    file = tmp_path / "out.tsv"
    report = Report()
    case = Case("train:0:0", "one", "no such\n\tcolumn: \u2028x\r", "SELECT")
    report.cases["gold fails"] = [case]
    lines = leave_out_lines(report, ("gold fails",))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert read_leave_out(file) == {"train:0:0": "gold fails: no such column: x"}


def test_splits_need_no_tables_json(tmp_path):
    make_database(tmp_path / "one.db", 'CREATE TABLE "order" (a INT PRIMARY KEY)')
    (tmp_path / "dev.csv").write_text("db_id;question;sql\none;q;SELECT 1\n")
    names = {"dev": str(tmp_path / "dev.csv"), "databases": str(tmp_path)}
    corpus = load_split(DataConfig(**names), "dev")
    assert corpus.turns[0].turn_id == "dev:0:0"
    assert [table.name for table in corpus.databases["one"].schema.tables] == ["order"]
    assert not DataConfig(**names).is_toy


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"train": "x"}, "data.train is set: data.dev and data.databases must be set too"),
        ({"dev": "x"}, "data.dev is set: data.databases must be set too"),
        ({"train": "x", "dev": "x"}, "data.train is set: data.databases must be set too"),
        ({"dev_seen": "x"}, "data.dev_seen is set: data.dev and data.databases must be set too"),
        ({"tables": "x"}, "data.tables is set: data.dev and data.databases must be set too"),
        ({"databases": "x"}, "data.databases is set: data.dev must be set too"),
        (
            {"dev": "x", "databases": "x", "leave_out": "x"},
            "data.leave_out is set, but data.train is not",
        ),
    ],
)
def test_the_error_names_the_keys_that_an_incomplete_data_set_lacks(named, words):
    with pytest.raises(ValueError) as error:
        DataConfig(**named)
    assert str(error.value).startswith(words)
