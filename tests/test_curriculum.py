"""Stages, picks and resampling of the curriculum."""

import json

import pytest

from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum

COUNTS = {
    "solved": (20, 20),
    "easy": (14, 20),
    "middle": (7, 20),
    "hard": (6, 20),
    "never": (0, 20),
}


def test_buckets_have_the_bounds_of_the_paper():
    curriculum = build_curriculum(COUNTS, CurriculumConfig(), seed=0)
    assert curriculum.stages == [["easy"], ["middle"], ["hard", "never"]]
    assert curriculum.num_dropped == 1


def test_stages_take_their_share_in_order_and_empty_ones_are_skipped():
    curriculum = build_curriculum(COUNTS, CurriculumConfig(), seed=0)
    stages = [curriculum.stage_at(u, 150) for u in range(150)]
    assert [stages.count(stage) for stage in range(3)] == [60, 60, 30]
    assert stages == sorted(stages)
    only = build_curriculum({"hard": (0, 20)}, CurriculumConfig(), seed=0)
    assert {only.stage_at(u, 10) for u in range(10)} == {2}


def test_picks_cover_a_stage_before_repeating_and_depend_on_seed_and_update_only():
    turns = {f"t{i}": (10, 20) for i in range(10)}
    curriculum = build_curriculum(turns, CurriculumConfig(), seed=3)
    picks = [curriculum.pick(u, 5, 4) for u in range(5)]
    assert sorted(sum(picks, [])) == sorted(list(turns) * 2)
    again = Curriculum.from_state(json.loads(json.dumps(curriculum.state())))
    assert again.pick(3, 5, 4) == picks[3]
    again.record("t0", 2, 4)
    assert again.counts["t0"] == [12, 24]


def test_no_turn_is_picked_twice_in_an_update():
    """The same (seed, update, turn, sample) draws the same tokens, so a second time would give the
    same trajectories."""
    for num_turns in range(1, 12):
        curriculum = build_curriculum(
            {f"t{i}": (10, 20) for i in range(7)}, CurriculumConfig(), seed=num_turns
        )
        picks = [curriculum.pick(u, 30, num_turns) for u in range(30)]
        assert all(len(set(p)) == len(p) == min(num_turns, 7) for p in picks)
        walk = sum(picks, [])
        for start in range(0, len(walk) - 6, 7):  # every turn as often as any other
            assert len(set(walk[start : start + 7])) == 7


def test_resampling_gives_new_turns_of_the_stage_until_it_runs_out():
    curriculum = build_curriculum(
        {**{f"t{i}": (10, 20) for i in range(9)}, "easy": (19, 20)},
        CurriculumConfig(shares=(0, 1, 0)),
        seed=3,
    )
    picked = curriculum.pick(2, 5, 4)
    first = curriculum.resample(2, 5, 2, picked)
    second = curriculum.resample(2, 5, 9, picked + first)
    assert len(first) == 2 and sorted(picked + first + second) == [f"t{i}" for i in range(9)]
    assert curriculum.resample(2, 5, 1, picked + first + second) == []
    assert curriculum.resample(2, 5, 0, picked) == []
    again = Curriculum.from_state(json.loads(json.dumps(curriculum.state())))
    again.record("t0", 2, 4)
    assert again.resample(2, 5, 2, picked) == first  # whatever was learned in between
    orders = {tuple(curriculum.resample(u, 50, 9, [])) for u in range(50)}
    assert len(orders) > 40  # another order each update


def test_an_empty_curriculum_is_named():
    with pytest.raises(ValueError, match="drop_solved"):
        build_curriculum({"a": (4, 4)}, CurriculumConfig(), seed=0)


def test_bounds_that_do_not_fall_are_named():
    with pytest.raises(ValueError, match="curriculum.bounds"):
        CurriculumConfig(bounds=(0.5, 0.7), shares=(1, 1))


def test_a_stage_with_a_share_of_0_is_used_only_if_no_other_holds_a_turn():
    config = CurriculumConfig(bounds=(0.6, 0.3, 0.0), shares=(0.3, 0.7, 0.0))
    mixed = build_curriculum({"a": (2, 3), "b": (1, 3), "c": (0, 3)}, config, seed=0)
    assert [mixed.stage_at(u, 10) for u in range(10)] == [0] * 3 + [1] * 7
    unsolved = build_curriculum({"c": (0, 3), "d": (0, 3)}, config, seed=0)
    assert [unsolved.stage_at(u, 4) for u in range(4)] == [2] * 4
    assert set(unsolved.pick(0, 4, 2)) == {"c", "d"}
