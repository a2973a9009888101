"""A conversation without a screen and without a model: state, history, undo, files."""

import json
import re
from pathlib import Path

import pytest

from helpers.databases import make_database, snapshot
from helpers.episodes import answer, call
from helpers.told import told_session
from mtsql.agent.reply import Verdict
from mtsql.chat.conversation import ChatTurn
from mtsql.chat.events import Did, Ended, Sampled
from mtsql.chat.session import csv_text, event_as_data, turn_as_data
from mtsql.chat.start import open_database
from mtsql.chat.values import sampled_values
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.query import QueryConfig, QueryResult, QueryStatus

FIRST = "SELECT name FROM singer WHERE country = 'usa'"
FIXED = "SELECT name FROM singer WHERE country = 'USA'"
COUNT = "SELECT count(*) FROM singer"
EPISODE = [
    call(FIRST, think="the usa"),
    call(FIXED, ran=Verdict.NO_PASS, think="in capitals"),
    call(FIXED, "memory_retrieve", ran=Verdict.PASS),
    answer(FIXED, fits=Verdict.PASS),
]


@pytest.fixture
def talk(tmp_path):
    """Opens a session with these episodes on a database in the folder `db`."""
    (tmp_path / "db").mkdir()
    return lambda *episodes: told_session(tmp_path / "db", *episodes)


def ended(events):
    """The turn with which a question ends."""
    return list(events)[-1].turn


def test_each_step_has_a_name_a_line_and_details(talk):
    session = talk(EPISODE)
    events = list(session.ask(" who is from the usa ? "))
    turn = events[-1].turn
    assert isinstance(events[-1], Ended) and session.conversation.turns == (turn,)
    steps = [event.step for event in events if isinstance(event, Did)]
    assert [(step.name, step.summary) for step in steps] == [
        ("think", "the usa"),
        ("propose", FIRST),
        ("execute", "no rows"),
        ("think", "in capitals"),
        ("verify", "the result: no_pass"),
        ("correct", FIXED),
        ("execute", "1 row"),
        ("verify", "the result: pass"),
        ("recall", FIXED),
        ("remember", "0 earlier turns"),
        ("verify", "coherence: pass"),
        ("answer", FIXED),
    ]
    assert [s.is_good for s in steps if s.name == "execute"] == [False, True]
    assert turn.steps == tuple(steps) and steps[6].text == "Ann"
    assert (turn.question, turn.sql, turn.ending) == ("who is from the usa ?", FIXED, "answered")
    assert turn.result.rows == (("Ann",),)


def test_history_is_the_agents_own_sql_or_the_edited_one(talk):
    session = talk([answer(FIRST)], [answer(COUNT)])
    turn = ended(session.ask("who is from the usa ?"))
    assert turn.result.rows == ()
    assert session.conversation.next_turn("and ?").history == ((turn.question, FIRST),)
    edited = session.conversation.edit(1, f"  {FIXED}\n")
    assert edited.is_edited and edited.sql == FIXED and edited.result.rows == (("Ann",),)
    ended(session.ask("how many ?"))
    asked = session.conversation.next_turn("and ?")
    assert asked.history == ((turn.question, FIXED), ("how many ?", COUNT))
    assert asked.index == 2 and session.agent.asked[1].history == asked.history[:1]
    assert [(e.sql, e.result) for e in session.conversation.memory()] == [
        (FIXED, (("Ann",),)),
        (COUNT, ((2,),)),
    ]
    # Undo takes back the question, then the edit, then the first question.
    for expected in ([FIXED], [FIRST], []):
        session.conversation.undo()
        assert [one.sql for one in session.conversation.turns] == expected
    with pytest.raises(ValueError, match="nothing to undo"):
        session.conversation.undo()


