"""Prediction files score as the texts that were written into them."""

import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.judge.official_files import NO_ANSWER, prediction_line, read_gold, read_predictions
from mtsql.judge.official_scorer import ScorerConfig, score_files
from mtsql.rl.evaluate import TurnScore, predictions_text
from mtsql.sql.schema import schema_from_sqlite
from mtsql.sql.tables_json import tables_entry

NAMES = ["Ann", "a  b", "a\nb", "a\tb", "a\r\nb", "--x", "/*x*/", "it's", 'q"q', "\u2028"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a database of odd names, and its tables.json."""
    folder = tmp_path_factory.mktemp("shop")
    with closing(sqlite3.connect(folder / "shop.sqlite")) as connection:
        connection.execute("CREATE TABLE t (name TEXT, age INT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(n, i) for i, n in enumerate(NAMES)])
        connection.commit()
    schema = schema_from_sqlite(folder / "shop.sqlite")
    (folder / "tables.json").write_text(json.dumps([tables_entry(schema)]))
    return folder, schema


def turn_score(prediction, ex=False, em=False, dialogue="dev:0"):
    return TurnScore("dev:0:0", dialogue, "1", "easy", ex, em, prediction, "answered", 1, {})


def read_back(folder, predictions):
    """The texts that the scorer reads from the file of these predictions."""
    file = folder / "predictions.sql"
    file.write_bytes(predictions_text([turn_score(text) for text in predictions]).encode())
    (found,) = read_predictions(file)
    return found


GAPS = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", " \n\n ", "\x0c", "/* c */", "/* it's\n*/ ", "/**/"]
)
COMMENTS = st.sampled_from(
    [" -- c\n", "--\n", " -- it's \"x\n", " -- /* \n", "/* -- */", "/* ' */", '/*\n"*/']
)
QUOTES = st.sampled_from("'\"")


@st.composite
def queries(draw, gaps, values):
    """A query on the shop with odd gaps, and a literal of either quotes."""
    quote = draw(QUOTES)
    value = draw(values)
    literal = quote + value.replace(quote, quote * 2) + quote
    head = draw(
        st.sampled_from(
            ["SELECT name", "SELECT age AS x", "SELECT DISTINCT age", "SELECT count ( * )"]
        )
    )
    tail = f"FROM t WHERE name = {literal} OR age < 2" if draw(st.booleans()) else "FROM t"
    if draw(st.booleans()):
        tail = tail.replace("name =", "name LIKE").replace(literal, f"{literal}")
    words = [*head.split(), *tail.replace(literal, "LITERAL").split()]
    text = "".join(word + draw(gaps) for word in words).replace("LITERAL", literal)
    return draw(st.sampled_from(["", " ", "\n", "\t"])) + text


GOLDS = ["SELECT name FROM t", "SELECT count ( * ) FROM t", "SELECT age FROM t WHERE age < 2"] + [
    "SELECT age FROM t WHERE name = 'x' OR age < 2"
]


@given(queries(st.one_of(GAPS, COMMENTS), st.sampled_from(NAMES)), st.sampled_from(GOLDS))
@example("SELECT name FROM t -- it's\nWHERE age < 2", "SELECT name FROM t")
def test_execution_match_is_that_of_the_text(shop, sql, gold):
    folder, _ = shop
    path = folder / "shop.sqlite"
    (line,) = read_back(folder, [sql])
    assert execution_match(line, gold, path) == execution_match(sql, gold, path)


@given(
    queries(
        GAPS.filter(lambda gap: "*" not in gap), st.sampled_from(["Ann", "a  b", "--x", "\u2028"])
    )
)
def test_exact_match_is_that_of_a_text_without_comments(shop, sql):
    folder, schema = shop
    (line,) = read_back(folder, [sql])
    for gold in GOLDS:
        assert exact_match(line, gold, schema) == exact_match(sql, gold, schema)


PIECES = [
    "'",
    '"',
    "''",
    "`",
    "[",
    "]",
    "--",
    "/*",
    "*/",
    "\n",
    "\t",
    "\r",
    " ",
    "x",
    "1",
    "||",
    ",",
    ";",
    "'a\nb'",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
@example("'a\nb' 'c\nd'")
@example('"--\n", 1')
@example("1 /* ' */ -- \"\n, 'a\tb' LIKE 'a\tb'")
def test_sqlite_reads_the_line_as_the_text(text):
    """The same rows, or an error for both; names may differ, and those with a line break."""
    sql = f"SELECT {text}"
    assume("`" not in text and "[" not in text)
    with closing(sqlite3.connect(":memory:")) as connection:
        outcomes = []
        for query in (sql, prediction_line(sql)):
            try:
                outcomes.append(connection.execute(query).fetchall())
            except (sqlite3.Error, sqlite3.Warning):
                outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@given(
    st.text(
        st.sampled_from([*"\n\r\t\x0b\x0c\x1c\x1e\x85\xa0\u2028\u3000\ufeff\ud83d\0 '\"-/*xé;"])
    )
)
@example("\ufeff\ufeff SELECT 1")
def test_any_text_is_one_line_that_is_read_back(tmp_path_factory, text):
    line = prediction_line(text)
    assert prediction_line(line) == line and line
    folder = tmp_path_factory.getbasetemp()
    assert read_back(folder, [text, "SELECT 1", text]) == [line, "SELECT 1", line]


@pytest.mark.parametrize("text", [None, "", " ", "\n\n", "\t", "\ufeff"])
def test_no_answer_is_a_line_of_its_own(tmp_path, text):
    assert prediction_line(text) == NO_ANSWER
    assert read_back(tmp_path, [text, "SELECT 1"]) == [NO_ANSWER, "SELECT 1"]


def test_the_scorer_gives_the_same_tables_as_the_scores(shop):
    """What eval.py writes: the verdicts of each line, by the official files and by the
    functions."""
    folder, schema = shop
    texts = [
        "SELECT  name\n\tFROM t -- all of them\n",
        "SELECT name /* it's */ FROM t",
        "SELECT age FROM t WHERE name = 'a\nb'",
        'SELECT age FROM t WHERE name = "a\tb"',
        "SELECT age FROM t WHERE name = '--x' -- '\n",
        None,
        "SELECT name FROM t\r\nWHERE name = '\u2028'",
        "-- SELECT name FROM t",
    ]
    golds = [
        "SELECT name FROM t",
        "SELECT name FROM t",
        "SELECT age FROM t WHERE age = 2",
        "SELECT age FROM t WHERE name = 'a'||char(9)||'b'",
        "SELECT age FROM t WHERE name = '--x'",
        "SELECT name FROM t",
        "SELECT name FROM t WHERE name = '\u2028'",
        "SELECT name FROM t",
    ]
    path = folder / "shop.sqlite"
    scores = []
    for i, (text, gold) in enumerate(zip(texts, golds, strict=True)):
        line = prediction_line(text)
        ex, em = execution_match(line, gold, path), exact_match(line, gold, schema)
        scores.append(turn_score(text or "", ex, em, f"dev:{i // 3}"))
    lines = [f"{gold}\tshop" for gold in golds]
    lines[3:3], lines[7:7] = [""], [""]
    (folder / "gold.txt").write_text(
        "\r\n".join(lines) + "\r\n\r\n\r\n", encoding="utf-8-sig", newline=""
    )
    (folder / "pred.sql").write_text(predictions_text(scores), encoding="utf-8")
    files = (folder / name for name in ("gold.txt", "pred.sql", "tables.json"))
    report = score_files(*files, [folder], ScorerConfig(num_threads=1))
    assert [(s.ex, s.em) for s in report.scores] == [(s.ex, s.em) for s in scores]
    assert [s.ex for s in scores] == [True, True, True, True, True, False, True, False]
    assert report.summary.interactions.count == 3


def test_marks_and_blank_lines_at_the_end_make_no_difference(tmp_path):
    for name, content in (
        ("plain", b"SELECT 1\ta\n\nSELECT 2\tb\n"),
        ("odd", b"\xef\xbb\xbfSELECT 1\ta\r\n\r\nSELECT 2\tb\r\n\r\n \r\n\r\n"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_predictions(tmp_path / name) == [["SELECT 1"], ["SELECT 2"]]
        assert [[g.db_id for g in turns] for turns in read_gold(tmp_path / name)] == [["a"], ["b"]]
    (tmp_path / "utf16").write_bytes("SELECT 1".encode("utf-16"))
    with pytest.raises(ValueError, match="utf16: not UTF-8"):
        read_predictions(tmp_path / "utf16")
