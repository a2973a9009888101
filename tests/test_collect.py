"""Siblings compared: advantages, what is left out of learning and why; groups of equal rewards replaced."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from mtsql.agent.env import Outcome
from mtsql.learner.losses import LossConfig, denominator, with_gradient
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.collect import Scored, compare, measure_kl, roll_out, update_metrics
from mtsql.rl.curriculum import CurriculumConfig, build_curriculum
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.sandbox import QueryStatus

ALONE = SimpleNamespace(process_index=0, num_processes=1)
CALL = SimpleNamespace(reply=SimpleNamespace(action="a call"), status=QueryStatus.OK)


def group(*rewards, outcomes=(), lengths=(), voids=(), turn_id="t"):
    """A group of trajectories with these rewards; all answered, two tokens long and with one call
    unless said otherwise."""
    scored = []
    for i, reward in enumerate(rewards):
        env = SimpleNamespace(
            outcome=outcomes[i] if outcomes else Outcome.ANSWERED,
            records=[] if i in voids else [CALL],
        )
        trajectory = Trajectory(SimpleNamespace(turn_id=turn_id), i, [1], env)
        if length := lengths[i] if lengths else 2:
            trajectory.add_sampled([7] * length, [-1.0] * length)
        scored.append(Scored(trajectory, {}, reward))
    return scored


def advantages(groups, **config):
    samples = compare(ALONE, groups, AdvantageConfig(**{"scale": "none", **config}))
    return [s.advantages[0] for s in samples]


def test_equal_groups_count_or_are_no_part_of_the_update():
    groups = [group(1, 1), group(0, 2)]
    assert advantages(groups) == [0, 0, -1, 1]
    assert advantages(groups, zero_variance="drop") == [-1, 1]


def test_only_what_can_have_a_gradient_gets_a_forward():
    """Equal groups count in the mean, but are computed only where a KL or entropy term learns from
    them too."""
    samples = compare(
        ALONE, [group(1, 1), group(0, 2), group(0, 1, 2)], AdvantageConfig(scale="none")
    )
    config = LossConfig(kl_coef=0.0)
    assert [s.advantages[0] for s in with_gradient(samples, config)] == [-1, 1, -1, 1]
    assert denominator(samples, config) == 14
    for changes in ({"kl_coef": 0.1}, {"kl_coef": 0.0, "entropy_coef": 0.1}):
        assert with_gradient(samples, LossConfig(**changes)) == samples


def test_a_trajectory_without_a_sampled_token_counts_for_the_baseline_only():
    assert advantages([group(0, 2, 4, lengths=(0, 2, 3))]) == [0, 2]


def test_cut_trajectories_are_kept_masked_or_dropped():
    groups = [group(0, 2, 4, outcomes=(Outcome.REPLY_TOKENS, Outcome.ANSWERED, Outcome.NO_ACTION))]
    assert advantages(groups) == [-2, 0, 2]
    assert advantages(groups, on_truncated="mask") == [0, 2]
    assert advantages(groups, on_truncated="drop") == [-1, 1]


def test_void_trajectories_are_kept_masked_or_dropped():
    groups = [group(0, 2, 4, outcomes=[Outcome.NO_ACTION] * 3, voids=(0,))]
    assert advantages(groups, on_truncated="drop") == [-2, 0, 2]
    assert advantages(groups, on_malformed="mask") == [0, 2]
    assert advantages(groups, on_malformed="drop") == [-1, 1]
    assert (
        advantages(
            [group(0, 2, 4, outcomes=[Outcome.REPLY_TOKENS] * 3, voids=(0, 1))], on_malformed="drop"
        )
        == []
    )


def test_what_is_cut_void_masked_dropped_and_charged_is_counted():
    groups = [
        group(0, 2, 4, 6, outcomes=[Outcome.REPLY_TOKENS] + 3 * [Outcome.ANSWERED], voids=(0, 1))
    ]
    for s in groups[0]:
        s.kl = 0.5
    config = AdvantageConfig(on_truncated="mask", on_malformed="drop", kl_coef=0.1)
    samples = compare(ALONE, groups, config)
    metrics = update_metrics(ALONE, groups, samples, [{}], config)
    for name, expected in {
        "truncated_frac": 0.25,
        "malformed_frac": 0.5,
        "masked_frac": 0,
        "dropped_frac": 0.5,
        "kept_frac": 0.5,
        "reward_kl": 0.5,
        "num_tokens": 4,
        "num_steps": 0,
        "loss": None,
    }.items():
        assert metrics[name] == expected, name


def test_metrics_are_means_over_the_tokens_of_all_steps():
    step = {
        "loss": 1.0,
        "grad_norm": 3.0,
        "num_computed": 9.0,
        "num_distinct": 6.0,
        "num_tokens": 4.0,
        "ratio": 4.0,
        "logprob_gap": 1.0,
    }
    other = {**step, "loss": 2.0, "num_tokens": 6.0, "ratio": 11.0, "logprob_gap": 9.0}
    groups = [group(0, 2)]
    config = AdvantageConfig()
    metrics = update_metrics(
        ALONE, groups, compare(ALONE, groups, config), [step, {}, other], config
    )
    assert metrics["loss"] == 1.5 and metrics["grad_norm"] == 3.0 and metrics["num_steps"] == 2
    assert (
        metrics["loss/ratio"] == 1.5
        and metrics["loss/logprob_gap"] == 1.0
        and metrics["engine_gap"] == 0.25
    )
    assert metrics["num_tokens"] == 4 and metrics["learn_computed_per_distinct"] == 1.5


def test_the_kl_is_charged_before_rewards_are_compared():
    groups = [group(1, 1)]

    def with_reference(
        samples,
    ):  # the second trajectory is further from the reference by 0.5 a token
        assert [s.old_logprobs for s in samples] == [[-1.0, -1.0]] * 2
        return [replace(s, ref_logprobs=[-1.0 - i / 2] * 2) for i, s in enumerate(samples)]

    config = AdvantageConfig(scale="none", kl_coef=0.2)
    measure_kl(groups, config, with_reference)
    assert [s.kl for s in groups[0]] == [0, 1] and [s.reward for s in groups[0]] == [1, 1]
    assert [s.advantages[0] for s in compare(ALONE, groups, config)] == pytest.approx([0.1, -0.1])


def refilled(rounds, equal=(), num_turns=3, num_pool=8, truncated=(), accelerator=ALONE):
    """Roll out an update whose turns in `equal` have equal rewards (those in `truncated` unequal ones, by
    a cut trajectory); returns the turns tried, those that came back and what was noted."""
    curriculum = build_curriculum(
        {f"t{i}": (0, 20) for i in range(num_pool)}, CurriculumConfig(), seed=1
    )
    tried = []

    def play(turn_ids):
        tried.append(turn_ids)
        outcomes = {
            i: [Outcome.REPLY_TOKENS, Outcome.ANSWERED] if i in truncated else () for i in turn_ids
        }
        groups = [
            group(1, 1 if i in equal else 2, turn_id=i, outcomes=outcomes[i]) for i in turn_ids
        ]
        return groups, SimpleNamespace(tokens_computed=3, tokens_distinct=2)

    config = AdvantageConfig(zero_variance="drop", on_truncated="drop")
    groups, noted = roll_out(
        accelerator,
        curriculum.pick(5, 9, num_turns),
        play,
        config,
        refill=partial(curriculum.refill, 5, 9),
        resample_rounds=rounds,
    )
    assert [g[0].trajectory.turn.turn_id for g in groups] == sum(tried, [])
    return tried, noted


def test_equal_groups_are_replaced_until_enough_are_there():
    [first], noted = refilled(rounds=5)
    assert noted == {
        "rollout_computed_per_distinct": 1.5,
        "zero_variance_frac": 0,
        "resample/rounds": 0,
        "resample/groups_sampled": 3,
        "resample/groups_kept": 3,
        "sql_deadlines": 0,
        "sql_workers_died": 0,
    }
    [same, second, third], noted = refilled(
        rounds=5, equal=[*first[:2], *refilled(5, first[:2])[0][1][:1]]
    )
    assert same == first and len(second) == 2 and len(third) == 1
    assert len({*first, *second, *third}) == 6  # never the same turn twice
    assert (
        noted["resample/groups_sampled"] == 6
        and noted["resample/groups_kept"] == 3
        and noted["resample/rounds"] == 2
    )
    assert noted["zero_variance_frac"] == 0.5
    # what is dropped does not make a group unequal
    assert len(refilled(rounds=5, truncated=first[:1])[0]) == 2


def test_the_work_of_a_refill_is_bounded():
    every = [f"t{i}" for i in range(8)]
    tried, noted = refilled(rounds=1, equal=every)
    assert [len(t) for t in tried] == [3, 3] and noted["resample/groups_kept"] == 0
    assert [len(t) for t in refilled(rounds=9, equal=every)[0]] == [
        3,
        3,
        2,
    ]  # the stage has run out
    assert [len(t) for t in refilled(rounds=9, equal=every, num_turns=20)[0]] == [
        8
    ]  # a stage smaller than asked
    tried, noted = refilled(rounds=0, equal=every)
    assert len(tried) == 1 and not any(name.startswith("resample/") for name in noted)


def test_a_batch_baseline_reaches_over_groups():
    assert advantages([group(0, 0), group(2, 2)], baseline="batch") == [-1, -1, 1, 1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 9),
        ({"aggregate": "trajectory"}, 3),
        ({"aggregate": "constant", "constant_length": 8}, 24),
    ],
)
def test_the_denominator_is_that_of_the_loss(config, expected):
    samples = compare(ALONE, [group(0, 2, 5, lengths=(2, 3, 4))], AdvantageConfig())
    assert denominator(samples, LossConfig(**config)) == expected
