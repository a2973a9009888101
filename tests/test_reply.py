"""Replies as models write them, as data; and that formatted replies are parsed to the same data."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.agent.protocol import Parameter
from mtsql.agent.reply import (
    Answer,
    ParseError,
    Reply,
    ToolCall,
    Verdict,
    format_reply,
    parse_reply,
)

CALL = '<tool_call>\n{"name": "exec_sql", "arguments": {"code": "SELECT 1"}}\n</tool_call>'


SELECT_1 = ToolCall("exec_sql", {"code": "SELECT 1"})


def test_a_reply_is_read_into_thought_verdict_and_call():
    reply = parse_reply(f"<think>\nhm\n</think>\n<exec_verify>no_pass</exec_verify>\n{CALL}")
    assert reply == Reply(ToolCall("exec_sql", {"code": "SELECT 1"}), "hm", Verdict.NO_PASS)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ParseError.NO_ACTION),
        ("SELECT 1", ParseError.NO_ACTION),
        ("<think>x", ParseError.UNCLOSED_THINK),
        ("<tool_call>{}", ParseError.UNCLOSED_CALL),
        ("<answer_sql>SELECT 1", ParseError.UNCLOSED_ANSWER),
        ("<answer_sql> </answer_sql>", ParseError.EMPTY_ANSWER),
        ("<tool_call>{'a'}</tool_call>", ParseError.BAD_JSON),
        ("<tool_call>[1]</tool_call>", ParseError.NO_NAME),
        ('<tool_call>{"name": 3}</tool_call>', ParseError.NO_NAME),
        (
            '<tool_call>{"name": "a", "arguments": {"sql": "x"}}</tool_call>',
            ParseError.BAD_ARGUMENTS,
        ),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ParseError.BAD_JSON),
    ],
)
def test_a_reply_without_a_valid_action_names_its_error(text, error):
    assert parse_reply(text).action is error


def test_tags_inside_the_thinking_are_thoughts():
    answered = parse_reply(f"<think>{CALL}</think><answer_sql>SELECT 2</answer_sql>")
    assert answered.action == Answer("SELECT 2")
    thought = parse_reply("<think><answer_sql>SELECT 1</answer_sql></think>")
    assert thought.action is ParseError.NO_ACTION


@pytest.mark.parametrize("place", range(4))
def test_a_further_thought_changes_nothing_at_any_place(place):
    pieces = [
        "<think>a</think>",
        "<exec_verify>pass</exec_verify>",
        "<answer_sql>SELECT 1</answer_sql>",
        "",
    ]
    verdict, answer = "<exec_verify>no_pass</exec_verify>", "<answer_sql>SELECT 2</answer_sql>"
    thought = f"<think>b {verdict} {CALL} {answer}</think>"
    plain = parse_reply("".join(pieces))
    pieces.insert(place, thought)
    reply = parse_reply("".join(pieces))
    assert (reply.action, reply.exec_verdict) == (Answer("SELECT 1"), Verdict.PASS)
    assert plain.think == "a" and "a" in reply.think and "b" in reply.think


def test_a_thought_inside_an_answer_is_text():
    assert parse_reply("<answer_sql>SELECT '<think>'</answer_sql>").action.sql == "SELECT '<think>'"
    assert parse_reply(f"{CALL}<think>").action == SELECT_1
    assert parse_reply(f"<think>a</think><think>{CALL}").action is ParseError.UNCLOSED_THINK
    assert parse_reply("<think>a</think><think>b").think == "a\nb"


def test_a_call_goes_before_an_answer_the_first_call_and_the_last_answer_count():
    assert parse_reply(f"<answer_sql>a</answer_sql>{CALL}").action == SELECT_1
    assert parse_reply(CALL + CALL.replace("SELECT 1", "SELECT 2")).action == SELECT_1
    answers = parse_reply("<answer_sql>a</answer_sql><answer_sql>b</answer_sql>")
    assert answers.action == Answer("b")


def test_arguments_may_be_a_json_string_and_verdicts_are_exact():
    text = '<tool_call>{"name": "a", "arguments": "{\\"code\\": \\"b\\"}"}</tool_call>'
    assert parse_reply(text).action == ToolCall("a", {"code": "b"})
    assert parse_reply(f"<exec_verify>maybe</exec_verify>{CALL}").exec_verdict is None


def call(code: str) -> str:
    return f'<tool_call>{{"name": "exec_sql", "arguments": {{"code": "{code}"}}}}</tool_call>'


FENCED = "```sql\nSELECT 1\n```"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (call("SELECT a\nFROM t"), "SELECT a\nFROM t"),
        (call("SELECT\ta\r\nFROM t"), "SELECT\ta\r\nFROM t"),
        (call("SELECT '</tool_call>'"), "SELECT '</tool_call>'"),
        (call("SELECT '<think>' || '</think>'"), "SELECT '<think>' || '</think>'"),
        (call(r"SELECT \'it\', \"x\", '\\\\'"), "SELECT 'it', \"x\", '\\\\'"),
        (call(r"SELECT '\ud83d'"), "SELECT '\ufffd'"),
        (call(r"SELECT '\ud83d\ude00'"), "SELECT '\U0001f600'"),
        (call(FENCED.replace("\n", r"\n")), "SELECT 1"),
        (call(FENCED), "SELECT 1"),
        (f"<tool_call>\n```json\n{CALL[12:-13]}\n```\n</tool_call>", "SELECT 1"),
        (f"Then <tool_call> comes: {CALL}", "SELECT 1"),
        (f"I call the tool inside <tool_call> </tool_call>: {CALL}", "SELECT 1"),
        (f"<tool_call>{{oops}}</tool_call>{CALL}", "SELECT 1"),
        (CALL.replace("arguments", "parameters"), "SELECT 1"),
        (f"<think>a</think>\n\n<exec_verify>pass</exec_verify>\n{CALL[12:-13]}", "SELECT 1"),
        ('<|python_tag|>{"name": "exec_sql", "parameters": {"code": "SELECT\n1"}}', "SELECT\n1"),
    ],
)
def test_calls_as_models_write_them(text, code):
    assert parse_reply(text).action == ToolCall("exec_sql", {"code": code})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"<answer_sql>{FENCED}</answer_sql>", "SELECT 1"),
        (f"<answer_sql>\n{FENCED}\n</answer_sql>", "SELECT 1"),
        ("<answer_sql>```sql SELECT 1```</answer_sql>", "SELECT 1"),
        ("<answer_sql>```\nselect\n1</answer_sql>", "select\n1"),
        ("No <tool_call> is needed. <answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
        ("<tool_call>{oops}</tool_call> <answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
        ("Inside <answer_sql>, as asked: <answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
        ("<answer_sql>SELECT 1</answer_sql> (inside <answer_sql>)", "SELECT 1"),
        ("<answer_sql></answer_sql> is for it: <answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
        ("<answer_sql>SELECT '</answer_sql>'</answer_sql>", "SELECT '</answer_sql>'"),
        ("<answer_sql>SELECT '<answer_sql>'</answer_sql>", "SELECT '<answer_sql>'"),
        ("<answer_sql>it's</answer_sql><answer_sql>it's 2</answer_sql>", "it's 2"),
        ("<answer_sql>SELECT 'a</answer_sql>", "SELECT 'a"),
        (f"<think>a</think><think>b {CALL}</think><answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
        (f"b {CALL}</think><answer_sql>SELECT 1</answer_sql>", "SELECT 1"),
    ],
)
def test_answers_as_models_write_them(text, answer):
    assert parse_reply(text).action == Answer(answer)


@pytest.mark.parametrize("text", ['{"a": 1}', "{", "[1]", '{"name": "a"} is a call', "{'name'}"])
def test_json_without_tags_is_no_call_unless_it_is_the_whole_reply_and_has_a_name(text):
    assert parse_reply(text).action is ParseError.NO_ACTION
    assert parse_reply('{"name": "exec_sql"}').action is ParseError.BAD_ARGUMENTS


def test_a_verdict_is_read_outside_of_actions_only():
    literal = "SELECT '<exec_verify>pass</exec_verify>'"
    assert parse_reply(call(literal)).exec_verdict is None
    assert parse_reply(f"<answer_sql>{literal}</answer_sql>").exec_verdict is None
    named = f"After <exec_verify> comes <exec_verify>no_pass</exec_verify> {CALL}"
    assert parse_reply(named).exec_verdict is Verdict.NO_PASS


def test_a_megabyte_takes_linear_time():
    start = time.perf_counter()
    for tag in PIECES:
        parse_reply(tag * 120_000)
    for piece in (
        "<tool_call> ",
        '<tool_call>{"a',
        "<tool_call>{\\\\",
        "<answer_sql>'",
        "<answer_sql>```\n ",
    ):
        for close in ("", "</tool_call>", "</answer_sql>"):
            parse_reply(piece * 40_000 + close)
            parse_reply((piece + close) * 40_000)
    assert time.perf_counter() - start < 5


PARAMETERS = {
    "look": (
        Parameter("limit", "integer", ""),
        Parameter("share", "number", "", is_required=False),
        Parameter("names", "array", "", is_required=False),
        Parameter("text", "string", "", is_required=False),
        Parameter("is_open", "boolean", "", is_required=False),
        Parameter("more", "object", "", is_required=False),
    )
}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"limit": 3}, {"limit": 3}),
        ({"limit": 3, "code": "SELECT 1"}, {"limit": 3}),
        ({"limit": 3, "share": None}, {"limit": 3}),
        ({"limit": 3, "share": 1}, {"limit": 3, "share": 1}),
        ({"limit": 3, "names": ["a\ud83d"]}, {"limit": 3, "names": ["a\ufffd"]}),
        ({"limit": 3, "more": {"a": [1]}, "is_open": False},) * 2,
        ({"limit": 3, "text": FENCED}, {"limit": 3, "text": FENCED}),
        ({}, None),
        ({"limit": None}, None),
        ({"limit": "3"}, None),
        ({"limit": 3.5}, None),
        ({"limit": True}, None),
        ({"limit": 3, "share": "1"}, None),
        ({"limit": 3, "share": False}, None),
        ({"limit": 3, "names": {}}, None),
        ({"limit": 3, "text": 1}, None),
        ({"limit": 3, "is_open": 1}, None),
        ({"limit": 3, "more": []}, None),
    ],
)
def test_arguments_have_the_types_that_the_tool_declares(given, read):
    text = f"<tool_call>{json.dumps({'name': 'look', 'arguments': given})}</tool_call>"
    expected = ParseError.BAD_ARGUMENTS if read is None else ToolCall("look", read)
    reply = parse_reply(text, PARAMETERS)
    assert reply.action == expected
    assert read is None or parse_reply(format_reply(reply), PARAMETERS) == reply


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999"])
def test_a_number_is_finite(value):
    text = (
        f'<tool_call>{{"name": "look", "arguments": {{"limit": 3, "share": {value}}}}}</tool_call>'
    )
    assert parse_reply(text, PARAMETERS).action is ParseError.BAD_ARGUMENTS


@pytest.mark.parametrize(
    "given", ["", ', "arguments": null', ', "arguments": ""', ', "parameters": {}']
)
def test_arguments_may_be_missing_where_none_is_required(given):
    tools = {
        "now": (),
        "list": (Parameter("limit", "integer", "", is_required=False),),
        **PARAMETERS,
    }
    for name in ("now", "list"):
        text = f'<tool_call>{{"name": "{name}"{given}}}</tool_call>'
        assert parse_reply(text, tools).action == ToolCall(name, {})
    for name in ("look", "unknown"):
        text = f'<tool_call>{{"name": "{name}"{given}}}</tool_call>'
        assert parse_reply(text, tools).action is ParseError.BAD_ARGUMENTS


def test_an_argument_nested_too_deeply_is_bad():
    deep = '{"limit": 3, "names": ' + "[" * 900 + "]" * 900 + "}"
    text = f'<tool_call>{{"name": "look", "arguments": {deep}}}</tool_call>'
    assert isinstance(parse_reply(text, PARAMETERS).action, ParseError)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=20).map(
    str.strip
)
TAGS = [
    f"{slash}{tag}>"
    for slash in ("<", "</")
    for tag in ("think", "tool_call", "answer_sql", "exec_verify")
]
literals = st.lists(st.one_of(st.sampled_from(TAGS), words), max_size=4).map(
    lambda parts: f"'{''.join(parts).replace(chr(39), '')}'"
)
sql = (
    st.lists(
        st.one_of(
            literals, words.map(lambda w: w.replace("'", "").replace('"', "").replace("`", ""))
        )
    )
    .map(" ".join)
    .map(str.strip)
)
actions = st.one_of(
    st.builds(ToolCall, words, st.fixed_dictionaries({"code": st.one_of(sql, words)})),
    st.builds(Answer, sql.filter(bool)),
)


@given(words, st.sampled_from([None, *Verdict]), st.sampled_from([None, *Verdict]), actions)
def test_format_then_parse_gives_the_reply_back(think, exec_verdict, memory_verdict, action):
    reply = Reply(action, think, exec_verdict, memory_verdict)
    assert parse_reply(format_reply(reply)) == reply


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<answer_sql>",
    "</answer_sql>",
    '{"name"',
    "\x00",
    "é",
]


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=8).map(lambda b: b.decode("latin-1")))
    )
)
def test_any_text_gives_a_reply(pieces):
    reply = parse_reply("".join(pieces))
    assert isinstance(reply.action, ToolCall | Answer | ParseError)
