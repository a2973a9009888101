"""Trajectories in the forms of others are read as the same conversation."""

import json

import pytest

from helpers.pools import SCRIPT
from mtsql.agent.reply import format_reply
from mtsql.rl.pool_messages import Conversation, read_conversation

TOOLS = [{"type": "function", "function": {"name": "exec_sql"}}]
CALL, CHECK, ANSWER = (format_reply(reply) for reply in SCRIPT)
EXPECTED = Conversation(
    [{"role": "user", "content": "Q"}], TOOLS, [CALL, CHECK, ANSWER], ["one row", "no turns"]
)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def structured(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SQL = {"code": "SELECT 'a  b', 'é 😀' -- [1, 2]"}
THOUGHT = "Who is old?\nWe look."
PLAIN = [
    message("user", "Q"),
    message("assistant", CALL),
    message("tool", "one row"),
    message("assistant", CHECK),
    message("tool", "no turns"),
    message("assistant", ANSWER),
]
STRUCTURED = [
    message("user", [{"type": "text", "text": "Q"}], tool_calls=None),  # as datasets fills up
    message(
        "assistant",
        None,
        reasoning_content=THOUGHT,
        tool_calls=[structured("exec_sql", **SQL, limit=None)],
    ),
    message("tool", "one row", name="exec_sql"),
    message(
        "assistant",
        "<exec_verify>pass</exec_verify>",
        tool_calls=[{"name": "memory_retrieve", "arguments": '{"code": "SELECT 1"}'}],
    ),
    message("user", "<tool_response>\nno turns\n</tool_response>"),
    message("assistant", ANSWER.split("\n\n", 1)[1], reasoning_content="Done."),
]
SHAREGPT = [
    {"from": "human", "value": "Q"},
    {
        "from": "function_call",
        "value": f"<think>\n{THOUGHT}\n</think>\n\n"
        + json.dumps({"name": "exec_sql", "arguments": SQL}),
    },
    {"from": "observation", "value": "one row"},
    {"from": "gpt", "value": CHECK},
    {"from": "observation", "value": "no turns"},
    {"from": "gpt", "value": ANSWER},
]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PLAIN, "tools": TOOLS},
        {"messages": PLAIN, "tools": json.dumps(TOOLS)},
        {"messages": STRUCTURED, "tools": TOOLS},
        {"conversations": SHAREGPT, "tools": json.dumps(TOOLS)},
    ],
)
def test_every_form_gives_the_same_conversation(record):
    assert read_conversation(record, "here") == EXPECTED


def test_an_opening_may_have_a_system_message_and_no_tools():
    for tools in ({}, {"tools": None}, {"tools": ""}, {"tools": "[]"}):
        record = {"messages": [message("system", "S"), *PLAIN[:2]], **tools}
        found = read_conversation(record, "here")
        assert [m["role"] for m in found.opening] == ["system", "user"]
        assert (found.replies, found.observations, found.tools) == ([CALL], [], [])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (PLAIN[1:], "no question"),
        (PLAIN[:3], "does not end with a reply"),
        (PLAIN[:1], "does not end with a reply"),
        (PLAIN + [message("user", "and then ?"), message("assistant", ANSWER)], "questions"),
        (PLAIN[:3] + PLAIN[2:], "in a row"),
        (PLAIN[:2] + PLAIN[1:], "in a row"),
        (PLAIN[:1] + PLAIN[2:], "in a row"),
        ([message("system", "S"), *PLAIN[1:]], "no question"),
        ([PLAIN[0], message("assistant", "", tool_calls=[structured("f")] * 2)], "several calls"),
    ],
)
def test_what_is_no_episode_of_one_question_is_said(messages, words):
    assert words in read_conversation({"messages": messages}, "here")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "messages: expected a list of messages, found None"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": ["Q"]}, r"messages\[0\]: expected an object"),
        ({"messages": [message("bot", "Q")]}, r"messages\[0\]: role: expected one of"),
        ({"messages": [message("user", None)]}, r"messages\[0\]: content: expected a string"),
        ({"messages": [message("user", [{}])]}, r"messages\[0\]: content\[0\]: expected a string"),
        ({"messages": [message("assistant", None)]}, r"messages\[0\]: content: expected a string"),
        (
            {"messages": [message("assistant", "", tool_calls={"a": 1})]},
            r"messages\[0\]: tool_calls: expected a list",
        ),
        (
            {"messages": [message("assistant", "", tool_calls=[{"function": {}}])]},
            r"messages\[0\]: tool_calls\[0\]: name: expected a string",
        ),
        (
            {
                "messages": [
                    message("assistant", "", tool_calls=[structured("f") | {"function": 1}])
                ]
            },
            r"messages\[0\]: tool_calls\[0\]: expected an object",
        ),
        (
            {"messages": [message("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]},
            r"messages\[0\]: tool_calls\[0\]: arguments: not JSON",
        ),
        ({"messages": PLAIN, "tools": "{"}, "tools: not JSON"),
        ({"messages": PLAIN, "tools": {"name": "f"}}, "tools: expected a list of objects"),
        ({"conversations": [{"from": "x", "value": ""}]}, r"conversations\[0\]: from: expected"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: value: expected a string"),
        (
            {"conversations": [{"from": "function_call", "value": "SELECT"}]},
            r"conversations\[0\]: value: not JSON",
        ),
    ],
)
def test_a_malformed_record_names_place_and_key(record, words):
    with pytest.raises(ValueError, match=f"here: {words}") as error:
        read_conversation(record, "here")
    assert "\n" not in str(error.value)
