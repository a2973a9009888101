"""The oracle of benchmarks/headroom.py: what each ability is worth on the embedded world."""

import importlib
from pathlib import Path

import pytest

from mtsql.judge.aggregate import aggregate
from mtsql.toyworld.world import WorldConfig

SIZE = WorldConfig(num_train_databases=60, num_dev_databases=8, train_dialogues=0, seen_dialogues=3)
READERS = ("perfect", "only the last SQL", "looks nothing up", "no history", "forgets filters")


@pytest.fixture(scope="module")
def headroom(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
        module = importlib.import_module("headroom")
    folder = tmp_path_factory.mktemp("world")
    readers = {name: module.READERS[name] for name in READERS}
    found = module.measure(module.Flags(seed=1, size=SIZE), folder, readers)
    return module, found["dev_seen"]


def losses(scores):
    """(by turn, by hardness) in points of EX."""
    summary = aggregate(scores)
    return [
        {name: 100 - 100 * one.ex for name, one in table.items()}
        for table in (summary.by_turn, summary.by_hardness)
    ]


def test_the_perfect_reader_is_always_right(headroom):
    by_turn, by_hardness = losses(headroom[1]["perfect"])
    assert set(by_turn.values()) == set(by_hardness.values()) == {0.0}


def test_coherence_is_worth_more_at_later_turns_and_in_harder_queries(headroom):
    """No table by hardness is a matter of chance here: each level has more than 90 turns."""
    by_turn, by_hardness = losses(headroom[1]["only the last SQL"])
    assert by_turn["1"] == 0 and by_turn["2"] < by_turn["3"]
    assert min(by_turn["3"], by_turn["4"], by_turn["> 4"]) > 20
    assert min(by_hardness["hard"], by_hardness["extra"]) > by_hardness["easy"]
    by_turn, by_hardness = losses(headroom[1]["no history"])
    assert by_turn["1"] == 0 and min(by_turn["3"], by_turn["4"], by_turn["> 4"]) > 80
    assert by_hardness["extra"] > by_hardness["easy"] + 20


def test_looking_up_is_worth_more_at_later_turns_and_in_harder_queries(headroom):
    by_turn, by_hardness = losses(headroom[1]["looks nothing up"])
    assert all(by_turn[later] > by_turn["1"] + 15 for later in ("2", "3", "4", "> 4"))
    assert by_hardness["extra"] > by_hardness["easy"]


def test_the_table_has_a_row_for_each_reader_and_the_counts(headroom):
    module, found = headroom
    lines = module.table(found).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "turns" if number == 0 else name for number, name in enumerate(("", *READERS))
    ]
    assert f" {len(found['perfect'])} |" in lines[2] and lines[3].count("100.0") == 10
