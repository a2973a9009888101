"""Another `num_updates` for a run that was begun: its schedules stay as they were."""

import pytest
import train_rl
from train_rl import Config

from helpers.checkpoints import write
from mtsql.learner.optimizer import OptimConfig, learning_rate
from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtsql.run.checkpoint import resumed
from mtsql.run.config import as_yaml, save_config
from mtsql.run.length import LENGTH, keep_length, with_kept_schedule
from mtsql.run.recipes import read_yaml


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 40 updates with a constant rate."""
    constant = Config(num_updates=40, optim=OptimConfig(schedule="constant"))
    save_config(constant, tmp_path / "config.yaml")
    return tmp_path


def resume(run, **flags):
    """What `--resume RUN` and flags of the length make of it."""
    saved = read_yaml(run / "config.yaml")
    length = {key: saved[key] for key in LENGTH}
    optim = OptimConfig(schedule=saved["optim"]["schedule"])
    return with_kept_schedule(Config(resume=str(run), optim=optim, **length | flags))


def test_a_run_with_another_length_keeps_its_schedules(run):
    assert resume(run).schedule_updates is None
    assert resume(run, num_updates=60).schedule_updates == 40
    assert resume(run, num_updates=20).num_scheduled == 40
    assert resume(run, num_updates=60, schedule_updates=60).num_scheduled == 60


def test_the_new_length_stays_with_the_run(run):
    longer = resume(run, num_updates=60)
    keep_length(run, longer)
    straight = Config(optim=longer.optim, num_updates=60, schedule_updates=40)
    assert (run / "config.yaml").read_text() == as_yaml(straight)  # the same run, repeated
    again = resume(run)
    assert (again.num_updates, again.schedule_updates) == (60, 40)
    shorter = resume(run, num_updates=50)
    assert (shorter.num_updates, shorter.schedule_updates) == (50, 40)
    before = (run / "config.yaml").read_bytes()
    keep_length(run, again)
    assert (run / "config.yaml").read_bytes() == before


def test_a_rate_that_falls_is_not_prolonged_without_a_word(tmp_path):
    save_config(Config(num_updates=40), tmp_path / "config.yaml")
    words = (
        f"num_updates is 60, but optim.schedule=cosine of {tmp_path} ends after 40 updates: keep "
        r"the rate that it ends at \(--schedule_updates 40\), or lay out .*updates 60\)"
    )
    with pytest.raises(ValueError, match=words):
        resume(tmp_path, num_updates=60)
    for end in (40, 60):
        asked = resume(tmp_path, num_updates=60, schedule_updates=end)
        assert asked.num_scheduled == end
    assert resume(tmp_path, num_updates=30).num_scheduled == 40


def test_a_run_is_not_shortened_to_less_than_it_has_done(run):
    write(run, 30)
    config, begun = resumed(resume(run, num_updates=30))
    assert begun.state["update"] == config.num_updates == 30
    words = "num_updates is 20, but .* has done 30 updates: .* --from CHECKPOINT --run NEW"
    with pytest.raises(ValueError, match=words):
        resumed(resume(run, num_updates=20))


def test_the_rate_stays_what_it_ends_at():
    for schedule in ("linear", "cosine", "wsd"):
        optim = OptimConfig(lr=1.0, schedule=schedule)
        rates = [learning_rate(optim, update, 10) for update in (9, 10, 11, 500)]
        assert rates[0] > rates[1] == rates[2] == rates[3] == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0), 500, 10) == 1


def curriculum():
    turns = {f"{name}{n}": (count, 20) for name, count in (("a", 14), ("b", 7)) for n in range(9)}
    return build_curriculum(turns, CurriculumConfig(shares=(0.5, 0.5, 0)), seed=1)


def test_further_updates_stay_in_the_last_stage_and_walk_on():
    stages = [curriculum().stage_at(update, 10) for update in range(14)]
    assert stages == [0] * 5 + [1] * 9
    picks = [curriculum().pick(update, 10, 3) for update in range(5, 14)]
    assert sorted(sum(picks, [])) == sorted([f"b{n}" for n in range(9)] * 3)


def test_stages_that_are_laid_out_anew_leave_what_is_done():
    old, new = curriculum(), curriculum()
    new.lay_out_anew(6, 10)
    assert [new.stage_at(u, 20) for u in range(20)] == [0] * 5 + [1] * 15  # never back to 0
    assert [new.pick(u, 20, 3) for u in range(10)] == [old.pick(u, 10, 3) for u in range(10)]
    early = curriculum()
    early.lay_out_anew(2, 10)
    assert [early.stage_at(u, 20) for u in range(20)] == [0] * 10 + [1] * 10
    assert Curriculum.from_state(new.state()) == new and new.past == [0] * 5 + [1]


def test_schedules_over_no_update_are_refused():
    with pytest.raises(ValueError, match="schedule_updates is 0"):
        train_rl.check_config(Config(schedule_updates=0))
