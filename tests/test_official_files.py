"""Gold and prediction files are read by the official rules, and a prediction file scores as the
texts that were written into it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.judge.official_files import (
    NO_ANSWER,
    prediction_line,
    predictions_text,
    read_gold,
    read_predictions,
)
from mtsql.judge.score_files import ScorerConfig, score_files
from mtsql.sql.schema import Schema, schema_from_sqlite
from mtsql.sql.tables_json import tables_entry

NAMES = ["Ann", "a  b", "a\nb", "a\tb", "a\r\nb", "--x", "/*x*/", "it's", 'q"q', "\u2028"]
PLAIN_NAMES = ["Ann", "a  b", "--x", "\u2028"]

Shop = tuple[Path, Schema]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A folder with a database of odd names and its tables.json, and the schema."""
    folder = tmp_path_factory.mktemp("shop")
    with closing(sqlite3.connect(folder / "shop.sqlite")) as connection:
        connection.execute("CREATE TABLE t (name TEXT, age INT)")
        rows = [(name, age) for age, name in enumerate(NAMES)]
        connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        connection.commit()
    schema = schema_from_sqlite(folder / "shop.sqlite")
    (folder / "tables.json").write_text(json.dumps([tables_entry(schema)]))
    return folder, schema


def read_back(folder: Path, predictions: list[str | None]) -> list[str]:
    """The texts that the scorer reads from the file of these predictions of one dialogue."""
    file = folder / "predictions.sql"
    file.write_bytes(predictions_text(("dev:0", text) for text in predictions).encode())
    (found,) = read_predictions(file)
    return found


def test_blank_lines_end_interactions_and_tabs_end_texts(tmp_path: Path) -> None:
    file = tmp_path / "gold.txt"
    file.write_text("\n SELECT 1\tshows \n\n\nSELECT 2\tshows\textra\n\n")
    found = [[(gold.line, gold.sql, gold.db_id) for gold in turns] for turns in read_gold(file)]
    assert found == [[], [(2, "SELECT 1", "shows")], [], [(5, "SELECT 2", "shows")]]
    assert read_predictions(file) == [[], ["SELECT 1"], [], ["SELECT 2"]]


def test_errors_name_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "gold.txt").write_text("SELECT 1 shows")
    with pytest.raises(ValueError, match=r"gold.txt:1: expected SQL<TAB>database id"):
        read_gold(tmp_path / "gold.txt")
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        read_predictions(tmp_path / "none.txt")
    (tmp_path / "utf16").write_bytes("SELECT 1".encode("utf-16"))
    with pytest.raises(ValueError, match="utf16: not UTF-8"):
        read_predictions(tmp_path / "utf16")


