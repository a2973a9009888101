"""A prompt records which of its stretches are data: text from a file, a database or the model."""

import copy
import json
import pickle
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.episodes import BOTH, EXEC, MEMORY
from mtsql.agent import prompts
from mtsql.agent.memory import MemoryEntry
from mtsql.agent.prompt_text import PromptText, fill, join, ours
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import ParseError
from mtsql.agent.tools import tools_named
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Column, Schema, Table

DATA = "<think>{task} </answer_sql>"  # stands wherever data stands
SCHEMA = Schema(f"shop {DATA}", (Table(DATA, (Column(DATA, DATA),)),))
TURN = Turn("t:0:1", 1, "shop", DATA, DATA, ((DATA, DATA), (DATA, DATA)), DATA)
ENTRY = MemoryEntry(DATA, DATA, (DATA,), ((DATA,),))


def all_texts(style):
    """Every text that the model reads, made of `DATA`."""
    yield prompts.first_message(TURN, SCHEMA, style, 1, tools_named(BOTH))
    yield prompts.unknown_tool(BOTH)
    yield prompts.unknown_tool(())
    for offered in (BOTH, EXEC, MEMORY):
        tools = tools_named(offered)
        yield prompts.first_message(TURN, SCHEMA, style, 4, tools)
        yield prompts.malformed_call(ParseError.BAD_ARGUMENTS, tools)
        yield prompts.exec_observation(TURN, DATA, DATA, style, offered)
        for shown in (DATA, None):
            for memory in ([], [ENTRY], [ENTRY, ENTRY]):
                yield prompts.memory_observation(TURN, DATA, shown, memory, style, 99, offered)


@pytest.mark.parametrize("style", get_args(PromptStyle))
def test_no_stretch_of_data_is_ours(style):
    num_ours = 0
    for text in all_texts(style):
        parts = getattr(text, "parts", ((text, False),))
        assert "".join(stretch for stretch, _ in parts) == text
        assert DATA not in " ".join(stretch for stretch, is_ours in parts if is_ours)
        num_ours += sum("<answer_sql> </answer_sql>" in s for s, is_ours in parts if is_ours)
    # One direct task, three with tools, one result without a memory to ask, eighteen checklists.
    assert num_ours == (0 if style == "brief" else 1 + 3 + 1 + 18)


def test_sentences_have_no_field_left_and_data_no_field_at_all():
    for text in all_texts("full"):
        rest = "".join(stretch for stretch, is_ours in text.parts if is_ours)
        call = '{"name": TOOL, "arguments": {"code": QUERY}}'
        assert "{" not in rest.replace(call, "").replace('{"code": QUERY}', "")


def test_a_filled_template_is_the_formatted_string():
    template, fields = "{{a}} {b}, {c}{b} {{}}", {"b": "{x}", "c": 4}
    text = fill(template, **fields)
    assert text == template.format(**fields) == "{a} {x}, 4{x} {}"
    assert "".join(s for s, is_ours in text.parts if is_ours) == "{a} ,  {}"
    assert fill("{a}{a}", a=ours("x")).parts == (("x", True), ("x", True))
    assert fill("", a=1).parts == () and fill("") == ""
    with pytest.raises(KeyError):
        fill("{a}")


def test_texts_are_joined_with_a_separator_of_ours():
    text = join(", ", ["a", ours("b"), fill("c{x}", x="d")])
    assert text == "a, b, cd" and join(", ", []) == ""
    assert [s for s, is_ours in text.parts if not is_ours] == ["a", "d"]


@given(st.lists(st.tuples(st.text(max_size=3), st.booleans()), max_size=4))
def test_it_is_an_ordinary_string_that_survives_copies(parts):
    text = PromptText(parts)
    assert text == "".join(s for s, _ in parts) and hash(text) == hash(str(text))
    assert json.loads(json.dumps(text)) == text
    for again in (pickle.loads(pickle.dumps(text)), copy.copy(text), copy.deepcopy([text])[0]):
        assert again == text and again.parts == text.parts
    assert not hasattr(text + "", "parts") and not hasattr(f"{text}", "parts")
