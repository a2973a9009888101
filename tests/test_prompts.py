"""The texts that the model reads for each choice of tools. Results are shown up to a number of rows
and of characters."""

import re
from dataclasses import replace

import pytest

from helpers.episodes import BOTH, EXEC, MEMORY
from mtsql.agent import prompts
from mtsql.agent.memory import MemoryEntry
from mtsql.agent.prompts import (
    exec_observation,
    first_message,
    malformed_call,
    memory_observation,
    show_result,
    unknown_tool,
)
from mtsql.agent.protocol import TAGS, Parameter
from mtsql.agent.reply import ParseError
from mtsql.agent.tools import Tool, tools_named
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus
from mtsql.sql.schema import Column, Schema, Table

FULL, BRIEF = "full", "brief"
SCHEMA = Schema("shop", (Table("singer", (Column("name", "text"), Column("age", "integer"))),))
TURN = Turn("t:0:1", 1, "shop", "how old ?", "SELECT age", (("who ?", "SELECT name"),))

TASK = (
    "You answer questions about a SQLite database over a conversation. "
    "Write one SQL query for the current question.\n\n"
)
THINK = (
    "Think inside <think> </think>: what the question asks and what it keeps from earlier turns.\n"
)
STEPS = {
    BOTH: (
        "2. Call exec_sql with a candidate query, at least once, and judge what comes back.\n"
        "3. If there are earlier turns, call memory_retrieve once the query runs well, "
        "and judge its coherence.\n"
        "4. After any <exec_verify>no_pass</exec_verify> or "
        "<memory_verify>no_pass</memory_verify>, correct the query.\n"
    ),
    EXEC: (
        "2. Call exec_sql with a candidate query, at least once, and judge what comes back.\n"
        "3. After any <exec_verify>no_pass</exec_verify>, correct the query.\n"
    ),
    MEMORY: (
        "2. If there are earlier turns, call memory_retrieve with a candidate query, "
        "and judge its coherence.\n"
        "3. After any <memory_verify>no_pass</memory_verify>, correct the query.\n"
    ),
}
CALLS = (
    '\n\nTo call a tool, write <tool_call>{"name": TOOL, "arguments": {"code": QUERY}}</tool_call>.'
)
TOOL_LINES = {
    "exec_sql": "\n- exec_sql: Run a SQLite query on the database and return its result.",
    "memory_retrieve": (
        "\n- memory_retrieve: Return the earlier questions of this dialogue with their SQL, "
        "to check that a query is coherent."
    ),
}
SITUATION = (
    "\n\nDatabase schema:\nsinger(name text, age integer)\n\n"
    "Earlier turns:\nQuestion 1: who ?\nSQL 1: SELECT name\n\nQuestion: how old ?"
)
WITH_RESULTS = ("\nResult:\n(1)", "\nResult: (2)")
CHECKLIST = (
    "Check the query against the conversation:\n"
    "1. Take it apart into clauses. 2. Do its tables fit what is talked about? "
    "3. Do the selected columns fit this question and\nwhat was asked before? "
    "4. Do WHERE, GROUP BY and HAVING keep or drop earlier conditions as this question wants?\n"
    "5. Is the ordering kept unless it was changed? "
    "6. Do the joins follow the paths used before?\n"
)


@pytest.mark.parametrize("offered", STEPS)
def test_the_first_message_lists_steps_with_the_offered_tools(offered):
    assert first_message(TURN, SCHEMA, FULL, 4, tools_named(offered)) == (
        f"{TASK}Work in steps, one action in each message:\n1. {THINK}{STEPS[offered]}"
        "When you are done, give only the query inside <answer_sql> </answer_sql>. "
        f"You have at most 4 messages.{CALLS} The tools:"
        f"{''.join(TOOL_LINES[tool] for tool in offered)}{SITUATION}"
    )


@pytest.mark.parametrize(("max_replies", "offered"), [(4, ()), (1, ()), (1, BOTH)])
def test_without_a_step_for_tools_the_first_message_asks_for_the_answer(max_replies, offered):
    assert first_message(TURN, SCHEMA, FULL, max_replies, tools_named(offered)) == (
        f"{TASK}{THINK}Then, in the same message, "
        f"give only the query inside <answer_sql> </answer_sql>.{SITUATION}"
    )


