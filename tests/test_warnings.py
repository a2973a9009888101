"""What the numbers of the updates warn of, once each."""

import pytest

from mtsql.rl.warnings import CHECKS, FLAT_UPDATES, WINDOW, new_warnings

GOOD = {
    "num_steps": 1,
    "zero_variance_frac": 0.1,
    "loss/entropy": 0.5,
    "truncated_frac": 0.02,
    "malformed_frac": 0.01,
    "preemptions": 1,
    "num_trajectories": 128,
    "sql_wait_frac": 0.05,
    "engine_gap": 0.001,
}


def given(*changes: dict) -> list[tuple[int, str]]:
    """(update, name) of the warnings of a run with these numbers, one update after another. Only
    rows are handed over, as a resumed run has them."""
    rows: list[dict] = []
    found = []
    for update, change in enumerate(changes, 1):
        rows.append({**GOOD, "update": update, **change})
        names = new_warnings(rows)
        rows[-1]["warning"] = ", ".join(names) or None
        found += [(update, name) for name in names]
    return found


def test_a_good_run_gives_no_warning():
    assert given(*[{}] * 30) == []


def test_an_update_without_a_step_is_named_once():
    none = {"num_steps": 0, "loss/entropy": None, "engine_gap": None}
    assert given({}, none, {}, none) == [(2, "no_step")]
    text = new_warnings([{**GOOD, **none, "update": 7, "warning": None}])["no_step"]
    assert text.startswith("update 7 took no optimizer step")


def test_more_than_half_of_the_groups_without_variance():
    most = {"zero_variance_frac": 0.6}
    assert given({}, *[most] * 9) == [(6, "zero_variance")]
    assert given(*[most] * (WINDOW - 1)) == []  # too few updates to say so
    assert given(*[{"zero_variance_frac": 0.5}] * 9) == []


def test_falling_entropy():
    assert given(*[{}] * 5, *[{"loss/entropy": 0.1}] * 5) == [(10, "entropy")]
    assert given(*[{}] * 5, *[{"loss/entropy": 0.2}] * 9) == []
    falls_within_the_first_updates = [{"loss/entropy": 0.5 / 4**step} for step in range(9)]
    assert given(*falls_within_the_first_updates) == []
    none = {"num_steps": 0, "loss/entropy": None}
    assert given(*[none] * 12) == [(1, "no_step")]


def test_rising_truncation():
    assert given(*[{}] * 5, *[{"truncated_frac": 0.3}] * 5) == [(10, "truncated")]
    often = {"truncated_frac": 0.2}
    assert given(*[often] * 5, *[{"truncated_frac": 0.35}] * 9) == []  # not twice as many
    assert given(*[{}] * 5, *[{"truncated_frac": 0.2}] * 9) == []  # still few


def test_malformed_replies():
    most = {"malformed_frac": 0.6}
    assert given(*[most] * 9) == [(WINDOW, "malformed")]
    assert given(*[{"malformed_frac": 0.2}] * 9) == []


def test_many_preemptions():
    many = {"preemptions": 30}
    assert given(*[many] * 9) == [(WINDOW, "preempted")]
    assert given(many, *[{}] * 9) == []


def test_a_ratio_outside_its_band():
    assert given(*[{"loss/ratio": 1.0, "loss/ratio_far": 0.05}] * 9) == [(WINDOW, "ratio")]
    assert given(*[{"loss/ratio": 1.3, "loss/ratio_far": 0.0}] * 9) == [(WINDOW, "ratio")]
    assert given(*[{"loss/ratio": 1.02, "loss/ratio_far": 0.01}] * 9) == []


def test_a_reward_that_does_not_rise_within_a_stage():
    flat = [{"curriculum_stage": 1, "reward": 1.0 + 0.1 * (n % 2)} for n in range(40)]
    assert given(*flat) == [(FLAT_UPDATES, "flat_reward")]
    rising = [row | {"reward": row["reward"] + 0.01 * n} for n, row in enumerate(flat)]
    assert given(*rising) == []
    falls_between_stages = [{"curriculum_stage": n // 20, "reward": 1.0} for n in range(80)]
    assert given(*falls_between_stages) == []
    assert given(*[{"curriculum_stage": 0, "reward": 0.0}] * 30) == [(30, "flat_reward")]


def test_queries_that_met_the_clock():
    assert given({}, {"sql_deadlines": 2}, {"sql_deadlines": 1}) == [(2, "sql_deadlines")]
    assert given(*[{"sql_deadlines": 0}] * 9) == []


def test_a_rollout_that_waits_for_sql():
    assert given(*[{"sql_wait_frac": 0.7}] * 9) == [(WINDOW, "sql_wait")]
    assert given(*[{"sql_wait_frac": 0.4}] * 9) == []
    assert given(*[{"sql_wait_frac": 0.7}] * (WINDOW - 1)) == []  # too few updates to say so


def test_a_gap_between_engine_and_learner():
    assert given({}, {"engine_gap": 0.06}, {"engine_gap": 0.06}) == [(2, "engine_gap")]


def test_two_warnings_of_one_update_are_both_kept():
    both = {"num_steps": 0, "engine_gap": 0.06}
    assert given({}, both, both) == [(2, "no_step"), (2, "engine_gap")]


@pytest.mark.parametrize("name", CHECKS)
def test_each_text_says_what_to_do(name):
    bad = {
        "num_steps": 0,
        "zero_variance_frac": 0.9,
        "loss/entropy": 0.01,
        "truncated_frac": 0.9,
        "malformed_frac": 0.9,
        "preemptions": 99,
        "sql_wait_frac": 0.9,
        "engine_gap": 0.5,
        "loss/ratio": 1.5,
        "loss/ratio_far": 0.5,
        "curriculum_stage": 0,
        "reward": 0.0,
        "sql_deadlines": 3,
        "warning": None,
    }
    rows = [{**GOOD, "update": u, "warning": None} for u in range(1, 6)]
    rows += [{**GOOD, **bad, "update": u} for u in range(6, 11 + 30 * (name == "flat_reward"))]
    text = new_warnings(rows)[name]
    assert "; " in text and any(verb in text for verb in ("raise", "lower", "set"))
