"""The conversation in a pipe and in a terminal of its own: what is shown, and how it ends."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from helpers.databases import snapshot
from helpers.episodes import answer, call
from helpers.runs import SCRIPTS, clean_environment
from helpers.told import told_session
from mtsql.agent.reply import Verdict, format_reply
from mtsql.chat.screen import Screen, cell_text, harmless, table_lines
from mtsql.chat.terminal import talk
from mtsql.sql.query import QueryResult, QueryStatus

COUNT = "SELECT count(*) FROM singer"
NAMES = "SELECT name, age FROM singer"
EPISODE = [
    call("SELECT count(*) FROM singers", think="all of\nthem"),
    call(COUNT, ran=Verdict.NO_PASS),
    answer(COUNT, ran=Verdict.PASS),
]


def result(rows, columns=("a",)):
    return QueryResult(QueryStatus.OK, tuple(rows), columns)


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Pipes these lines into a conversation, and returns what it prints."""
    (tmp_path / "db").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(*lines, episodes=(EPISODE,)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        talk(told_session(tmp_path / "db", *episodes), Screen(20), [])
        return capsys.readouterr().out

    return run


def test_a_piped_question_shows_each_step_and_the_table(say):
    out = say("how many singers are there ?")
    assert out.split("Ctrl-D ends.\n")[1] == (
        "? how many singers are there ?\n"
        "propose   SELECT count(*) FROM singers\n"
        "execute   error: no such table: singers\n"
        "verify    the result: no_pass\n"
        "correct   SELECT count(*) FROM singer\n"
        "execute   1 row\n"
        "verify    the result: pass\n"
        "\n"
        "SELECT count(*) FROM singer\n"
        "\n"
        "count(*)\n"
        "--------\n"
        "       2\n"
        "1 row\n"
        "(21 tokens, 0.5 s)\n"
    )
    assert "\x1b" not in out and "\r" not in out


def test_steps_unfold_and_fold(say):
    out = say("how many ?", "/steps", "/fold", "/steps 1", "/fold", "/steps 7")
    whole = "think     all of them\n          all of\n          them\n"
    assert out.count(whole) == 2 and "          error: no such table: singers\n" in out
    assert "steps are shown whole" in out and "steps are folded" in out
    assert "error: there is no question 7: this dialogue has 1" in out


def test_sql_by_hand_changes_the_history_and_is_exported(say, tmp_path):
    out = say(
        *("how many ?", f"/edit {NAMES}", "and ?", "/edit 2 SELECT nme FROM singer", "/memory"),
        *("/export mine.json", "/csv rows.csv", "/csv rows.csv", "/export db/shop.sqlite"),
        *("/undo", "/undo", "/memory", "/new", "/undo", "/undo", "/undo", "/memory"),
        episodes=([answer(COUNT)],),
    )
    assert "name  age\n----  ---\nAnn    41\nBob    25\n2 rows\n(edited by you)" in out
    assert "the answer stays as it was: error: no such column: nme" in out
    assert (
        f"1. how many ?\n   SQL: {NAMES}\n   clauses: select singer.name, singer.age; from" in out
    )
    [dialogue] = json.loads((tmp_path / "mine.json").read_text())
    assert [turn["query"] for turn in dialogue["interaction"]] == [NAMES, COUNT]
    assert (tmp_path / "rows.csv").read_text() == "count(*)\n2\n"
    assert out.count("rows.csv: 1 row") == 2 and "error: db/shop.sqlite exists" in out
    after = out.split("undone; 1 question in", 2)[2]
    assert f"SQL: {COUNT}" in after  # the edit was taken back, too
    assert after.endswith("there are no earlier questions in this dialogue\n")
    assert "error: there is nothing to undo" in after


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/scema", "unknown command /scema (did you mean /schema?); /help lists all"),
        ("/", "unknown command /;"),
        ("/undo all", "/undo takes nothing after it"),
        ("/export", "/export needs the name of a new file"),
        ("/export nowhere\0/x", "error: "),
        ("/csv rows.csv", "nothing has been asked in this dialogue"),
        ("/steps two", "expected the number of a question, found two"),
        ("/schema nobody", "there is no table nobody"),
        ("/schema SINGER", "name  country  age\n----  -------  ---\nAnn   USA       41"),
        ("/schema", "singer(name text, country text, age integer)"),
        ("/help", "  /edit [N] [SQL]   put your SQL"),
        ("/edit", "nothing has been asked"),
    ],
)
def test_a_command_answers_or_says_what_is_wrong(say, line, words):
    assert words in say(line, "/quit", "never read")


def test_hostile_text_cannot_move_the_cursor_or_be_markup(say, tmp_path):
    sql = "SELECT char(27) || '[2J' || char(10) || '[bold]x[/b] :dog:' || char(8238) AS \"[red]\""
    before = snapshot(tmp_path / "db")
    out = say("\x1b]0;title\x07 how ?", episodes=([call(sql, think="\x1b[31m\x9b"), answer(sql)],))
    assert "\x1b" not in out and "\x9b" not in out and "\u202e" not in out
    assert "\\x1b[2J\\n[bold]x[/b] :dog:\\u202e" in out and "[red]" in out
    assert "shop.sqlite" in snapshot(tmp_path / "db") and before == {}