def test_a_short_horizon_asks_for_the_answer_at_once():
    assert first_message(TURN, SCHEMA, FULL, 1, (), "short") == (
        f"{TASK}Answer in a single message: there are no tools, and no query is run before you "
        "answer.\nYou may think first, inside <think> </think>. "
        f"End with only the query inside <answer_sql> </answer_sql>.{SITUATION}"
    )
    assert first_message(TURN, SCHEMA, BRIEF, 1, (), "short") == (
        "singer: name age\nQ: who ?\nSQL: SELECT name\nQ: how old ?\nSQL:"
    )


@pytest.mark.parametrize(("style", "before"), [(FULL, "\n\nEvidence: "), (BRIEF, "\nE: ")])
def test_evidence_is_shown_before_the_question_if_there_is_any(style, before):
    plain = first_message(TURN, SCHEMA, style, 4, tools_named(BOTH))
    turn = replace(TURN, evidence="old is age > 60")
    question = "\nQ: how old ?" if style is BRIEF else "\n\nQuestion: how old ?"
    start = plain.removesuffix(question)
    assert start != plain
    text = first_message(turn, SCHEMA, style, 4, tools_named(BOTH))
    assert text == f"{start}{before}old is age > 60{question}"


@pytest.mark.parametrize("offered", [BOTH, EXEC, MEMORY, ()])
def test_the_brief_texts_name_no_tool(offered):
    assert first_message(TURN, SCHEMA, BRIEF, 4, tools_named(offered)) == (
        "singer: name age\nQ: who ?\nSQL: SELECT name\nQ: how old ?"
    )
    assert exec_observation(TURN, "SELECT 1", "1", BRIEF, offered) == "1"
    entry = MemoryEntry("who ?", "SELECT name", ("select",), None)
    for shown in ("1", None):
        seen = memory_observation(TURN, "SELECT 1", shown, [entry], BRIEF, 50, offered)
        assert seen == "who ?\nSELECT name\nhow old ?"
    lists = ((("Ann",), ("Bob",)), (("Ann", None),), ())
    memory = [MemoryEntry("who ?", "SELECT name", ("select",), rows) for rows in lists]
    seen = memory_observation(TURN, "SELECT 1", "1", memory, BRIEF, 50, offered)
    assert seen == "who ? : Ann ...\nwho ? : Ann | NULL\nwho ? : no rows\nhow old ?"


@pytest.mark.parametrize(
    ("offered", "history", "following"),
    [
        (BOTH, TURN.history, "call memory_retrieve with the query (once before you finish)"),
        (BOTH, (), "give the query inside <answer_sql> </answer_sql>"),
        (EXEC, TURN.history, "give the query inside <answer_sql> </answer_sql>"),
    ],
)
def test_after_an_execution_the_memory_follows_if_there_is_something_to_remember(
    offered, history, following
):
    turn = Turn("t:0:1", 1, "shop", "how old ?", "SELECT age", history)
    assert exec_observation(turn, "SELECT 1", "(1)", FULL, offered) == (
        "Question: how old ?\nSQL: SELECT 1\nResult:\n(1)\n\n"
        "Judge the result: 1. did the query run without an error? "
        "2. do the columns exist and answer the question?\n"
        "3. is it free of unexpected NULLs and not unexpectedly empty?\n"
        "If not, write <exec_verify>no_pass</exec_verify>, think, "
        "and call exec_sql with a better query.\n"
        f"If so, write <exec_verify>pass</exec_verify> and {following}."
    )


@pytest.mark.parametrize(
    ("offered", "shown", "results", "seventh", "tool"),
    [
        (BOTH, "(1)", WITH_RESULTS, "Do the query and its result", "exec_sql"),
        (MEMORY, "(1)", WITH_RESULTS, "Do the query and its result", "memory_retrieve"),
        (MEMORY, None, ("", ""), "Does the query", "memory_retrieve"),
        (BOTH, None, ("", ""), "Does the query", "exec_sql"),
    ],
)
def test_the_memory_speaks_of_results_only_if_it_shows_them(offered, shown, results, seventh, tool):
    clauses = ("select singer.name", "from singer")
    entry = MemoryEntry("who ?", "SELECT name", clauses, ((2,),) if shown else None)
    assert memory_observation(TURN, "SELECT 1", shown, [entry], FULL, 50, offered) == (
        f"You verify coherence.\nQuestion: how old ?\nProposed SQL: SELECT 1{results[0]}\n\n"
        "Memory of this conversation:\n[turn 1]\nQuestion: who ?\nSQL: SELECT name\n"
        f"Clauses: select singer.name; from singer{results[1]}\n\n{CHECKLIST}"
        f"7. {seventh} answer the question and stay coherent with the conversation?\n"
        "If not, write <memory_verify>no_pass</memory_verify>, think, "
        f"and call {tool} with a better query.\n"
        "If so, write <memory_verify>pass</memory_verify> "
        "and give the query inside <answer_sql> </answer_sql>."
    )


