"""The verdict tables of the paper, value by value, and each switch of the process rewards."""

import sqlite3
from contextlib import closing

import pytest

from mtsql.agent.env import EnvLimits, SqlEnv, StepRecord
from mtsql.agent.parser import Reply, ToolCall, Verdict, format_reply
from mtsql.agent.prompts import PromptStyle
from mtsql.evaluate import OFFICIAL
from mtsql.rl.rewards import (
    RewardConfig,
    RewardWeights,
    exec_verify_score,
    memory_verify_score,
    reward_components,
    total_reward,
)
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig, QueryStatus
from mtsql.sql.schema import schema_from_sqlite

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
    call = StepRecord(CALL, status, is_empty)
    for verdict, score in zip((PASS, NO_PASS, None), scores, strict=True):
        after = StepRecord(Reply(exec_verdict=verdict, answer="x"))
        assert exec_verify_score(call, after, RewardConfig()) == score
        other_tag = StepRecord(Reply(exec_verdict=verdict, memory_verdict=NO_PASS, answer="x"))
        assert exec_verify_score(call, other_tag, RewardConfig()) == score
    assert exec_verify_score(call, None, RewardConfig()) == scores[2]  # cut off right after the call


@pytest.mark.parametrize("f1", [0.0, 0.25, 1.0])
def test_memory_verdict_table(f1):
    for verdict, score in ((PASS, f1), (NO_PASS, 1 - f1), (None, f1)):
        after = StepRecord(Reply(memory_verdict=verdict, exec_verdict=NO_PASS, answer="x"))
        assert memory_verify_score(f1, after, RewardConfig()) == score


def test_a_missing_verdict_earns_nothing_by_switch():
    config, silent = RewardConfig(missing_verdict_passes=False), StepRecord(Reply(answer="x"))
    for after in (silent, None):
        assert exec_verify_score(StepRecord(CALL, QueryStatus.OK), after, config) == 0
        assert memory_verify_score(1.0, after, config) == 0
    after = StepRecord(Reply(exec_verdict=PASS, memory_verdict=NO_PASS, answer="x"))
    assert exec_verify_score(StepRecord(CALL, QueryStatus.OK), after, config) == 1
    assert memory_verify_score(0.25, after, config) == 0.75


def test_an_empty_result_pays_what_its_switch_says():
    call, after = StepRecord(CALL, QueryStatus.OK, is_empty=True), StepRecord(Reply(exec_verdict=NO_PASS, answer="x"))
    assert exec_verify_score(call, after, RewardConfig(null_no_pass=0.5)) == 0.5


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("db") / "shows.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE singer (name TEXT, country TEXT, age INTEGER);"
                                 "INSERT INTO singer VALUES ('Ann', 'USA', 41), ('Bob', 'Peru', 25);")  # fmt: skip
    schema = schema_from_sqlite(path)

    def play(replies, config=RewardConfig(), gold=GOLD, **query):
        turn = Turn("dev:0:0", 0, "shows", "?", gold)
        env = SqlEnv(turn, schema, path, EnvLimits(query=QueryConfig(**query)), PromptStyle.BRIEF)
        for reply in replies:
            env.step(format_reply(reply))
        return reward_components(env, config)

    return play


def call(sql, name="exec_sql"):
    return Reply(tool_call=ToolCall(name, sql))


def test_clause_f1_of_the_paper_and_of_the_released_code_by_switch(play):
    half = GOLD.replace(" AND country = 'USA'", "")  # select and from agree; of where 1 of 1 + 3 elements twice
    assert play([call(half), Reply(answer=GOLD)])["propose"] == pytest.approx((1 + 1 + 2 * 1 / (1 + 3)) / 3)
    strict = RewardConfig(strict_clauses=True)
    assert play([call(half), Reply(answer=GOLD)], strict)["propose"] == pytest.approx((1 + 1 + 0) / 3)
    swapped = GOLD.replace("age > 30 AND country = 'USA'", "country = 'USA' AND age > 30")
    assert play([call(swapped), Reply(answer=GOLD)])["propose"] == 1
    assert play([call(swapped), Reply(answer=GOLD)], strict)["propose"] == pytest.approx(2 / 3)


def test_propose_is_the_mean_over_all_calls_of_both_tools_and_not_the_answer(play):
    replies = [call(GOLD), call("not SQL"), call(GOLD, "memory_retrieve"), Reply(answer="SELECT 1")]
    assert play(replies)["propose"] == pytest.approx(2 / 3)
    assert play([Reply(answer=GOLD)]) == {"ex": 1, "em": 1, "propose": 0, "exec_verify": 0, "memory_verify": 0}


def test_the_guard_is_on_in_training_and_off_in_evaluation(play):
    assert RewardConfig().guard and OFFICIAL == RewardConfig(guard=False)
    constant = [Reply(answer="SELECT 'Ann' FROM singer LIMIT 1")]
    assert play(constant)["ex"] == 0 and play(constant, OFFICIAL)["ex"] == 1


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
    """`env.query` is the only place that limits queries: a gold of two rows cannot be met where one is allowed."""
    answer = [Reply(answer="SELECT singer.name FROM singer")]
    assert play(answer, gold="SELECT name FROM singer")["ex"] == 1
    assert play(answer, gold="SELECT name FROM singer", max_rows=1)["ex"] == 0
