"""Rollouts of an update: groups of equal rewards are replaced by those of other turns."""

from dataclasses import asdict
from types import SimpleNamespace

from helpers.collecting import collector_of, resampled, scored
from mtsql.engine.counts import EngineCounts
from mtsql.rl import collect, rewards, sweep
from mtsql.rl.curriculum import CurriculumConfig
from mtsql.rl.rollout_metrics import rollout_metrics
from mtsql.rl.samples import has_signal
from mtsql.sql.dialogues import Corpus

TURNS = [f"t{i}" for i in range(8)]
FIRST = ["t7", "t6", "t3"]
THEN = ["t1", "t4", "t2", "t5", "t0"]
"""The turns that the curriculum's seed picks for the update, and the order of the others."""


def test_an_update_without_zero_variance_groups_takes_one_rollout():
    tried, metrics = resampled(TURNS, rounds=5)
    assert tried == [FIRST]
    counts = {"computed": 9, "distinct": 6, "attended": 12, "sampled": 3}  # of three turns
    empty = dict.fromkeys(asdict(EngineCounts()), 0.0)
    assert metrics == {
        **rollout_metrics(empty | counts, collector_of([]).flops, num_ranks=1),
        "zero_variance_frac": 0,
        "resample/rounds": 0,
        "resample/groups_sampled": 3,
        "resample/groups_kept": 3,
        "sql_deadlines": 0,
        "sql_workers_died": 0,
    }


def test_zero_variance_groups_are_replaced_until_enough_groups_have_a_signal():
    tried, metrics = resampled(TURNS, rounds=5, equal=("t7", "t6", "t1"))
    assert tried == [FIRST, THEN[:2], THEN[2:3]]  # never the same turn twice
    assert metrics["resample/rounds"] == 2
    assert metrics["resample/groups_sampled"] == 6 and metrics["resample/groups_kept"] == 3
    assert metrics["zero_variance_frac"] == 0.5


def test_a_dropped_trajectory_gives_its_group_no_variance():
    tried, _ = resampled(TURNS, rounds=5, truncated=("t7",))
    assert tried == [FIRST, THEN[:1]]


def test_the_work_of_resampling_is_bounded_by_the_rounds_and_by_the_stage():
    tried, metrics = resampled(TURNS, rounds=1, equal=TURNS)
    assert tried == [FIRST, THEN[:3]] and metrics["resample/groups_kept"] == 0
    tried, _ = resampled(TURNS, rounds=9, equal=TURNS)
    assert tried == [FIRST, THEN[:3], THEN[3:]]
    tried, _ = resampled(TURNS, rounds=9, equal=TURNS, num_picked=20)
    assert [len(turns) for turns in tried] == [8]


def test_without_resampling_the_metrics_do_not_name_it():
    tried, metrics = resampled(TURNS, rounds=0, equal=TURNS)
    assert tried == [FIRST] and metrics["zero_variance_frac"] == 1
    assert not any(name.startswith("resample/") for name in metrics)


def test_a_component_of_the_group_is_logged_and_gives_the_group_a_signal(monkeypatch):
    group = [scored(1, num_tokens=3), scored(1, num_tokens=2)]
    collector = collector_of([])
    assert not has_signal(group, collector.advantage)
    monkeypatch.setitem(
        rewards.GROUP_COMPONENTS,
        "overlong",  # a name that has a weight
        lambda group, config: [-float(len(one.ids)) for one in group],
    )
    monkeypatch.setattr(collect, "rollout", lambda *args, **options: group)
    engine = SimpleNamespace(counts=EngineCounts())
    [played], _ = collect.Collector.play(collector, engine, [], "train", num_samples=2, update=0)
    assert [one.components for one in played] == [{"overlong": -3.0}, {"overlong": -2.0}]
    assert [one.reward for one in played] == [-2.0, -1.0]
    assert has_signal(played, collector.advantage)


def test_the_probe_plays_chunks_of_turns_of_a_database_and_keeps_them(monkeypatch, tmp_path):
    turns = [SimpleNamespace(turn_id=f"t{i}", db_id=f"d{i % 2}") for i in range(7)]
    collector = collector_of([], corpora={"train": SimpleNamespace(turns=turns)})
    monkeypatch.setattr(sweep, "TURNS_PER_CHUNK", 3)
    monkeypatch.setattr(collect, "num_right", lambda group: 1)
    counts, swept = collector.probe(CurriculumConfig(probe_samples=2), tmp_path / "probe")
    assert swept.work.computed == swept.played.computed == 7
    assert counts == {turn.turn_id: (1, 2) for turn in turns}
    assert sorted(collector.tried) == [["t0", "t2", "t4"], ["t5"], ["t6", "t1", "t3"]]
    assert len(collector.engines) == 1
    # A second process that has the same policy plays nothing and finds the same.
    again = collector_of([], corpora={"train": SimpleNamespace(turns=turns)})
    same, swept = again.probe(CurriculumConfig(probe_samples=2), tmp_path / "probe")
    assert same == counts and again.tried == []
    assert swept.work.computed == 7 and swept.played.computed == 0
    # Other settings find other things.
    other = collector_of([], corpora={"train": SimpleNamespace(turns=turns)}, seed=1)
    other.probe(CurriculumConfig(probe_samples=2), tmp_path / "probe")
    assert len(other.tried) == 3


def test_an_evaluation_plays_all_splits_with_one_engine(monkeypatch):
    corpora = {split: Corpus([], {}) for split in ("train", "dev", "dev_seen")}
    collector = collector_of([], corpora=corpora)
    monkeypatch.setattr(collect, "evaluate", lambda *args, **options: ([], []))
    scores, work, played = collector.evaluate_held_out(0)
    assert scores == {"dev": [], "dev_seen": []}
    assert work == EngineCounts()
    assert [sampling.temperature for sampling in collector.engines] == [0.0]


def test_the_counts_of_a_rollout_are_those_of_its_own_work(monkeypatch):
    """An engine that plays several rollouts counts on."""
    engine = SimpleNamespace(counts=EngineCounts(computed=5, prompt=4))

    def rollout(*args, **options):
        engine.counts.computed += 3
        return []

    monkeypatch.setattr(collect, "rollout", rollout)
    _, counts = collect.Collector.play(
        collector_of([]), engine, [], "train", num_samples=2, update=0
    )
    assert counts == EngineCounts(computed=3)
