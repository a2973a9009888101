"""The process reward after each reply, from when it counts, and the rewards that are off by
default."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import train_rl

from helpers import episodes
from helpers.collecting import collector_of
from helpers.episodes import GOLD, HISTORY, answer, call, make_env, singers
from mtsql.agent.env import Outcome
from mtsql.agent.reply import Verdict
from mtsql.engine.counts import EngineCounts
from mtsql.rl import collect
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.checks import check_config
from mtsql.rl.rewards import (
    PROCESS,
    RewardConfig,
    RewardWeights,
    group_components,
    process_so_far,
    reward_components,
    total_reward,
)
from mtsql.rl.samples import compute_advantages, has_signal
from mtsql.rl.scored import Scored
from mtsql.run.ranks import Ranks

PASS, NO_PASS = Verdict.PASS, Verdict.NO_PASS
LOOK = "SELECT DISTINCT country FROM singer"
DENSE = RewardWeights(result_columns=0.5, result_rows=0.25)
DEFAULT = RewardConfig(DENSE)
PAPER = RewardConfig(DENSE, process_after="any", proposals="all")
HONEST = [
    call(LOOK),
    call("SELECT nope", ran=PASS),
    call(GOLD, ran=NO_PASS),
    call(GOLD, "memory_retrieve", ran=PASS),
    answer(fits=PASS),
]
WRONG = [call("junk"), call(LOOK, "memory_retrieve", ran=PASS), answer(LOOK, fits=NO_PASS)]
SILENT = [call(GOLD), call(GOLD), call(LOOK), call("SELECT 1", "no_such_tool"), answer()]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("db") / "shows.sqlite")


@pytest.fixture(scope="module")
def play(database):
    def play(replies):
        env = make_env(database, history=HISTORY, max_replies=9)
        trajectory = replace(episodes.play(env, replies), prompt_ids=[1])
        for reply in trajectory.env.records:  # a token for each reply, and one for what follows
            trajectory.add_sampled([7], [-1.0])
            if reply.observation is not None:
                trajectory.add_context([8])
        return trajectory

    return play


def after_each(name, trajectory, config):
    return PROCESS[name](trajectory, config)


def test_a_call_is_earned_by_its_reply_and_a_verdict_by_the_reply_that_gives_it(play):
    trajectory = play(HONEST)
    last = {name: after_each(name, trajectory, DEFAULT) for name in PROCESS}
    some_f1 = last["propose"][0]
    assert 0 < some_f1 < 1 and last["propose"] == [some_f1, 0, 1, 1, 1]
    assert last["exec_verify"] == [0, 1, 1, 1, 1]  # LOOK passes, nope does not, GOLD passes
    assert last["memory_verify"] == [0, 0, 0, 0, 1]
    assert last["result_columns"] == last["result_rows"] == [0, 0, 1, 1, 1]
    means = {name: after_each(name, trajectory, PAPER) for name in PROCESS}
    assert means["result_rows"] == pytest.approx([0, 0, 1 / 3, 1 / 2, 1 / 2])
    expected = [some_f1, some_f1 / 2, (some_f1 + 1) / 3, (some_f1 + 2) / 4, (some_f1 + 2) / 4]
    assert means["propose"] == pytest.approx(expected)


@pytest.mark.parametrize("config", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("replies", [HONEST, WRONG, SILENT], ids=["honest", "wrong", "silent"])
def test_a_value_depends_on_no_later_reply(play, replies, config):
    """Whatever follows the first replies, their values are the same. Without this, the estimate of
    the gradient would be biased (test_credit.py)."""
    for name in PROCESS:
        whole = after_each(name, play(replies), config)
        for kept in range(1, len(replies)):
            for others in ([answer(LOOK, ran=NO_PASS, fits=NO_PASS)], [*WRONG[:-1], *SILENT[-2:]]):
                other = after_each(name, play([*replies[:kept], *others]), config)
                assert other[:kept] == whole[:kept], (name, kept)
            cut = play(replies[:kept])
            cut.env.end(Outcome.REPLY_TOKENS)  # the next reply was cut off
            values = after_each(name, cut, config)
            assert values[:kept] == whole[:kept] and len(values) == kept + 1, (name, kept)


@pytest.mark.parametrize("config", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("replies", [HONEST, WRONG, SILENT, HONEST[:-1], []])
def test_the_value_after_the_last_reply_is_the_component(play, replies, config):
    trajectory = play(replies)
    parts = reward_components(trajectory, config)
    so_far, is_paid = process_so_far(trajectory, config, config.weights)
    assert len(so_far) == len(replies)
    assert is_paid is (None if config is PAPER else bool(parts["ex"] or parts["em"]))
    process = {name: parts[name] for name in PROCESS}
    counted = so_far[-1] if so_far and is_paid is not False else 0.0
    assert total_reward(process, config.weights) == pytest.approx(counted)


def test_the_process_reward_counts_from_an_update_on():
    config = RewardConfig(process_from=3)
    assert config.weights_at(3) == config.weights_at(2**31) == config.weights
    assert config.weights_at(2) == RewardWeights(propose=0, exec_verify=0, memory_verify=0)
    assert RewardConfig().weights_at(0) == RewardWeights()
    outcome = RewardWeights(propose=0, exec_verify=0, memory_verify=0)
    with pytest.raises(ValueError, match="reward.process_from has no effect"):
        RewardConfig(outcome, process_from=3)
    with pytest.raises(ValueError, match="process_from: until then every weight is 0"):
        RewardConfig(RewardWeights(ex=0, em=0), process_from=3)
    with pytest.raises(ValueError, match=r"reward.process_from must not be negative"):
        RewardConfig(process_from=-1)
    check_config(train_rl.Config(num_updates=4, reward=config))
    with pytest.raises(ValueError, match="process_from is 3, but the run has num_updates=3"):
        check_config(train_rl.Config(num_updates=3, reward=config))
    check_config(train_rl.Config(num_updates=3, reward=config, resume="it is shortened"))


def test_a_rollout_is_scored_with_the_weights_of_its_update(play, monkeypatch):
    monkeypatch.setattr(
        collect,
        "rollout",
        lambda *args, judge, **options: [judge(play(HONEST)), judge(play(WRONG))],
    )
    by_reply = AdvantageConfig(credit="reply", baseline="leave_one_out", scale="none")

    def played(update, advantage):
        reward = RewardConfig(process_from=3, process_after="any")
        collector = collector_of([], reward=reward, advantage=advantage)
        engine = SimpleNamespace(counts=EngineCounts())
        [group], _ = collect.Collector.play(
            collector, engine, [], "train", num_samples=2, update=update
        )
        return group

    before, after = played(2, AdvantageConfig()), played(3, AdvantageConfig())
    assert [one.reward for one in before] == [2, 0]
    assert [one.components for one in before] == [one.components for one in after]
    assert after[0].reward == pytest.approx(3.0) and after[0].so_far == ()
    before, after = played(2, by_reply), played(3, by_reply)
    assert [one.so_far for one in before] == [(), ()]  # no component has a weight yet
    assert after[0].so_far[-1] == pytest.approx(1.0) and after[0].is_paid is None

    assert has_signal(after, by_reply)
    samples = compute_advantages([after], Ranks(), by_reply)
    for one, sample in zip(after, samples, strict=True):
        assert sample.advantages[::2] == one.advantages and not any(sample.advantages[1::2])
    best, worst = after
    assert best.advantages[0] == pytest.approx(best.reward - worst.reward)
    left = worst.reward - worst.so_far[0]
    assert best.advantages[1] == pytest.approx(best.reward - best.so_far[0] - left)
    # The third reply of the worst one is its last. The fourth of the best one has no equal.
    end = worst.reward - worst.so_far[-1]
    assert best.advantages[3] == pytest.approx(best.reward - best.so_far[2] - end)
    equal = played(2, by_reply)[:1] * 2
    assert not has_signal(equal, by_reply)


def test_a_truncated_reply_earns_nothing(play):
    """Its text never reaches the environment. That it gives no verdict is known when it ends."""
    by_reply = AdvantageConfig(credit="reply", baseline="leave_one_out", scale="none")
    cut = play([call(LOOK)])
    cut.add_sampled([7], [-1.0])
    cut.env.end(Outcome.REPLY_TOKENS)
    assert after_each("exec_verify", cut, DEFAULT) == [0, 1]  # no verdict counts as pass
    strict = replace(PAPER, weights=RewardWeights(), missing_verdict_passes=False)
    so_far, _ = process_so_far(cut, strict, strict.weights)
    assert so_far[0] == so_far[1] > 0
    group = [Scored(one, {}, 1.0, so_far=so_far) for one in (cut, play(HONEST))]
    [first, _] = compute_advantages([group], Ranks(), by_reply)
    assert len(group[0].advantages) == 2 and len(first.advantages) == 3
    assert first.advantages[2] == group[0].advantages[1] == 0.0


def test_dense_rewards_are_computed_only_if_they_have_a_weight(play):
    half = call("SELECT name FROM singer")
    trajectory = play([half, answer(ran=PASS)])
    assert "result_rows" not in reward_components(trajectory, RewardConfig())
    parts = reward_components(trajectory, PAPER)
    assert parts["result_columns"] == 0 and parts["result_rows"] == pytest.approx(2 / 3)
    junk = play([call("junk"), answer("junk", ran=NO_PASS)])
    assert reward_components(junk, PAPER)["result_columns"] == 0
    assert reward_components(play([half, answer(LOOK)]), DEFAULT)["result_rows"] == 0


def test_extra_replies_are_those_beyond_the_shortest_right_trajectory(play):
    short = [call(GOLD), answer(ran=PASS)]
    endless = [call(f"SELECT {number}") for number in range(9)]
    group = [play(replies) for replies in (short, HONEST, WRONG, endless, [answer(LOOK)])]
    config = RewardConfig(RewardWeights(extra_replies=0.3))
    assert group_components(group, RewardConfig())[0] == {}
    values = [parts["extra_replies"] for parts in group_components(group, config)]
    assert values == pytest.approx([0, -3 / 7, -1 / 7, -1, 0])
    wrong = group_components([group[2], group[3]], config)
    assert wrong == [{"extra_replies": 0}] * 2  # nobody knows what is needed
    with pytest.raises(ValueError, match="every weight is 0"):
        RewardWeights(0, 0, 0, 0, 0, extra_replies=1.0)
