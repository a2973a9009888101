"""The verdict tables of the paper, value by value, each switch of the process rewards, and what changes no reward."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from mtsql.agent.env import EnvConfig, ReplyRecord, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply, parse_reply
from mtsql.rl.evaluate import score_turn
from mtsql.rl.rewards import (
    RewardConfig,
    RewardWeights,
    ScoredCall,
    calls_of,
    exec_verify_score,
    memory_verify_score,
    reward_components,
    total_reward,
)
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig, QueryStatus
from mtsql.sql.schema import Database, schema_from_sqlite

PASS, NO_PASS = Verdict.PASS, Verdict.NO_PASS
CALL = Reply(tool_call=ToolCall("exec_sql", "SELECT 1"))
GOLD = "SELECT name FROM singer WHERE age > 30 AND country = 'USA'"


@pytest.mark.parametrize(
    ("status", "is_empty", "scores"),  # for pass, no_pass and no verdict
    [
        (QueryStatus.OK, False, (1.0, 0.0, 1.0)),
        (QueryStatus.OK, True, (0.0, 0.1, 0.0)),
        (QueryStatus.ERROR, False, (0.0, 1.0, 0.0)),
        (QueryStatus.TIMEOUT, False, (0.0, 1.0, 0.0)),
        (QueryStatus.TOO_LARGE, False, (0.0, 1.0, 0.0)),
        (QueryStatus.DENIED, False, (0.0, 1.0, 0.0)),
        (None, False, (0.0, 1.0, 0.0)),  # a tool that does not exist ran nothing
    ],
)
def test_execution_verdict_table(status, is_empty, scores):
    record = ReplyRecord(CALL, status, is_empty)
    for verdict, score in zip((PASS, NO_PASS, None), scores, strict=True):
        for other in (None, PASS, NO_PASS):
            call = ScoredCall("exec_sql", "SELECT 1", record, verdict, other)
            assert exec_verify_score(call, RewardConfig()) == score


@pytest.mark.parametrize("f1", [0.0, 0.25, 1.0])
def test_memory_verdict_table(f1):
    for verdict, score in ((PASS, f1), (NO_PASS, 1 - f1), (None, f1)):
        call = ScoredCall("memory_retrieve", "SELECT 1", ReplyRecord(CALL), NO_PASS, verdict)
        assert memory_verify_score(f1, call, RewardConfig()) == score


def test_a_missing_verdict_earns_nothing_by_switch():
    config, ok = RewardConfig(missing_verdict_passes=False), ReplyRecord(CALL, QueryStatus.OK)
    silent = ScoredCall("exec_sql", "SELECT 1", ok)
    assert exec_verify_score(silent, config) == memory_verify_score(1.0, silent, config) == 0
    said = ScoredCall("exec_sql", "SELECT 1", ok, PASS, NO_PASS)
    assert exec_verify_score(said, config) == 1 and memory_verify_score(0.25, said, config) == 0.75


def test_an_empty_result_pays_what_its_switch_says():
    call = ScoredCall(
        "exec_sql", "SELECT 1", ReplyRecord(CALL, QueryStatus.OK, is_empty=True), NO_PASS
    )
    assert exec_verify_score(call, RewardConfig(null_no_pass=0.5)) == 0.5


def test_a_verdict_is_read_from_its_own_tag_before_the_next_call():
    other = Reply(tool_call=ToolCall("exec_sql", "SELECT 2"))
    steps = [
        ReplyRecord(CALL),
        ReplyRecord(replace(other, memory_verdict=NO_PASS)),
        ReplyRecord(Reply(exec_verdict=PASS)),
    ]
    first, second = calls_of(steps, OFFERED)
    assert (first.exec_verdict, first.memory_verdict) == (None, NO_PASS)
    assert (second.exec_verdict, second.memory_verdict) == (PASS, None)
    assert calls_of(steps[:1], OFFERED) == [ScoredCall("exec_sql", "SELECT 1", steps[0])]


OFFERED = ("exec_sql", "memory_retrieve")


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("db") / "shows.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (name TEXT, country TEXT, age INTEGER);"
            "INSERT INTO singer VALUES ('Ann', 'USA', 41), ('Bob', 'Peru', 25);"
        )
    schema = schema_from_sqlite(path)

    def play(replies, config=PAPER, gold=GOLD, history=(), **limits):
        env = played(replies, gold, history, limits)
        return reward_components(env, config)

    def played(replies, gold, history, limits):
        query = QueryConfig(**{k: limits.pop(k) for k in list(limits) if hasattr(QueryConfig, k)})
        turn = Turn("dev:0:0", 0, "shows", "?", gold, history)
        env = SqlEnv(
            turn, Database(schema, path), EnvConfig(query=query, **limits), PromptStyle.BRIEF
        )
        for reply in replies:
            env.step(reply if isinstance(reply, str) else format_reply(reply))
        return env

    def abilities(replies, history):
        env = played(replies, GOLD, history, {"max_replies": 20})
        return score_turn(Trajectory(env.turn, 0, [], env)).abilities

    play.abilities = abilities
    return play


PAPER = RewardConfig(process_after="any", proposals="all")


def call(sql, name="exec_sql", **verdicts):
    return Reply(tool_call=ToolCall(name, sql), **verdicts)


def test_clause_f1_of_the_paper_and_of_the_released_code_by_switch(play):
    half = GOLD.replace(
        " AND country = 'USA'", ""
    )  # select and from agree; of where 1 of 1 + 3 elements twice
    assert play([call(half), Reply(answer=GOLD)])["propose"] == pytest.approx(
        (1 + 1 + 2 * 1 / (1 + 3)) / 3
    )
    strict = replace(PAPER, strict_clauses=True)
    assert play([call(half), Reply(answer=GOLD)], strict)["propose"] == pytest.approx(
        (1 + 1 + 0) / 3
    )
    swapped = GOLD.replace("age > 30 AND country = 'USA'", "country = 'USA' AND age > 30")
    assert play([call(swapped), Reply(answer=GOLD)])["propose"] == 1
    assert play([call(swapped), Reply(answer=GOLD)], strict)["propose"] == pytest.approx(2 / 3)


def test_propose_is_the_mean_over_all_calls_of_both_tools_and_not_the_answer(play):
    replies = [call(GOLD), call("not SQL"), call(GOLD, "memory_retrieve"), Reply(answer="SELECT 1")]
    assert play(replies)["propose"] == pytest.approx(2 / 3)
    assert play([Reply(answer=GOLD)]) == {
        "ex": 1,
        "em": 1,
        "propose": 0,
        "exec_verify": 0,
        "memory_verify": 0,
    }


def test_the_guard_is_on_unless_it_is_switched_off(play):
    constant = [Reply(answer="SELECT 'Ann' FROM singer LIMIT 1")]
    assert play(constant, RewardConfig())["ex"] == 0
    assert play(constant, RewardConfig(guard=False))["ex"] == 1


def test_an_episode_without_an_answer_earns_no_outcome(play):
    parts = play([call(GOLD)])
    assert (parts["ex"], parts["em"]) == (0, 0) and parts["propose"] == parts["exec_verify"] == 1


def test_the_scalar_is_the_weighted_sum():
    parts = {"ex": 1.0, "em": 0.0, "propose": 0.5, "exec_verify": 1.0, "memory_verify": 0.5}
    assert total_reward(parts, RewardWeights()) == pytest.approx(1 + 0.8 * 0.5 + 0.1 + 0.1 * 0.5)
    assert total_reward(parts, RewardWeights(1, 1, 0, 0, 0)) == 1  # outcome only
    with pytest.raises(ValueError, match="every weight is 0"):
        RewardWeights(0, 0, 0, 0, 0)


def test_rewards_use_the_limits_of_the_episodes_tools(play):
    """`env.query` is the only place that limits queries: a gold of two rows cannot be met where one
    is allowed."""
    answer = [Reply(answer="SELECT singer.name FROM singer")]
    assert play(answer, gold="SELECT name FROM singer")["ex"] == 1
    assert play(answer, gold="SELECT name FROM singer", max_rows=1)["ex"] == 0


LOOK = "SELECT DISTINCT country FROM singer"


@pytest.mark.parametrize("answer", ["SELECT name FROM singer", "SELECT nope", GOLD, None])
@pytest.mark.parametrize("process_after", ["any", "answer", "right"])
def test_process_rewards_wait_for_the_end_that_the_switch_names(play, answer, process_after):
    config = RewardConfig(process_after=process_after)
    replies = [call("junk"), call(GOLD, "memory_retrieve", exec_verdict=NO_PASS)]
    replies += [] if answer is None else [Reply(answer=answer, memory_verdict=PASS)]
    parts = play(replies, config)
    least = {"any": 0, "answer": 1, "right": 2}[process_after]
    got = {None: 0, "SELECT nope": 0, "SELECT name FROM singer": 1, GOLD: 2}[answer]
    assert [parts[k] for k in ("propose", "exec_verify", "memory_verify")] == [
        float(got >= least)
    ] * 3


def test_an_honest_look_and_an_honest_correction_cost_nothing_by_default(play):
    guess = play([call(GOLD), Reply(answer=GOLD, exec_verdict=PASS)], RewardConfig())
    look = [call(LOOK), call(GOLD, exec_verdict=PASS), Reply(answer=GOLD, exec_verdict=PASS)]
    mend = [
        call("SELECT nope"),
        call(GOLD, exec_verdict=NO_PASS),
        Reply(answer=GOLD, exec_verdict=PASS),
    ]
    assert play(look, RewardConfig()) == play(mend, RewardConfig()) == guess
    assert (
        play(look)["propose"] < 1 and play(mend)["propose"] == 0.5
    )  # the paper's mean over all calls


def test_an_answer_that_does_not_run_earns_nothing(play):
    for answer in (GOLD.replace("name", "nmae"), f"{GOLD}; and some words", f"{GOLD}; SELECT 1"):
        assert play([Reply(answer=answer)], RewardConfig(guard=False))["em"] == 0, answer
        assert play([Reply(answer=answer)], RewardConfig())["ex"] == 0, answer
    for answer in (f"{GOLD};", f"{GOLD} -- years"):
        assert play([Reply(answer=answer)])["ex"] == 1, answer


def test_split_operators_run_for_the_tool_and_for_the_reward(play):
    split = GOLD.replace("> 30", "> = 31").replace("= 'USA'", "! = 'Peru'")
    replies = [call(split), Reply(answer=split, exec_verdict=PASS)]
    assert play(replies, RewardConfig(), gold=split) == {
        "ex": 1,
        "em": 1,
        "propose": 1,
        "exec_verify": 1,
        "memory_verify": 0,
    }


HONEST = [
    call(LOOK),
    call(GOLD, exec_verdict=PASS),
    call(GOLD, "memory_retrieve", exec_verdict=PASS),
    Reply(answer=GOLD, memory_verdict=PASS),
]
WRONG = [call("junk"), call(LOOK, exec_verdict=PASS), Reply(answer=LOOK, exec_verdict=NO_PASS)]
UNOFFERED = call(GOLD, "no_such_tool", exec_verdict=PASS, memory_verdict=PASS)


def texts(replies):
    return [format_reply(reply) for reply in replies]


def with_unoffered_calls(replies):
    """Before each reply, with and without verdicts of its own."""
    out = []
    for number, reply in enumerate(replies):
        own = replace(
            UNOFFERED, exec_verdict=reply.exec_verdict, memory_verdict=reply.memory_verdict
        )
        out += [
            own if number % 2 else replace(UNOFFERED, exec_verdict=None, memory_verdict=None),
            reply,
        ]
    return texts(out)


def with_repeated_calls(replies):
    """Each call twice more right away, and the first one once more before the answer."""
    silent = [replace(reply, exec_verdict=None, memory_verdict=None) for reply in replies]
    out = [
        text
        for reply, again in zip(replies, silent, strict=True)
        for text in ([reply, again, again] if reply.tool_call else [silent[0], reply])
    ]
    return texts(out)


def with_verdict_spam(replies):
    """Tags behind those that count, and where there is nothing to judge."""
    spam = "<exec_verify>no_pass</exec_verify><memory_verify>no_pass</memory_verify><exec_verify>pass</exec_verify>"
    return [text + spam if i else spam + text for i, text in enumerate(texts(replies))]


def with_junk_before_the_answer(replies):
    *before, answer = texts(replies)
    junk = "The answer is <b>this</b>: {1} <sql>SELECT 1</sql> <answer_sql>SELECT 2</answer_sql>"
    return [*before, answer.replace("<answer_sql>", f"{junk} <answer_sql>")]


def with_a_second_thought(replies):
    thought = f"<think>again {format_reply(UNOFFERED)} <answer_sql>SELECT 1</answer_sql></think>"
    return [f"<think>first</think>{thought}{text}{thought}" for text in texts(replies)]


@pytest.mark.parametrize("replies", [HONEST, WRONG], ids=["honest", "wrong"])
@pytest.mark.parametrize("config", [RewardConfig(), PAPER], ids=["default", "paper"])
@pytest.mark.parametrize(
    "change",
    [
        with_unoffered_calls,
        with_repeated_calls,
        with_verdict_spam,
        with_junk_before_the_answer,
        with_a_second_thought,
    ],
)
def test_five_changes_that_change_no_reward_and_no_ability(play, replies, config, change):
    history = (("who is there ?", "SELECT name FROM singer"),)
    played = [
        play(some, config, history=history, max_replies=20) for some in (replies, change(replies))
    ]
    assert played[0] == played[1]
    abilities = [play.abilities(some, history) for some in (replies, change(replies))]
    assert abilities[0] == abilities[1]


@pytest.mark.parametrize("offered", ["use_exec", "use_memory"])
def test_a_tool_that_is_not_offered_earns_nothing_in_any_term(play, offered):
    taken = {"use_exec": "use_memory", "use_memory": "use_exec"}[offered]
    tool = {"use_exec": "memory_retrieve", "use_memory": "exec_sql"}[offered]
    answer = Reply(answer=GOLD, exec_verdict=PASS, memory_verdict=PASS)
    history = (("who is there ?", "SELECT name FROM singer"),)
    for config in (RewardConfig(), PAPER):
        parts = play([call(GOLD, tool), answer], config, history=history, **{taken: False})
        assert parts == {"ex": 1, "em": 1, "propose": 0, "exec_verify": 0, "memory_verify": 0}


def test_calls_that_differ_in_a_literal_only_are_two(play):
    one, other = "SELECT 'a b'", "SELECT  'a  b'"
    env_steps = [
        ReplyRecord(call(one)),
        ReplyRecord(call(other)),
        ReplyRecord(call(one.lower().replace(" '", "  '"))),
    ]
    assert [found.sql for found in calls_of(env_steps, OFFERED)] == [one, other]


def test_right_means_right_in_result_or_in_structure(play):
    replies = [call("junk"), Reply(answer=GOLD.replace("30", "77"), exec_verdict=NO_PASS)]
    parts = play(replies, RewardConfig())
    assert (parts["ex"], parts["em"], parts["exec_verify"]) == (0, 1, 1)


def test_verdicts_are_looked_for_past_a_call_that_cannot_be_read():
    malformed = parse_reply("<tool_call>{oops</tool_call>")
    judged = parse_reply("<exec_verify>no_pass</exec_verify><tool_call>{oops</tool_call>")
    answer = Reply(exec_verdict=PASS, answer=GOLD)
    for replies, verdict in (((malformed, answer), PASS), ((malformed, judged, answer), NO_PASS)):
        [found] = calls_of([ReplyRecord(reply) for reply in (CALL, *replies)], OFFERED)
        assert found.exec_verdict is verdict
