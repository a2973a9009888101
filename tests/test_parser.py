import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.agent.parser import ParseError, Reply, ToolCall, Verdict, format_reply, parse_reply

CALL = '<tool_call>\n{"name": "exec_sql", "arguments": {"code": "SELECT 1"}}\n</tool_call>'


def test_a_full_reply():
    reply = parse_reply(f"<think>\nhm\n</think>\n<exec_verify>no_pass</exec_verify>\n{CALL}")
    assert reply == Reply("hm", Verdict.NO_PASS, None, ToolCall("exec_sql", "SELECT 1"))


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
        ('<tool_call>{"name": "a", "arguments": {"sql": "x"}}</tool_call>', ParseError.BAD_ARGUMENTS),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ParseError.BAD_JSON),
    ],
)
def test_what_cannot_be_acted_on_is_named(text, error):
    reply = parse_reply(text)
    assert reply.error is error and reply.tool_call is None and reply.answer is None


def test_tags_inside_the_thinking_are_thoughts():
    assert parse_reply(f"<think>{CALL}</think><answer_sql>SELECT 2</answer_sql>").answer == "SELECT 2"
    assert parse_reply("<think><answer_sql>SELECT 1</answer_sql></think>").error is ParseError.NO_ACTION


@pytest.mark.parametrize("place", range(4))
def test_a_further_thought_changes_nothing_wherever_it_stands(place):
    pieces = ["<think>a</think>", "<exec_verify>pass</exec_verify>", "<answer_sql>SELECT 1</answer_sql>", ""]
    thought = f"<think>b <exec_verify>no_pass</exec_verify> {CALL} <answer_sql>SELECT 2</answer_sql></think>"
    plain = parse_reply("".join(pieces))
    pieces.insert(place, thought)
    reply = parse_reply("".join(pieces))
    assert (reply.answer, reply.exec_verdict, reply.tool_call) == ("SELECT 1", Verdict.PASS, None)
    assert plain.think == "a" and "a" in reply.think and "b" in reply.think


def test_a_thought_inside_an_answer_is_text():
    assert parse_reply("<answer_sql>SELECT '<think>'</answer_sql>").answer == "SELECT '<think>'"
    assert parse_reply(f"{CALL}<think>").tool_call.code == "SELECT 1"
    assert parse_reply(f"<think>a</think><think>{CALL}").error is ParseError.UNCLOSED_THINK
    assert parse_reply("<think>a</think><think>b").think == "a\nb"


def test_a_call_goes_before_an_answer_the_first_call_and_the_last_answer_count():
    assert parse_reply(f"<answer_sql>a</answer_sql>{CALL}").tool_call is not None
    assert parse_reply(CALL + CALL.replace("SELECT 1", "SELECT 2")).tool_call.code == "SELECT 1"
    assert parse_reply("<answer_sql>a</answer_sql><answer_sql>b</answer_sql>").answer == "b"


def test_arguments_may_be_a_json_string_and_verdicts_are_exact():
    assert parse_reply('<tool_call>{"name": "a", "arguments": "{\\"code\\": \\"b\\"}"}</tool_call>').tool_call.code == "b"
    assert parse_reply(f"<exec_verify>maybe</exec_verify>{CALL}").exec_verdict is None


def test_linear_in_a_megabyte():
    start = time.perf_counter()
    for tag in ("<think>", "<tool_call>", "<answer_sql>", "</think>"):
        parse_reply(tag * 120_000)
    assert time.perf_counter() - start < 2


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=20).map(str.strip)
actions = st.one_of(st.tuples(st.just("call"), words, words), st.tuples(st.just("answer"), words.filter(bool)))


@given(words, st.sampled_from([None, *Verdict]), st.sampled_from([None, *Verdict]), actions)
def test_format_then_parse_gives_the_reply_back(think, exec_verdict, memory_verdict, action):
    call = ToolCall(*action[1:]) if action[0] == "call" else None
    reply = Reply(think, exec_verdict, memory_verdict, call, action[1] if call is None else None)
    assert parse_reply(format_reply(reply)) == reply


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<answer_sql>", "</answer_sql>", '{"name"', "\x00", "é"]


@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8).map(lambda b: b.decode("latin-1")))))
def test_any_text_gives_a_reply(pieces):
    reply = parse_reply("".join(pieces))
    assert sum(x is not None for x in (reply.tool_call, reply.answer, reply.error)) == 1