def test_an_exported_conversation_is_a_corpus_of_ours(talk, tmp_path):
    session = talk([answer(FIXED)], [answer(COUNT)])
    for question in ('who is "from" the\u2028usa ? é', "how many ?"):
        ended(session.ask(question))
    session.conversation.begin()
    ended(session.ask("who ?"))
    session.conversation.edit(1, "SELECT name -- all\nFROM singer\n")
    session.export(tmp_path / "mine.json")
    corpus = load_corpus(tmp_path / "mine.json", None, tmp_path / "db")
    assert not corpus.skipped
    assert [[(t.question, t.sql, t.history) for t in d.turns] for d in corpus.dialogues] == [
        [
            ('who is "from" the\u2028usa ? é', FIXED, ()),
            ("how many ?", COUNT, (('who is "from" the\u2028usa ? é', FIXED),)),
        ],
        [("who ?", "SELECT name  FROM singer", ())],
    ]
    entries = json.loads((tmp_path / "mine.json").read_text())
    assert [t["edited"] for e in entries for t in e["interaction"]] == [False, False, True]
    session.export(tmp_path / "mine.json")  # its own file may be written again
    (tmp_path / "other.json").write_text("mine")
    with pytest.raises(ValueError, match="other.json exists: name a new file"):
        session.export(tmp_path / "other.json")
    with pytest.raises(ValueError, match="shop.sqlite exists"):
        session.export_csv(tmp_path / "db" / "shop.sqlite")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-has-this-name/x.json", "cannot be written"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a\0b", "cannot be written: embedded null"),
        ("loop/x.json", "cannot be written"),
        ("db/shop.sqlite-wal", "SQLite would read it with the database"),
        ("db/../db/shop.sqlite-journal", "SQLite would read it with the database"),
        ("mine.json", "exists and holds dialogues: name a new file"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_lost(
    talk, tmp_path, monkeypatch, name, words
):
    monkeypatch.chdir(tmp_path)
    session = talk([answer(COUNT)])
    ended(session.ask("how many ?"))
    session.export(Path("mine.json"))
    Path("loop").symlink_to("loop")
    before = snapshot(tmp_path / "db"), Path("mine.json").read_text()
    with pytest.raises(ValueError, match=f"^{re.escape(name)}.*{words}"):
        session.export_csv(Path(name))
    assert (snapshot(tmp_path / "db"), Path("mine.json").read_text()) == before
    assert len(session.conversation.turns) == 1


def test_a_question_without_sql_is_named_and_left_out_by_training(talk, tmp_path):
    session = talk(["I do not know."], [answer(COUNT)])
    turn = ended(session.ask("who ?"))
    assert (turn.sql, turn.result) == ("", None) and "gives no answer" in turn.ending
    ended(session.ask("how many ?"))
    assert "1 without SQL" in session.export(tmp_path / "mine.json")
    with pytest.raises(ValueError, match="no usable turn"):
        load_corpus(tmp_path / "mine.json", None, tmp_path / "db")
    with pytest.raises(ValueError, match="has no answer: the reply calls no tool"):
        session.export_csv(tmp_path / "rows.csv", 1)
    session.conversation.edit(1, FIXED)
    session.export(tmp_path / "mine.json")
    assert len(load_corpus(tmp_path / "mine.json", None, tmp_path / "db").turns) == 2


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE singer",
        "INSERT INTO singer VALUES ('x', 'y', 1)",
        "DELETE FROM singer",
        "SELECT nme FROM singer",
        "SELECT 1; DROP TABLE singer",
        " ",
    ],
)
def test_sql_by_hand_that_does_not_only_read_changes_nothing(talk, tmp_path, sql):
    session = talk([answer(sql if sql.strip() else COUNT)])
    before = snapshot(tmp_path / "db")
    turn = ended(session.ask("who ?"))
    assert turn.has_rows == (not sql.strip())
    with pytest.raises(ValueError, match="does not run|is empty"):
        session.conversation.edit(1, sql)
    assert session.conversation.turns == (turn,)
    assert snapshot(tmp_path / "db") == before  # not a byte, and no other file


def test_an_empty_question_and_wrong_numbers_are_refused(talk):
    session = talk([answer(COUNT)])
    with pytest.raises(ValueError, match="the question is empty"):
        next(session.ask("  "))
    for act in (session.conversation.begin, session.conversation.turn):
        with pytest.raises(ValueError, match="dialogue"):
            act()
    with pytest.raises(ValueError, match="no dialogue to export"):
        session.conversation.sparc_text()
    ended(session.ask("half a \ud83d ?"))
    assert session.conversation.turns[0].question == "half a \ufffd ?"
    with pytest.raises(ValueError, match="no question 2: this dialogue has 1"):
        session.conversation.edit(2, COUNT)


def test_json_and_csv_hold_every_kind_of_value(talk):
    sql = (
        "SELECT NULL AS n, x'00ff' AS b, 9e999 AS i, 'a\"\n,<b>' AS t, 2.5 AS f, 7 AS i, "
        "9007199254740993 AS big"
    )
    turn = ended(talk([answer(sql)]).ask("what ?"))
    data = json.loads(json.dumps(turn_as_data(turn), allow_nan=False))
    big = "9007199254740993"
    assert data["rows"] == [[None, "X'00FF'", "inf", 'a"\n,<b>', 2.5, 7, big]]
    assert data["columns"] == ["n", "b", "i", "t", "f", "i", "big"] and data["summary"] == "1 row"
    header, _, rest = csv_text(turn.result).partition("\n")
    assert header == "n,b,i,t,f,i,big" and rest == f',X\'00FF\',inf,"a""\n,<b>",2.5,7,{big}\n'
    assert event_as_data(Sampled("x")) == {"kind": "sampled", "text": "x"}
    many = QueryResult(QueryStatus.OK, tuple((i,) for i in range(9)), ("a",))
    assert event_as_data(Ended(ChatTurn("q", "s", "answered", many)), 2)["turn"] == {
        **turn_as_data(ChatTurn("q", "s", "answered", many)),
        "rows": [[0], [1]],
    }


def test_values_are_sampled_from_columns_of_texts(tmp_path):
    script = """CREATE TABLE "two words" ("first name" TEXT, age INT, note TEXT);
    INSERT INTO "two words" VALUES ('O''Neil', 1, NULL), ('Ann', 2, ''), ('Ann', 3, NULL),
    (7, 4, printf('%.60c', 'x')), ('Zoe', 5, NULL);"""
    database = open_database(make_database(tmp_path / "shop.db", script))
    limits = QueryConfig()
    assert sampled_values(database, 2, limits) == ("\"two words\".\"first name\": 'O''Neil', 'Ann'")
    assert sampled_values(database, 0, limits) == ""
