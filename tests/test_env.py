"""Each way an episode ends, what is observed instead, and what the records say about it."""

import pytest

from helpers.episodes import (
    BOTH,
    EXEC,
    GOLD,
    HISTORY,
    MEMORY,
    answer,
    call,
    make_env,
    play,
    singers,
)
from mtsql.agent.env import EnvConfig, Outcome
from mtsql.agent.reply import ParseError, Reply, ToolCall, format_reply
from mtsql.sql.sandbox import QueryStatus

BROKEN = "<tool_call>{'a'}</tool_call>"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("db") / "shows.sqlite")


@pytest.mark.parametrize(
    ("replies", "config", "outcome"),
    [
        ([answer()], {}, Outcome.ANSWERED),
        ([call(GOLD), answer()], {}, Outcome.ANSWERED),
        ([call(GOLD, "nonsense"), answer()], {}, Outcome.ANSWERED),
        ([BROKEN, answer()], {"malformed_call": "observe"}, Outcome.ANSWERED),
        ([BROKEN], {}, Outcome.BAD_CALL),
        (["<answer_sql></answer_sql>"], {}, Outcome.BAD_ANSWER),
        (["<answer_sql>SELECT 1"], {}, Outcome.BAD_ANSWER),
        (["hello"], {}, Outcome.NO_ACTION),
        (["hello"], {"malformed_call": "observe"}, Outcome.NO_ACTION),
        (["<think>x"], {}, Outcome.UNCLOSED_THINK),
        ([call(GOLD)] * 4, {}, Outcome.MAX_REPLIES),
        ([BROKEN] * 4, {"malformed_call": "observe"}, Outcome.MAX_REPLIES),
        ([call(GOLD)], {"max_replies": 1}, Outcome.MAX_REPLIES),
    ],
)
def test_a_reply_ends_the_episode_with_its_outcome(database, replies, config, outcome):
    env = make_env(database, **config)
    observations = [env.step(r if isinstance(r, str) else format_reply(r)) for r in replies]
    assert observations[-1] is env.outcome is outcome
    assert all(isinstance(observed, str) for observed in observations[:-1])
    assert (env.final_sql == GOLD) == (outcome is Outcome.ANSWERED)
    with pytest.raises(RuntimeError, match="episode of turn dev:0:0 has ended"):
        env.step("more")


@pytest.mark.parametrize(
    ("reply", "observation"),
    [
        ("<tool_call>{", "The call has no </tool_call> after it."),
        (BROKEN, "The text inside <tool_call> </tool_call> is not JSON."),
        (
            '<tool_call>{"arguments": {"code": "SELECT 1"}}</tool_call>',
            "The call names no tool: it needs the keys name and arguments.",
        ),
        (
            '<tool_call>{"name": "exec_sql", "arguments": {"sql": "SELECT 1"}}</tool_call>',
            'The arguments must be {"code": QUERY}.',
        ),
        (
            '<tool_call>{"name": "exec_sql", "arguments": {"code": 1}}</tool_call>',
            'The arguments must be {"code": QUERY}.',
        ),
        (
            '<tool_call>{"name": "nonsense", "arguments": {}}</tool_call>',
            'The arguments must be {"code": QUERY}.',
        ),
    ],
)
@pytest.mark.parametrize("tools", [BOTH, EXEC, ()])
def test_a_malformed_call_may_be_observed_instead(database, reply, observation, tools):
    env = make_env(database, malformed_call="observe", tools=tools)
    assert env.step(reply) == observation and env.outcome is None
    assert env.step(format_reply(answer())) is Outcome.ANSWERED
    assert [isinstance(r.reply.action, ParseError) for r in env.records] == [True, False]
    assert make_env(database, tools=tools).step(reply) is Outcome.BAD_CALL


@pytest.mark.parametrize(
    ("sql", "status", "is_empty"),
    [
        (GOLD, QueryStatus.OK, False),
        ("SELECT name FROM singer WHERE country = 'usa'", QueryStatus.OK, True),
        # One row that holds only NULL is empty, too.
        ("SELECT max(name) FROM singer WHERE country = 'x'", QueryStatus.OK, True),
        ("SELECT nope FROM singer", QueryStatus.ERROR, False),
        ("SELECT name FROM singer WHERE max(name) = 'x'", QueryStatus.ERROR, False),
        ("DROP TABLE singer", QueryStatus.DENIED, False),
    ],
)
@pytest.mark.parametrize("tool", BOTH)
def test_a_record_says_which_query_was_proposed_and_how_it_ended(
    database, sql, status, is_empty, tool
):
    env = make_env(database)
    observed = env.step(format_reply(call(sql, tool)))
    [record] = env.records
    assert (record.sql, record.status, record.is_empty) == (sql, status, is_empty)
    assert record.is_ok == (status is QueryStatus.OK) and record.observation == observed


def test_a_record_without_a_query_has_no_status(database):
    env = make_env(database)
    play(env, [call(GOLD, "nonsense"), answer()])
    for record in env.records:
        assert (record.sql, record.status, record.is_empty) == (None, None, False)
    assert [record.observation is None for record in env.records] == [False, True]


@pytest.mark.parametrize(
    ("tools", "unknown", "observation"),
    [
        (BOTH, "nonsense", "There is no such tool. Tools: exec_sql, memory_retrieve."),
        (EXEC, "memory_retrieve", "There is no such tool. Tools: exec_sql."),
        (MEMORY, "exec_sql", "There is no such tool. Tools: memory_retrieve."),
        ((), "exec_sql", "There are no tools."),
    ],
)
def test_a_tool_that_is_not_in_use_does_not_exist(database, tools, unknown, observation):
    env = make_env(database, tools=tools)
    assert env.step(format_reply(call("SELECT 1", unknown))) == observation
    assert env.records[0].status is None and env.outcome is None


def test_arguments_that_a_tool_does_not_declare_are_left_out(database):
    env = make_env(database)
    env.step(
        '<tool_call>{"name": "exec_sql", "arguments": {"code": "SELECT 1", "n": 2}}</tool_call>'
    )
    assert env.records[0].reply == Reply(ToolCall("exec_sql", {"code": "SELECT 1"}))


@pytest.mark.parametrize("history", [(), HISTORY])
def test_only_later_turns_are_told_to_ask_the_memory(database, history):
    env = make_env(database, history=history, style="full")
    assert ("memory_retrieve" in env.step(format_reply(call(GOLD)))) == bool(history)


def test_the_last_proposed_query_may_be_the_answer(database):
    replies = [call("SELECT 1"), call(GOLD, "memory_retrieve"), call("SELECT 2", "nonsense")]
    for fallback, final_sql in ((False, None), (True, GOLD)):
        env = make_env(database, max_replies=3, answer_fallback=fallback)
        play(env, replies)
        assert env.outcome is Outcome.MAX_REPLIES and env.final_sql == final_sql


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_replies": 0}, "env.max_replies"),
        ({"preview_chars": -1}, "env.preview_chars must not be negative"),
        ({"tools": EXEC, "memory_results": True}, "env.memory_results has no effect"),
        ({"tools": ("exec_sql", "look")}, "env.tools: there is no tool 'look', only exec_sql, mem"),
        ({"tools": EXEC * 2}, "env.tools: exec_sql stands there 2 times"),
    ],
)
def test_a_wrong_setting_is_named(config, words):
    with pytest.raises(ValueError, match=words):
        EnvConfig(**config)


def test_a_style_that_does_not_exist_is_named(database):
    with pytest.raises(ValueError, match="style is 'BRIEF': expected one of full, brief"):
        make_env(database, style="BRIEF")