def test_a_failed_earlier_query_is_not_shown():
    entry = MemoryEntry("who ?", "SELECT nam", ("select",), None)
    seen = memory_observation(TURN, "SELECT 1", "(1)", [entry], FULL, 50, BOTH)
    assert "\nResult: not shown\n" in seen


LIMIT = (Parameter("limit", "integer", "How many."),)
LIST_TABLES = Tool("list_tables", "List the tables.", LIMIT, run=None, step="Call list_tables.")


def test_tools_with_different_arguments_are_listed_with_them():
    text = first_message(TURN, SCHEMA, FULL, 4, (*tools_named(EXEC), LIST_TABLES))
    assert (
        "\n3. Call list_tables.\n4. After any <exec_verify>no_pass</exec_verify>, correct" in text
    )
    assert (
        'write <tool_call>{"name": TOOL, "arguments": ARGUMENTS}</tool_call>. The tools:'
        f'{TOOL_LINES["exec_sql"]} Arguments: {{"code": QUERY}}.'
        '\n- list_tables: List the tables. Arguments: {"limit": INTEGER}.\n'
    ) in text


def test_a_tool_alone_is_listed_without_sentences_that_it_does_not_have():
    text = first_message(TURN, SCHEMA, FULL, 4, (replace(LIST_TABLES, step=""),))
    assert f"\n1. {THINK}When you are done, give only the query" in text
    assert '"arguments": {"limit": INTEGER}}</tool_call>. The tools:\n- list_tables: List' in text


def test_bad_arguments_are_answered_with_the_arguments_that_the_tools_have():
    tools = (*tools_named(BOTH), LIST_TABLES)
    assert malformed_call(ParseError.BAD_ARGUMENTS, tools) == (
        'The arguments must be {"code": QUERY} or {"limit": INTEGER}.'
    )


def test_every_tag_in_a_sentence_is_a_tag_of_the_protocol():
    sentences = [value for value in vars(prompts).values() if isinstance(value, str)]
    sentences += prompts.MALFORMED_CALL.values()
    found = {tag for text in sentences for tag in re.findall(r"</?[a-z_]+>", text)}
    assert found <= {*TAGS} and "<answer_sql>" in found


def test_a_call_of_an_unknown_tool_is_told_which_tools_there_are():
    no_look = "There is no such tool. Tools: exec_sql, memory_retrieve."
    assert unknown_tool(BOTH) == no_look
    no_exec = "There is no such tool. Tools: memory_retrieve."
    assert unknown_tool(MEMORY) == no_exec
    assert unknown_tool(()) == "There are no tools."


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
def test_a_result_is_shown_up_to_its_limits(rows, style, text):
    assert shown(rows, style) == text


def test_an_error_is_shown_up_to_its_limit():
    error = QueryResult(QueryStatus.ERROR, message="no such column: " + "x" * 99)
    assert show_result(error, 10, 30, FULL) == "error: no such column: xxxxxxx... cut here"


def test_no_more_cells_become_text_than_are_shown():
    Counted.num_texts = 0
    text = shown([(Counted(),) * 1000] * 3, FULL)
    assert len(text) < 120 and Counted.num_texts <= 4
    Counted.num_texts = 0
    turn = Turn("t:0:1", 1, "shop", "?", "SELECT 1", (("q", "SELECT 2"),))
    entry = MemoryEntry("q", "SELECT 2", ("select",), ((Counted(),) * 9,) * 60_000)
    seen = memory_observation(turn, "SELECT 1", "(1)", [entry], FULL, 50, BOTH)
    assert "Result: (" + "x" * 49 + "... cut here\n" in seen and Counted.num_texts <= 3
