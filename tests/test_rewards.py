"""The specification of the rewards: the verdict tables of the paper, value by value, each switch,
and changes of an episode that change no reward."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import episodes
from helpers.episodes import BOTH, EXEC, GOLD, HISTORY, MEMORY, answer, call, make_env, singers
from mtsql.agent.env import ReplyRecord
from mtsql.agent.reply import Answer, ParseError, Reply, ToolCall, Verdict, format_reply
from mtsql.rl import rewards
from mtsql.rl.calls import ScoredCall, calls_of
from mtsql.rl.evaluate import score_turn
from mtsql.rl.process import exec_verify_score, memory_verify_score
from mtsql.rl.rewards import (
    RewardConfig,
    RewardWeights,
    group_components,
    reward_components,
    total_reward,
)
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.sandbox import QueryConfig, QueryStatus

PASS, NO_PASS = Verdict.PASS, Verdict.NO_PASS
CALL = call("SELECT 1")
PAPER = RewardConfig(process_after="any", proposals="all")
LOOK = "SELECT DISTINCT country FROM singer"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("db") / "shows.sqlite")


@pytest.fixture(scope="module")
def play(database):
    """Plays replies and returns the components of their reward."""

    def play(replies, config=PAPER, **env):
        trajectory = episodes.play(make_env(database, **env), replies)
        return reward_components(trajectory, config)

    return play


def record_of(reply, status=None, is_empty=False):
    """The record of a reply: a call proposes its `code`."""
    sql = reply.action.arguments["code"] if isinstance(reply.action, ToolCall) else None
    return ReplyRecord(reply, sql=sql, status=status, is_empty=is_empty)


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
    record = record_of(CALL, status, is_empty)
    for verdict, score in zip((PASS, NO_PASS, None), scores, strict=True):
        for other in (None, PASS, NO_PASS):
            judged = ScoredCall("exec_sql", record, verdict, other)
            assert exec_verify_score(judged, RewardConfig()) == score


@pytest.mark.parametrize("f1", [0.0, 0.25, 1.0])
def test_memory_verdict_table(f1):
    for verdict, score in ((PASS, f1), (NO_PASS, 1 - f1), (None, f1)):
        judged = ScoredCall("memory_retrieve", record_of(CALL), NO_PASS, verdict)
        assert memory_verify_score(f1, judged, RewardConfig()) == score


def test_a_missing_verdict_earns_nothing_by_switch():
    config, ok = RewardConfig(missing_verdict_passes=False), record_of(CALL, QueryStatus.OK)
    silent = ScoredCall("exec_sql", ok)
    assert exec_verify_score(silent, config) == memory_verify_score(1.0, silent, config) == 0
    said = ScoredCall("exec_sql", ok, PASS, NO_PASS)
    assert exec_verify_score(said, config) == 1 and memory_verify_score(0.25, said, config) == 0.75


def test_an_empty_result_pays_what_its_switch_says():
    empty = ScoredCall("exec_sql", record_of(CALL, QueryStatus.OK, is_empty=True), NO_PASS)
    assert exec_verify_score(empty, RewardConfig(null_no_pass=0.5)) == 0.5


def test_a_verdict_is_read_from_its_own_tag_before_the_next_call():
    records = [
        record_of(CALL),
        record_of(call("SELECT 2", fits=NO_PASS)),
        record_of(answer(ran=PASS)),
    ]
    first, second = calls_of(records, BOTH)
    assert (first.exec_verdict, first.memory_verdict) == (None, NO_PASS)
    assert (second.exec_verdict, second.memory_verdict) == (PASS, None)
    assert calls_of(records[:1], BOTH) == [ScoredCall("exec_sql", records[0])]


@pytest.mark.parametrize("verdict", [PASS, NO_PASS, None])
def test_verdicts_of_an_episode_are_scored_by_the_tables(play, verdict):
    empty = "SELECT name FROM singer WHERE country = 'usa'"
    half = "SELECT name FROM singer"  # select and from agree, where is missing
    for sql, scores in (
        (GOLD, {PASS: 1, NO_PASS: 0, None: 1}),
        (empty, {PASS: 0, NO_PASS: 0.1, None: 0}),
        ("SELECT nope", {PASS: 0, NO_PASS: 1, None: 0}),
    ):
        parts = play([call(sql), answer(ran=verdict, fits=NO_PASS)])
        assert parts["exec_verify"] == scores[verdict]
    parts = play([call(half, "memory_retrieve"), answer(ran=NO_PASS, fits=verdict)])
    scores = {PASS: 2 / 3, NO_PASS: 1 / 3, None: 2 / 3}
    assert parts["memory_verify"] == pytest.approx(scores[verdict])


def test_a_perfect_episode_earns_everything(play):
    replies = [call(GOLD), call(GOLD, "memory_retrieve", ran=PASS), answer(fits=PASS)]
    parts = play(replies, RewardConfig(), history=HISTORY)
    assert parts == {"ex": 1, "em": 1, "propose": 1, "exec_verify": 1, "memory_verify": 1}
    assert total_reward(parts, RewardWeights()) == pytest.approx(3.0)


NOTHING = {"ex": 0, "em": 0, "propose": 0, "exec_verify": 0, "memory_verify": 0}


def test_clause_f1_is_the_papers_or_by_switch_the_released_codes(play):
    strict = replace(PAPER, strict_clauses=True)
    half = GOLD.replace(" AND country = 'USA'", "")
    # select and from agree; of where, 1 of 1 proposed and 3 wanted elements.
    paper_f1 = (1 + 1 + 2 * 1 / (1 + 3)) / 3
    assert play([call(half), answer()])["propose"] == pytest.approx(paper_f1)
    assert play([call(half), answer()], strict)["propose"] == pytest.approx((1 + 1 + 0) / 3)
    swapped = GOLD.replace("age > 30 AND country = 'USA'", "country = 'USA' AND age > 30")
    assert play([call(swapped), answer()])["propose"] == 1
    assert play([call(swapped), answer()], strict)["propose"] == pytest.approx(2 / 3)


def test_propose_is_the_mean_over_the_calls_of_both_tools_without_the_answer(play):
    replies = [call(GOLD), call("not SQL"), call(GOLD, "memory_retrieve"), answer("SELECT 1")]
    assert play(replies)["propose"] == pytest.approx(2 / 3)
    assert play([answer()]) == {**NOTHING, "ex": 1, "em": 1}


def test_the_guard_is_on_unless_it_is_switched_off(play):
    constant = [answer("SELECT 'Ann' FROM singer LIMIT 1")]
    assert play(constant, RewardConfig())["ex"] == 0
    assert play(constant, RewardConfig(guard=False))["ex"] == 1


def test_an_empty_gold_result_earns_nothing_by_execution_alone(play):
    gold = "SELECT name FROM singer WHERE country = 'usa'"
    other = [answer("SELECT country FROM singer WHERE name = 'nobody'")]
    assert play(other, RewardConfig(), gold=gold)["ex"] == 0
    assert play(other, RewardConfig(guard=False), gold=gold)["ex"] == 1
    assert play([answer(gold)], RewardConfig(), gold=gold)["ex"] == 1
    count = "SELECT count(*) FROM singer WHERE country = 'USA'"
    assert play([answer("SELECT 1")], RewardConfig(), gold=count)["ex"] == 0


def test_an_episode_without_an_answer_earns_no_outcome(play):
    assert play([call(GOLD)]) == {**NOTHING, "propose": 1, "exec_verify": 1}


def test_the_scalar_is_the_weighted_sum():
    parts = {"ex": 1.0, "em": 0.0, "propose": 0.5, "exec_verify": 1.0, "memory_verify": 0.5}
    assert total_reward(parts, RewardWeights()) == pytest.approx(1 + 0.8 * 0.5 + 0.1 + 0.1 * 0.5)
    assert total_reward(parts, RewardWeights(1, 1, 0, 0, 0)) == 1  # outcome only
    assert total_reward({**parts, "overlong": -0.5}, RewardWeights(1, 1, 0, 0, 0)) == 0.5
    with pytest.raises(ValueError, match="every weight is 0"):
        RewardWeights(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(10, 0), (80, 0), (90, -0.5), (100, -1), (500, -1)]
)
def test_overlong_costs_up_to_one_in_the_last_part_of_the_budget(database, num_tokens, penalty):
    played = episodes.play(make_env(database), [answer()])
    trajectory = replace(played, ids=[7] * num_tokens, max_tokens=100)
    parts = reward_components(trajectory, RewardConfig(overlong_buffer=20))
    assert parts["overlong"] == penalty and total_reward(parts, RewardWeights()) == 2 + penalty
    assert "overlong" not in reward_components(trajectory, RewardConfig())
    without_budget = replace(trajectory, max_tokens=0)
    assert rewards.overlong(without_budget, RewardConfig(overlong_buffer=20)) == 0


def test_a_group_component_gives_each_trajectory_of_the_group_its_value(monkeypatch):
    def shortest(group, config):
        fewest = min(len(trajectory.ids) for trajectory in group)
        return [float(len(trajectory.ids) == fewest) for trajectory in group]

    group = [SimpleNamespace(ids=[7] * num_tokens) for num_tokens in (3, 2, 2)]
    assert group_components(group, RewardConfig()) == [{}, {}, {}]
    monkeypatch.setitem(rewards.GROUP_COMPONENTS, "shortest", shortest)
    values = [parts["shortest"] for parts in group_components(group, RewardConfig())]
    assert values == [0, 1, 1]


@pytest.mark.parametrize("value", [np.float32(1), np.bool_(True), torch.tensor(1.0), True, 1])
def test_a_component_becomes_a_plain_number(monkeypatch, value):
    monkeypatch.setattr(rewards, "COMPONENTS", {"new": lambda trajectory, config: value})
    monkeypatch.setitem(rewards.GROUP_COMPONENTS, "other", lambda group, config: [value])
    for parts in (
        reward_components(None, RewardConfig()),
        *group_components([None], RewardConfig()),
    ):
        assert [type(each) for each in parts.values()] == [float] and set(parts.values()) == {1.0}


@pytest.mark.parametrize("score", [lambda: float("nan"), lambda: int("two")])
def test_a_bug_of_a_reward_is_no_mistake_of_the_user(monkeypatch, score):
    monkeypatch.setattr(rewards, "COMPONENTS", {"new": lambda trajectory, config: score()})
    monkeypatch.setitem(rewards.GROUP_COMPONENTS, "other", lambda group, config: [score()])
    with pytest.raises(RuntimeError, match="the reward new raised a ValueError"):
        reward_components(None, RewardConfig())
    with pytest.raises(RuntimeError, match="the reward other raised a ValueError"):
        group_components([None], RewardConfig())


def test_rewards_use_the_limits_of_the_episodes_tools(play):
    """A gold of two rows cannot be met where one row is allowed: `env.query` limits all queries."""
    gold, replies = "SELECT name FROM singer", [answer("SELECT singer.name FROM singer")]
    assert play(replies, gold=gold)["ex"] == 1
    assert play(replies, gold=gold, query=QueryConfig(max_rows=1))["ex"] == 0


@pytest.mark.parametrize(
    ("final_sql", "quality"),
    [(None, 0), ("SELECT nope", 0), ("SELECT name FROM singer", 1), (GOLD, 2)],
)
@pytest.mark.parametrize(("process_after", "needed"), [("any", 0), ("answer", 1), ("right", 2)])
def test_process_rewards_need_the_ending_that_the_switch_names(
    play, final_sql, quality, process_after, needed
):
    replies = [call("junk"), call(GOLD, "memory_retrieve", ran=NO_PASS)]
    replies += [] if final_sql is None else [answer(final_sql, fits=PASS)]
    parts = play(replies, RewardConfig(process_after=process_after))
    process = [parts[name] for name in ("propose", "exec_verify", "memory_verify")]
    assert process == [float(quality >= needed)] * 3


def test_an_answer_is_right_in_its_result_or_in_its_structure(play):
    replies = [call("junk"), answer(GOLD.replace("30", "77"), ran=NO_PASS)]
    parts = play(replies, RewardConfig())
    assert (parts["ex"], parts["em"], parts["exec_verify"]) == (0, 1, 1)


def test_looking_at_the_data_and_correcting_a_query_cost_nothing_by_default(play):
    guess = [call(GOLD), answer(ran=PASS)]
    look = [call(LOOK), call(GOLD, ran=PASS), answer(ran=PASS)]
    correct = [call("SELECT nope"), call(GOLD, ran=NO_PASS), answer(ran=PASS)]
    default = RewardConfig()
    assert play(look, default) == play(correct, default) == play(guess, default)
    # The paper's mean over all calls takes something off.
    assert play(look)["propose"] < 1 and play(correct)["propose"] == 0.5


def test_an_answer_that_does_not_run_earns_nothing(play):
    for sql in (GOLD.replace("name", "nmae"), f"{GOLD}; and some words", f"{GOLD}; SELECT 1"):
        assert play([answer(sql)], RewardConfig(guard=False))["em"] == 0, sql
        assert play([answer(sql)], RewardConfig())["ex"] == 0, sql
    for sql in (f"{GOLD};", f"{GOLD} -- years"):
        assert play([answer(sql)])["ex"] == 1, sql


def test_split_operators_run_for_the_tool_and_for_the_reward(play):
    split = GOLD.replace("> 30", "> = 31").replace("= 'USA'", "! = 'Peru'")
    parts = play([call(split), answer(split, ran=PASS)], RewardConfig(), gold=split)
    assert parts == {**NOTHING, "ex": 1, "em": 1, "propose": 1, "exec_verify": 1}


HONEST = [
    call(LOOK),
    call(GOLD, ran=PASS),
    call(GOLD, "memory_retrieve", ran=PASS),
    answer(fits=PASS),
]
WRONG = [call("junk"), call(LOOK, ran=PASS), answer(LOOK, ran=NO_PASS)]
UNKNOWN = call(GOLD, "no_such_tool", ran=PASS, fits=PASS)


def without_verdicts(reply):
    return replace(reply, exec_verdict=None, memory_verdict=None)


def texts(replies):
    return [format_reply(reply) for reply in replies]


def with_unknown_calls(replies):
    """A call of an unknown tool before each reply, in turn without verdicts and with the reply's
    own."""
    out = []
    for number, reply in enumerate(replies):
        judging = replace(reply, action=UNKNOWN.action)
        out += [judging if number % 2 else without_verdicts(UNKNOWN), reply]
    return texts(out)


def with_repeated_calls(replies):
    """Each call twice more right away, and the first one once more before the answer."""
    *calls, last = replies
    out = []
    for reply in calls:
        out += [reply, without_verdicts(reply), without_verdicts(reply)]
    return texts([*out, without_verdicts(calls[0]), last])


def with_verdict_spam(replies):
    """Tags behind those that count, and where there is nothing to judge."""
    no_pass = "<exec_verify>no_pass</exec_verify><memory_verify>no_pass</memory_verify>"
    spam = f"{no_pass}<exec_verify>pass</exec_verify>"
    first, *later = texts(replies)
    return [spam + first, *(text + spam for text in later)]


def with_junk_before_the_answer(replies):
    *before, last = texts(replies)
    junk = "The answer is <b>this</b>: {1} <sql>SELECT 1</sql> <answer_sql>SELECT 2</answer_sql>"
    return [*before, last.replace("<answer_sql>", f"{junk} <answer_sql>")]


def with_a_second_thought(replies):
    thought = f"<think>again {format_reply(UNKNOWN)} <answer_sql>SELECT 1</answer_sql></think>"
    return [f"<think>first</think>{thought}{text}{thought}" for text in texts(replies)]


@pytest.mark.parametrize("replies", [HONEST, WRONG], ids=["honest", "wrong"])
@pytest.mark.parametrize("config", [RewardConfig(), PAPER], ids=["default", "paper"])
@pytest.mark.parametrize(
    "change",
    [
        with_unknown_calls,
        with_repeated_calls,
        with_verdict_spam,
        with_junk_before_the_answer,
        with_a_second_thought,
    ],
)
def test_five_changes_that_change_no_reward_and_no_ability(database, replies, config, change):
    def judged(some):
        env = make_env(database, history=HISTORY, max_replies=20)
        trajectory = episodes.play(env, some)
        return reward_components(trajectory, config), score_turn(trajectory).abilities

    assert judged(change(replies)) == judged(replies)


@pytest.mark.parametrize(
    ("tools", "other"), [(EXEC, "memory_retrieve"), (MEMORY, "exec_sql"), ((), "exec_sql")]
)
@pytest.mark.parametrize("config", [RewardConfig(), PAPER], ids=["default", "paper"])
def test_a_tool_that_is_not_in_use_earns_nothing_in_any_component(play, tools, other, config):
    replies = [call(GOLD, other), answer(ran=PASS, fits=PASS)]
    parts = play(replies, config, history=HISTORY, tools=tools)
    assert parts == {**NOTHING, "ex": 1, "em": 1}


def test_calls_that_differ_in_a_literal_only_are_two():
    one, other = "SELECT 'a b'", "SELECT  'a  b'"
    again = one.lower().replace(" '", "  '")
    records = [record_of(call(sql)) for sql in (one, other, again)]
    assert [found.sql for found in calls_of(records, BOTH)] == [one, other]


def test_calls_without_a_query_are_compared_by_their_arguments():
    calls = [Reply(ToolCall("look", arguments)) for arguments in ({"n": 1}, {"n": 2}, {"n": 1})]
    records = [ReplyRecord(reply) for reply in calls]
    assert [found.record for found in calls_of(records, ("look",))] == records[:2]


def test_propose_scores_only_calls_that_propose_a_query(database):
    env = make_env(database)
    env.records += [record_of(call(GOLD)), ReplyRecord(Reply(ToolCall("exec_sql", {"n": 1})))]
    trajectory = Trajectory(env.turn, 0, [], env)
    for config in (PAPER, replace(PAPER, proposals="last")):
        assert reward_components(trajectory, config)["propose"] == 1


def test_verdicts_are_looked_for_past_a_malformed_call():
    malformed = Reply(ParseError.BAD_JSON)
    judged = Reply(ParseError.BAD_JSON, exec_verdict=NO_PASS)
    last = Reply(Answer(GOLD), exec_verdict=PASS)
    for replies, verdict in (((malformed, last), PASS), ((malformed, judged, last), NO_PASS)):
        [found] = calls_of([record_of(reply) for reply in (CALL, *replies)], BOTH)
        assert found.exec_verdict is verdict
