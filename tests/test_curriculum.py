import json

import pytest

from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum

COUNTS = {"solved": (20, 20), "easy": (14, 20), "middle": (7, 20), "hard": (6, 20), "never": (0, 20)}


def test_buckets_are_the_papers():
    curriculum = build_curriculum(COUNTS, CurriculumConfig(), seed=0)
    assert curriculum.stages == [["easy"], ["middle"], ["hard", "never"]]
    assert curriculum.num_dropped == 1


def test_stages_take_their_share_in_order_and_empty_ones_are_skipped():
    curriculum = build_curriculum(COUNTS, CurriculumConfig(), seed=0)
    stages = [curriculum.stage_at(u, 150) for u in range(150)]
    assert (stages.count(0), stages.count(1), stages.count(2)) == (60, 60, 30) and stages == sorted(stages)
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


def test_nothing_left_and_bad_settings_are_named():
    with pytest.raises(ValueError, match="drop_solved"):
        build_curriculum({"a": (4, 4)}, CurriculumConfig(), seed=0)
    with pytest.raises(ValueError, match="curriculum.bounds"):
        CurriculumConfig(bounds=(0.5, 0.7), shares=(1, 1))