def test_a_table_fits_any_width():
    rows = [(None, "漢字" * 40, -1.5), ("a\nb", b"\x00\xff", 12345)]
    lines = table_lines(result(rows, ("n", "text", "number")), 40, 10)
    assert lines[0] == "n" and lines[1] == "----" and lines[-1] == "... 2 more columns"
    wide = table_lines(result(rows, ("n", "text", "number")), 120, 1)
    assert wide[2].startswith("NULL  漢字") and wide[2].endswith("  -1.5")
    assert wide[-1] == "... 1 more row"
    assert table_lines(result([("x" * 1000,)], ("y" * 1000,)), 20, 1)[2] == "x" * 20
    assert cell_text("a\tb\x00") == "a\\tb\\x00" and cell_text("x" * 99) == "x" * 57 + "..."
    assert (
        harmless("👩‍🚀 é\nx", "\n") == "👩‍🚀 é\nx" and harmless("\ufeff\ud83d") == "\\ufeff\\ud83d"
    )
    many = [tuple(range(300))] * 3
    assert all(len(one) <= 60 for one in table_lines(result(many, ("c",) * 300), 60, 2))


class Terminal:
    """A conversation in a terminal of its own, with this many rows and columns."""

    def __init__(self, folder, rows, columns, *episodes, secs="0"):
        folder.mkdir(exist_ok=True)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        texts = [[format_reply(reply) for reply in one] for one in episodes]
        env = {**clean_environment(), "TERM": "xterm-256color", "TOLD": json.dumps(texts)}
        for name in ("NO_COLOR", "COLUMNS", "LINES", "CI"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "told_chat.py"), "terminal", str(folder)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**env, "TOLD_SECS": secs},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.terminal = ours
        self.text = ""

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait(self, words):
        """Wait until the screen has shown these words after the last ones."""
        end = time.monotonic() + 120
        while words not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.terminal], [], [], 1)[0]:
                self.text += os.read(self.terminal, 1 << 16).decode()
        before, _, self.text = self.text.partition(words)
        return before

    def interrupt(self, words):
        """Press Ctrl-C at a prompt until the screen shows these words.

        CPython sees a signal at a prompt only when its select() is interrupted. One that comes
        after the prompt is written and before select() waits for the next key.
        """
        for _ in range(20):
            self.type("\x03")
            end = time.monotonic() + 3
            while time.monotonic() < end and words not in self.text:
                if select.select([self.terminal], [], [], 0.5)[0]:
                    self.text += os.read(self.terminal, 1 << 16).decode()
            if words in self.text:
                break
        return self.wait(words)

    def close(self):
        """The rest of the output and the exit code. A conversation that does not end is killed."""
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end:
                if select.select([self.terminal], [], [], 1)[0]:
                    self.text += os.read(self.terminal, 1 << 16).decode()
            self.process.kill()
        except OSError:  # the other end is closed
            pass
        os.close(self.terminal)
        return self.process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(15, 60), (50, 200), (5, 20)])
def test_a_terminal_of_any_size(tmp_path, rows, columns):
    long = call(COUNT, think="a thought that goes on for a while " * 20)
    terminal = Terminal(tmp_path / "db", rows, columns, [long, answer(NAMES)], secs="0.005")
    terminal.wait("? ")
    terminal.type("who ?\n")
    shown = terminal.wait("propose")
    assert "thought" in shown and "\x1b[2K" in shown  # it streamed, and was erased
    terminal.wait("2 rows")
    terminal.wait("? ")
    terminal.type("/edit\n")
    terminal.wait("SQL: ")
    terminal.type(" WHERE age > 30\n")  # the line is filled with the SQL so far
    terminal.wait("1 row")
    terminal.wait("? ")  # a Ctrl-D that comes before the prompt is lost
    terminal.type("\x04")
    assert terminal.close() == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text).splitlines()
    assert all(len(line.split("\r")[-1]) <= columns for line in lines)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(tmp_path):
    long = call(COUNT, think="so " * 3000)
    terminal = Terminal(tmp_path / "db", 24, 80, [answer(COUNT)], [long], secs="0.01")
    terminal.wait("? ")
    terminal.type("how many ?\n")
    terminal.wait("1 row")
    terminal.wait("? ")
    terminal.type("why ?\n")
    terminal.wait("so so so")
    terminal.type("\x03")
    terminal.wait("stopped; Ctrl-D ends the conversation")
    terminal.wait("? ")
    terminal.type("/memory\n")
    shown = terminal.wait("result: 1 row")
    assert "1. how many ?" in shown and "why" not in shown.split("/memory")[1]
    time.sleep(2.1)  # a further signal within two seconds is the same one
    terminal.type("/edit\n")
    terminal.wait("SQL: ")
    before = terminal.interrupt("stopped")  # at a prompt it ends nothing
    assert "\n" in before and not re.sub(r"\x1b\[[0-9;]*m", "", before.split("\n")[-1])
    time.sleep(2.1)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.close() == 143
