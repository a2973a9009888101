"""Results as the model reads them: cut by rows and characters, and never turned into more text than is shown."""

import pytest

from mtsql.agent.memory import MemoryEntry
from mtsql.agent.prompts import PromptStyle, memory_observation, show_result
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus

FULL, BRIEF = PromptStyle.FULL, PromptStyle.BRIEF


class Counted:
    """A cell that counts how often it becomes text."""

    num_texts = 0

    def __repr__(self):
        Counted.num_texts += 1
        return "x" * 50


def shown(rows, style, max_rows=10, max_chars=60):
    return show_result(QueryResult(QueryStatus.OK, tuple(rows)), max_rows, max_chars, style)


@pytest.mark.parametrize(
    ("rows", "style", "text"),
    [
        ([], FULL, "no rows"),
        ([(1, None, "a 'b'", 2.5, b"\0")], FULL, "(1, None, \"a 'b'\", 2.5, b'\\x00')"),
        ([(1, None, "a 'b'", "")], BRIEF, "1 | NULL | a 'b' | "),
        ([("", "a")], BRIEF, " | a"),
        ([("", "")], FULL, "('', '')"),
        ([(i,) for i in range(12)], BRIEF, "\n".join(map(str, range(10))) + "\n... 2 more rows"),
        ([("a" * 40,), ("b" * 40,)], BRIEF, "a" * 40 + "\n... 1 more rows"),
        ([("a" * 61,)], BRIEF, "a" * 60 + "... cut here"),
        ([("a" * 60,)], BRIEF, "a" * 60),
    ],
)
def test_a_result_is_shown_and_cut(rows, style, text):
    assert shown(rows, style) == text


def test_an_error_is_shown_and_cut():
    error = QueryResult(QueryStatus.ERROR, message="no such column: " + "x" * 99)
    assert show_result(error, 10, 30, FULL) == "error: no such column: xxxxxxx... cut here"


def test_no_more_cells_become_text_than_are_shown():
    Counted.num_texts = 0
    text = shown([(Counted(),) * 1000] * 3, FULL)
    assert len(text) < 120 and Counted.num_texts <= 4
    Counted.num_texts = 0
    turn = Turn("t:0:1", 1, "shop", "?", "SELECT 1", (("q", "SELECT 2"),))
    entry = MemoryEntry("q", "SELECT 2", ("select",), ((Counted(),) * 9,) * 60_000)
    seen = memory_observation(turn, "SELECT 1", "(1)", [entry], FULL, preview_chars=50)
    assert "Result: (" + "x" * 49 + "... cut here\n" in seen and Counted.num_texts <= 3