def test_byte_order_marks_and_blank_lines_at_the_end_make_no_difference(tmp_path: Path) -> None:
    for name, content in (
        ("plain", b"SELECT 1\ta\n\nSELECT 2\tb\n"),
        ("odd", b"\xef\xbb\xbfSELECT 1\ta\r\n\r\nSELECT 2\tb\r\n\r\n \r\n\r\n"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_predictions(tmp_path / name) == [["SELECT 1"], ["SELECT 2"]]
        assert [[g.db_id for g in turns] for turns in read_gold(tmp_path / name)] == [["a"], ["b"]]


GAPS = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", " \n\n ", "\x0c", "/* c */", "/* it's\n*/ ", "/**/"]
)
GAPS_WITHOUT_COMMENTS = GAPS.filter(lambda gap: "*" not in gap)
COMMENTS = st.sampled_from(
    [" -- c\n", "--\n", " -- it's \"x\n", " -- /* \n", "/* -- */", "/* ' */", '/*\n"*/']
)
HEADS = ["SELECT name", "SELECT age AS x", "SELECT DISTINCT age", "SELECT count ( * )"]
TAILS = ["FROM t", "FROM t WHERE name = LITERAL OR age < 2"]
TAILS += ["FROM t WHERE name LIKE LITERAL OR age < 2"]


@st.composite
def queries(draw: st.DrawFn, gaps: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> str:
    """A query on the shop with odd gaps between its words, and a literal in either quotes."""
    quote = draw(st.sampled_from("'\""))
    literal = quote + draw(values).replace(quote, quote * 2) + quote
    words = [*draw(st.sampled_from(HEADS)).split(), *draw(st.sampled_from(TAILS)).split()]
    text = "".join(word + draw(gaps) for word in words).replace("LITERAL", literal)
    return draw(st.sampled_from(["", " ", "\n", "\t"])) + text


GOLDS = [
    "SELECT name FROM t",
    "SELECT count ( * ) FROM t",
    "SELECT age FROM t WHERE age < 2",
    "SELECT age FROM t WHERE name = 'x' OR age < 2",
]


@given(queries(st.one_of(GAPS, COMMENTS), st.sampled_from(NAMES)), st.sampled_from(GOLDS))
@example("SELECT name FROM t -- it's\nWHERE age < 2", "SELECT name FROM t")
def test_execution_match_of_a_line_is_that_of_its_text(shop: Shop, sql: str, gold: str) -> None:
    folder, _ = shop
    path = folder / "shop.sqlite"
    (line,) = read_back(folder, [sql])
    assert execution_match(line, gold, path) == execution_match(sql, gold, path)


@given(queries(GAPS_WITHOUT_COMMENTS, st.sampled_from(PLAIN_NAMES)))
def test_exact_match_of_a_line_is_that_of_its_text_without_comments(shop: Shop, sql: str) -> None:
    folder, schema = shop
    (line,) = read_back(folder, [sql])
    for gold in GOLDS:
        assert exact_match(line, gold, schema) == exact_match(sql, gold, schema)


PIECES = ["'", '"', "''", "`", "[", "]", "--", "/*", "*/", "\n", "\t", "\r", " "]
PIECES += ["x", "1", "||", ",", ";", "'a\nb'"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
@example("'a\nb' 'c\nd'")
@example('"--\n", 1')
@example("''/*\n")
@example("1/*/*\n")
@example("1/*")
@example("1 /* ' */ -- \"\n, 'a\tb' LIKE 'a\tb'")
def test_sqlite_reads_the_line_as_the_text(text: str) -> None:
    """Both give the same rows, or both an error. Names with a line break may differ."""
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


ODD_CHARACTERS = "\n\r\t\x0b\x0c\x1c\x1e\x85\xa0\u2028\u3000\ufeff\ud83d\0 '\"-/*xé;"


@given(st.text(st.sampled_from(ODD_CHARACTERS)))
@example("\ufeff\ufeff SELECT 1")
def test_any_text_becomes_one_line_that_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    line = prediction_line(text)
    assert prediction_line(line) == line and line
    folder = tmp_path_factory.getbasetemp()
    assert read_back(folder, [text, "SELECT 1", text]) == [line, "SELECT 1", line]


@pytest.mark.parametrize("text", [None, "", " ", "\n\n", "\t", "\ufeff"])
def test_no_answer_gets_a_line_of_its_own(tmp_path: Path, text: str | None) -> None:
    assert prediction_line(text) == NO_ANSWER
    assert read_back(tmp_path, [text, "SELECT 1"]) == [NO_ANSWER, "SELECT 1"]


def test_the_scorer_finds_the_verdicts_of_the_written_texts(shop: Shop) -> None:
    """Windows line ends, byte order marks, comments and breaks in literals change no verdict."""
    folder, schema = shop
    path = folder / "shop.sqlite"
    cases = [  # (prediction, gold, execution match)
        ("SELECT  name\n\tFROM t -- all of them\n", "SELECT name FROM t", True),
        ("SELECT name /* it's */ FROM t", "SELECT name FROM t", True),
        ("SELECT age FROM t WHERE name = 'a\nb'", "SELECT age FROM t WHERE age = 2", True),
        (
            'SELECT age FROM t WHERE name = "a\tb"',
            "SELECT age FROM t WHERE name = 'a'||char(9)||'b'",
            True,
        ),
        (
            "SELECT age FROM t WHERE name = '--x' -- '\n",
            "SELECT age FROM t WHERE name = '--x'",
            True,
        ),
        (None, "SELECT name FROM t", False),
        (
            "SELECT name FROM t\r\nWHERE name = '\u2028'",
            "SELECT name FROM t WHERE name = '\u2028'",
            True,
        ),
        ("-- SELECT name FROM t", "SELECT name FROM t", False),
    ]
    dialogues = [f"dev:{i // 3}" for i in range(len(cases))]
    gold_lines = [f"{gold}\tshop" for _, gold, _ in cases]
    gold_lines = [*gold_lines[:3], "", *gold_lines[3:6], "", *gold_lines[6:]]
    gold_text = "\r\n".join(gold_lines) + "\r\n\r\n\r\n"
    (folder / "gold.txt").write_text(gold_text, encoding="utf-8-sig", newline="")
    texts = [pred for pred, _, _ in cases]
    pred_text = predictions_text(zip(dialogues, texts, strict=True))
    (folder / "pred.sql").write_text(pred_text, encoding="utf-8")

    files = (folder / name for name in ("gold.txt", "pred.sql", "tables.json"))
    report = score_files(*files, [folder], ScorerConfig(num_threads=1))
    assert [score.ex for score in report.scores] == [is_match for _, _, is_match in cases]
    for score, (pred, gold, _) in zip(report.scores, cases, strict=True):
        line = prediction_line(pred)
        assert score.ex == execution_match(line, gold, path)
        assert score.em == exact_match(line, gold, schema)
    assert report.summary.interactions.count == 3
