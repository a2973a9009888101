"""The formats of questions: SParC, Spider, BIRD, one object a line, CSV; and what malformed files
do."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.databases import make_database
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.rl.evaluate import score_turn, summarize
from mtsql.rl.rewards import RewardConfig, answer_scores
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.questions import Question, read_conversations

BIRD = {
    "question_id": 0,
    "db_id": "one",
    "question": "How much?",
    "evidence": "much means a > 1",
    "SQL": "SELECT a FROM t",
    "difficulty": "simple",
}


def read(folder, name, content):
    """Write a file and read it as [[db_id, (text, sql, evidence), ...], ...]."""
    file = folder / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = []
    for conversation in read_conversations(file):
        questions = [(q.text, q.sql, q.evidence) for q in conversation.questions]
        found.append([conversation.db_id, *questions])
    return found


def test_bird_entries_keep_their_evidence(tmp_path):
    found = read(tmp_path, "dev.json", [BIRD, {**BIRD, "evidence": ""}, {**BIRD, "evidence": None}])
    assert found[0] == ["one", ("How much?", "SELECT a FROM t", "much means a > 1")]
    assert found[1] == found[2] == ["one", ("How much?", "SELECT a FROM t", "")]


def test_the_parsed_query_of_official_files_is_not_read_as_sql(tmp_path):
    parsed = {"select": [False, []]}
    turn = {"utterance": "q", "query": "SELECT 1", "sql": parsed}
    spider = {"db_id": "one", "question": "q", "query": "SELECT 1", "sql": parsed}
    sparc = {"database_id": "one", "interaction": [turn]}
    assert read(tmp_path, "a.json", [sparc, spider]) == [["one", ("q", "SELECT 1", "")]] * 2


@pytest.mark.parametrize("key", ["query", "SQL", "sql"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json"])
def test_single_questions_are_read_with_any_key_for_their_sql(tmp_path, key, name):
    entries = [{"db_id": "one", "question": f"q{i}", key: f" SELECT {i} "} for i in range(3)]
    lines = "\n\n".join(map(json.dumps, entries)) + "\n\n"
    found = read(tmp_path, name, lines if name != "a.json" else entries)
    assert found == [["one", (f"q{i}", f"SELECT {i}", "")] for i in range(3)]


def test_a_file_of_lines_may_hold_sparc_entries(tmp_path):
    entry = {"database_id": "one", "interaction": [{"utterance": "q", "query": "SELECT 1"}] * 2}
    assert read(tmp_path, "a.jsonl", json.dumps(entry)) == [["one", *[("q", "SELECT 1", "")] * 2]]


HEADS = [
    "db_id,question,sql",
    "DB_ID, Question ,SQL",
    "database_id,utterance,query",
    "id,sql,db_id,question",
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "sep="])
def test_csv_as_many_programs_write_it_is_read(tmp_path, head, sign, end, mark):
    names = head.lower().replace(" ", "").split(",")
    row = {"id": "7", "db_id": "one", "question": 'a "b"; c,\td', "sql": "SELECT 1,\n 2"}
    row |= {"database_id": row["db_id"], "utterance": row["question"], "query": row["sql"]}
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=sign, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(head.split(","))
    writer.writerows([[row[name] for name in names]] * 2)
    first = f"sep={sign}{end}" if mark == "sep=" else mark
    found = read(tmp_path, "a.CSV", (first + file.getvalue() + end).encode())
    assert found == [["one", ('a "b"; c,\td', "SELECT 1,\n 2", "")]] * 2


def test_rows_of_one_dialogue_are_a_conversation(tmp_path):
    head = "dialogue,db_id,question,sql,evidence\n"
    rows = "1,one,a,SELECT 1,e\n1,one,b,SELECT 2,\n2,one,c,SELECT 3,\n"
    rows += ",one,d,SELECT 4,\n,one,e,SELECT 5,\n"
    found = read(tmp_path, "a.csv", head + rows)
    assert [[q[0] for q in turns] for _, *turns in found] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert found[0][1] == ("a", "SELECT 1", "e")
    lines = [json.dumps({**BIRD, "dialogue_id": i}) for i in (0.0, 0.0, 1.0)]
    first, second = read(tmp_path, "a.jsonl", "\n".join(lines))
    assert len(first[1:]) == 2 and len(second[1:]) == 1


TURN = {"utterance": "q", "query": "SELECT 1"}
FLAT = {"db_id": "one", "question": "q", "query": "SELECT 1"}


@pytest.mark.parametrize(
    "row",
    ["one,q,SELECT 1", "one,q,SELECT 1,", "one,q,SELECT 1,,,,", " one ,q,SELECT 1, ,"],
)
def test_empty_cells_that_spreadsheets_add_or_omit_make_no_difference(tmp_path, row):
    head = "db_id,question,sql,evidence,dialogue\n"
    (tmp_path / "a.csv").write_text(f"{head}{row}\n")
    [found] = read_conversations(tmp_path / "a.csv")
    assert (found.db_id, found.questions) == ("one", (Question("q", "SELECT 1"),))


def without(entry, key):
    return {k: v for k, v in entry.items() if k != key}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        # A missing key: the error lists the keys that the entry has.
        (
            "a.json",
            [without(BIRD, "SQL")],
            "entry 0: has the keys 'question_id', 'db_id', 'question'",
        ),
        (
            "a.json",
            [without(BIRD, "db_id")],
            "entry 0: db_id: expected a string, found None; it has",
        ),
        (
            "a.json",
            [{"db_id": "one", "SQL": "x"}],
            "entry 0: has the keys 'db_id', 'SQL', expected",
        ),
        ("a.json", [{}], "entry 0: has no keys, expected db_id, question"),
        (
            "a.json",
            [FLAT, {"database_id": "one", "interaction": [TURN, {"utterance": "q"}]}],
            "entry 1: interaction[1]: has the keys 'utterance', expected the SQL as query, SQL, ",
        ),
        ("a.jsonl", json.dumps(FLAT) + "\n{}", "a.jsonl, line 2: has no keys"),
        # Values of a wrong type, or several keys with different values.
        ("a.json", [{**FLAT, "evidence": 7}], "entry 0: evidence: expected a string, found 7"),
        ("a.json", [{**FLAT, "query": ["x"]}], "entry 0: query: expected a string, found ['x']"),
        ("a.json", [{**FLAT, "sql": "SELECT 2"}], "entry 0: query and sql hold different SQL"),
        ("a.json", [{**FLAT, "dialogue": [1]}], "entry 0: dialogue: expected a text or number"),
        (
            "a.json",
            [{**FLAT, "database_id": "two"}],
            "entry 0: db_id and database_id hold different values",
        ),
        ("a.json", [{**FLAT, "utterance": "r"}], "entry 0: question and utterance hold different"),
        # Faults of JSON.
        ("a.json", json.dumps(FLAT) + "\n" + json.dumps(FLAT), "Then name it .jsonl"),
        ("a.jsonl", json.dumps(FLAT) + "\n{", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected an object"),
        ("a.json", '[{"db_id": "a", "db_id": "b"}]', "entry 0: the key 'db_id' appears twice"),
        (
            "a.json",
            '[{"interaction": [{"query": 1, "query": 2}]}]',
            "entry 0: interaction[0]: the key 'query' appears twice",
        ),
        (
            "a.jsonl",
            json.dumps(FLAT) + '\n{"sql": NaN}',
            "line 2: not JSON: NaN is not a JSON number",
        ),
        ("a.jsonl", '{"a":' * 100_000, "line 1: not JSON that can be read: nested too deeply"),
        ("a.json", b"\xff\xfe[\x00", "not UTF-8"),
        ("a.csv", b"\xff\xfed\x00", "not UTF-8"),
        # Conversations that are not consecutive or use two databases.
        (
            "a.jsonl",
            "\n".join(json.dumps({**FLAT, "dialogue": d}) for d in "aba"),
            "line 3: dialogue 'a' continues after another one",
        ),
        (
            "a.csv",
            "db_id,question,sql,dialogue\na,q,x,1\nb,q,x,1\n",
            "line 3: dialogue '1' is on two databases, 'a' and 'b'",
        ),
        # Faults of CSV.
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n" + "x" * 200_000, "line 2: no column db_id"),
        (
            "a.csv",
            "\n\ndb_id,question\n",
            "line 3: no column sql: the header has the columns 'db_id', 'question'",
        ),
        ("a.csv", "db_id|question|sql\n", "line 1: no column db_id: the header has the columns"),
        (
            "a.csv",
            "db_id,question,answer\n",
            "no column sql: the header has the columns 'db_id', 'question'",
        ),
        ("a.csv", "sep=;\ndb_id;question\n", "line 2: no column sql"),
        ("a.csv", "db_id,question,sql,query\n", "2 columns for sql"),
        ("a.csv", "db_id,question,sql,Question\n", "2 columns for question"),
        (
            "a.jsonl",
            "[\n{}\n]",
            "a.jsonl, line 1: expected an object, found a list: if the file is one JSON list, "
            "name it .json",
        ),
        (
            "a.csv",
            "db_id,question,sql,evidence\na,q,SELECT\n1,e\n",
            "line 3: 2 cells, but the header has 4",
        ),
        ("a.csv", "db_id,question,sql,x\na,q\n", "line 2: 2 cells, but the header has 4"),
        ("a.csv", "db_id,question,sql\na,q,SELECT 1, 2\n", "line 2: 4 cells, but the header has 3"),
        ("a.csv", 'db_id,question,sql\na,"q\nr",x\na,"q" r,x\n', "line 4: not CSV"),
        ("a.csv", 'db_id,question,sql\na,"q,x\n', "line 2: not CSV"),
        ("a.csv", "db_id,question,sql\na,q," + "x" * 200_000, "line 2: not CSV: field larger"),
    ],
)
def test_faults_are_named_in_one_line(tmp_path, name, content, words):
    with pytest.raises(ValueError) as error:
        read(tmp_path, name, content)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))


def paths_of(value, place=()):
    """The place of each text in a JSON value: the keys and indices that lead to it."""
    if isinstance(value, str):
        yield place
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths_of(item, (*place, index))


SPARC = {"database_id": "one", "interaction": [TURN, TURN]}


@pytest.mark.parametrize("place", sorted(paths_of([SPARC, BIRD]), key=str))
def test_half_a_character_is_refused_in_every_text(tmp_path, place):
    entries = json.loads(json.dumps([SPARC, BIRD]))
    part = entries
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] += "\ud83d"
    with pytest.raises(ValueError, match=f"entry {place[0]}.*: {place[-1]}: half a character"):
        read(tmp_path, "a.json", json.dumps(entries))
    part[place[-1]] = part[place[-1]][:-1] + "\ud83d\ude00"  # a whole one
    if place[-1] not in ("db_id", "database_id"):
        assert len(read(tmp_path, "a.json", json.dumps(entries))) == 2


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_any_text_can_be_read_from_csv(tmp_path_factory, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["db_id", "question", "sql"], *[["one", *row] for row in rows]])
    found = read(tmp_path_factory.mktemp("csv"), "a.csv", file.getvalue().encode())
    ends = [[text.replace("\r\n", "\n").replace("\r", "\n") for text in row] for row in rows]
    assert found == [["one", (text, sql.strip(), "")] for text, sql in ends]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.csv"])
def test_a_question_without_sql_is_skipped_and_listed_in_every_format(tmp_path, name):
    make_database(tmp_path / "database" / "one.sqlite")
    rows = [("q0", "SELECT 1"), ("q1", ""), ("q2", " ")]
    entries = [{"db_id": "one", "question": q, "SQL": sql or None} for q, sql in rows]
    lines = "\n".join(map(json.dumps, entries))
    table = "db_id,question,sql\n" + "".join(f"one,{q},{sql}\n" for q, sql in rows)
    text = {"json": json.dumps(entries), "jsonl": lines, "csv": table}[name.split(".")[1]]
    (tmp_path / name).write_text(text)
    corpus = load_corpus(tmp_path / name, None, tmp_path / "database")
    assert [turn.turn_id for turn in corpus.turns] == ["train:0:0"]
    assert [skip.reason for skip in corpus.skipped] == [
        "turn 0 has no SQL: it and all later turns are left out"
    ] * 2


GOLDS = [
    "SELECT CAST(SUM(CASE WHEN a > 1 THEN 1 ELSE 0 END) AS REAL) * 100 / COUNT(*) FROM `t`",
    "SELECT IIF(a > 1, 'much', 'little') FROM t",
    "SELECT a, ROW_NUMBER() OVER (PARTITION BY b ORDER BY a DESC) FROM t",
    "WITH x AS (SELECT a FROM t) SELECT MAX(a) FROM x",
    "SELECT STRFTIME('%Y', b) FROM t WHERE b LIKE '20%' LIMIT 1",
    "SELECT T1.a FROM t AS T1 INNER JOIN t AS T2 ON T1.a = T2.a WHERE T1.b IS NOT NULL",
    "SELECT a\nFROM t\nORDER BY a DESC",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_gold_sql_outside_of_the_official_grammar_is_scored(tmp_path, gold):
    """The gold SQL as the answer gets a reward and a score, even if the official parser cannot read
    it."""
    script = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, '2001'), (2, '2')"
    make_database(tmp_path / "database" / "one.sqlite", script)
    (tmp_path / "dev.json").write_text(json.dumps([{**BIRD, "SQL": gold}]))
    corpus = load_corpus(tmp_path / "dev.json", None, tmp_path / "database")
    turn = corpus.turns[0]
    database = corpus.databases["one"]
    env = SqlEnv(turn, database, EnvConfig(), "full")
    env.reset()
    env.step(f"<answer_sql>{gold}</answer_sql>")
    score = score_turn(Trajectory(turn, 0, [], env))
    assert score.ex and score.hardness in ("unparsed", "easy", "medium", "hard", "extra")
    assert summarize([score])["all"]["ex"] == 100.0
    assert turn.ex == "set"
    ex, em = answer_scores(
        gold, turn, database.schema, database.path, RewardConfig(), EnvConfig().query
    )
    assert ex in (0.0, 1.0) and em in (0.0, 1.0)
    assert turn.evidence == "much means a > 1"
