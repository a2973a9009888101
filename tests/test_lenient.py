"""Replies with slips that leave no doubt about what the model meant are read as it meant them."""

import json
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.agent.lenient import repair, without_fence
from mtsql.agent.reply import (
    Answer,
    ParseError,
    Reply,
    ToolCall,
    Verdict,
    format_reply,
    parse_reply,
)

CALL = '{"name": "exec_sql", "arguments": {"code": "SELECT 1"}}'
SELECT_1 = ToolCall("exec_sql", {"code": "SELECT 1"})
OTHER = CALL.replace("SELECT 1", "SELECT 2")
INSIDE = {
    "a dict of Python": "{'name': 'exec_sql', 'arguments': {'code': 'SELECT 1', 'limit': None}}",
    "both kinds of quotes": """{'name': "exec_sql", 'arguments': {"code": 'SELECT 1'}}""",
    "commas before brackets": '{"name": "exec_sql", "arguments": {"code": "SELECT 1",},\n}',
    "a bracket too few": CALL[:-1],
    "two brackets too few": CALL[:-2],
    "a bracket too many": CALL + "}",
    "a list": f"[{CALL}]",
    "a list of two": f"[{CALL}, {OTHER}]",
    "two objects": f"{CALL}\n{OTHER}",
    "two objects, the second with a slip": f"{CALL}; {OTHER[:-1]}",
    "as OpenAI's interface has it": f'{{"type": "function", "function": {CALL}}}',
    "in a fence": f"```json\n{CALL[:-1]}\n```",
}


@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("kind", INSIDE)
def test_a_call_with_slips_is_read(kind, is_bare):
    text = INSIDE[kind] if is_bare else f"<tool_call>\n{INSIDE[kind]}\n</tool_call>"
    reply = parse_reply(f"<think>a</think>\n<exec_verify>pass</exec_verify>{text}")
    assert reply.action == SELECT_1
    assert (reply.think, reply.exec_verdict) == ("a", Verdict.PASS)


@pytest.mark.parametrize(
    "end",
    ["", "\n", "<|eom_id|>", "\n```\n", f"\n<tool_call>{OTHER}</tool_call>", "<tool_call>"],
)
def test_a_call_may_lack_its_closing_tag(end):
    assert parse_reply(f"<tool_call>{CALL}{end}").action == SELECT_1


def test_after_a_call_that_cannot_be_read_the_next_one_is():
    for wrong in ("{oops", "{}", "{'name': 'a'} and", "[", "{'a"):
        text = f"<tool_call>{wrong}<tool_call>{CALL}</tool_call>"
        assert parse_reply(text).action == SELECT_1, wrong


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"<tool_call>{CALL} and so on", ParseError.UNCLOSED_CALL),
        (f"<tool_call>{CALL[:-1]}", ParseError.UNCLOSED_CALL),
        ("<tool_call>[]</tool_call>", ParseError.NO_NAME),
        (f"<tool_call>[[{CALL}]]</tool_call>", ParseError.NO_NAME),
        (f"<tool_call>{CALL} and so on</tool_call>", ParseError.BAD_JSON),
        ("<tool_call>{'name': 'exec_sql</tool_call>", ParseError.BAD_JSON),
        ('<tool_call>{"name": "a", "x": "SELECT "b" FROM t"}</tool_call>', ParseError.BAD_JSON),
        (f"I call {CALL}", ParseError.NO_ACTION),
        (f"{CALL} is a call", ParseError.NO_ACTION),
        ("[1, 2]", ParseError.NO_ACTION),
    ],
)
def test_an_ambiguous_reply_is_an_error(text, error):
    assert parse_reply(text).action is error


@pytest.mark.parametrize("said", ["PASS", "Pass", " pass\n", "NO_PASS", "no pass", "no-pass"])
def test_verdicts_in_another_spelling_are_read(said):
    reply = parse_reply(f"<exec_verify>{said}</exec_verify><tool_call>{CALL}</tool_call>")
    assert reply.exec_verdict is (
        Verdict.PASS if said.strip().lower() == "pass" else Verdict.NO_PASS
    )


FENCED = {
    "```sql\nSELECT 1\n```\nThis counts.": "SELECT 1",
    "```sql\nSELECT 1``` counts": "SELECT 1",
    "Here it is:\n```sql\nSELECT 1\n```": "SELECT 1",
    "With this:\n\n  ```\nSELECT 1\n  ```\nit is done.": "SELECT 1",
    "```SELECT\n1```": "SELECT\n1",
    "```with\na AS (SELECT 1)\nSELECT * FROM a```": "with\na AS (SELECT 1)\nSELECT * FROM a",
    "````sql\nSELECT 1\n````": "SELECT 1",
    "```sql-server\nSELECT 1\n```": "SELECT 1",
    "```sql\r\nSELECT 1\r\n```": "SELECT 1",
    "```sql\nSELECT '```'\n```": "SELECT '```'",
    "SELECT '\n```sql\nx\n```\n'": "SELECT '\n```sql\nx\n```\n'",
    "WITH a AS (SELECT '\n```\n' \n)\n```": "WITH a AS (SELECT '\n```\n' \n)\n```",
}


@pytest.mark.parametrize("sql", FENCED)
def test_a_fence_with_explanations_around_it_gives_its_sql(sql):
    assert without_fence(sql) == FENCED[sql]
    assert parse_reply(f"<answer_sql>{sql}</answer_sql>").action == Answer(FENCED[sql])
    call = json.dumps({"name": "exec_sql", "arguments": {"code": sql}})
    assert parse_reply(f"<tool_call>{call}</tool_call>").action.arguments == {"code": FENCED[sql]}


TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\"'\\{}[],:<>/\n\t;`")),
    max_size=30,
)


@settings(max_examples=300)
@given(st.dictionaries(TEXTS, st.one_of(TEXTS, st.booleans(), st.none(), st.lists(TEXTS))))
def test_mending_leaves_json_alone_and_reads_python(value):
    written = json.dumps(value, ensure_ascii=False)
    assert json.loads(repair(written), strict=False) == value
    assert json.loads(repair(json.dumps(value)), strict=False) == value
    for broken in (written[:-1], written + "}", written[:-1] + ",}"):
        assert json.JSONDecoder(strict=False).raw_decode(repair(broken))[0] == value or value == {}


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_any_name_and_code_come_back(name, code):
    text = format_reply(Reply(ToolCall(name, {"code": code})))
    assert parse_reply(text).action == ToolCall(name, {"code": without_fence(code)})
    assert parse_reply(text.removesuffix("</tool_call>")) == parse_reply(text)


SLOW = [
    "{",
    "'",
    '"',
    '\\"',
    "\\'",
    "'a': ",
    ",",
    "\n```\n",
    "`",
    "<tool_call>",
    "<tool_call>{'a",
    "</tool_call>",
]


def test_time_is_linear_for_any_two_pieces_repeated():
    start = time.process_time()
    for first, second in product(SLOW, repeat=2):
        for before, after in (
            ("<tool_call>{", "</tool_call>"),
            ("<answer_sql>x", "</answer_sql>"),
            ("{", ""),
        ):
            parse_reply(before + (first + second) * 3000 + after)
    assert time.process_time() - start < 10
