"""The figures of an evaluation by hand: the aha share, error classes, costs, samples, intervals."""

import json

import pytest

from mtsql.judge.error_classes import ERROR_CLASSES
from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, aha_figures, cell_figures, cell_rows, share
from mtsql.rl.evaluate import TurnScore
from mtsql.sql.dialogues import Turn

NO_ABILITIES = dict.fromkeys(ABILITY_DEFINITIONS)


def episode(dialogue, turn, ex, **fields):
    """An episode whose answer is `SELECT 1`."""
    ids = f"dev:{dialogue}:{turn}", f"dev:{dialogue}"
    usual = {"error": None if ex else "other", "abilities": NO_ABILITIES, "num_replies": 2}
    usual |= {"em": ex, "prediction": "SELECT 1", "outcome": "answered", "hardness": "easy"}
    return TurnScore(*ids, str(turn + 1), ex=ex, **usual | fields)


EPISODES = [
    episode(0, 0, True, first_execution="failed", first_sql="SELECT nope"),
    episode(0, 1, False, first_execution="failed", first_sql="SELECT nope"),
    episode(1, 0, True, first_execution="empty", first_sql="select 1 ;"),  # empty, and right
    episode(1, 1, True, first_execution="rows", first_sql="SELECT 2"),
    episode(2, 0, True),
    episode(2, 1, False, error="constraint"),
]


def test_the_aha_share_counts_bad_starts_that_end_right():
    figures = aha_figures(EPISODES)
    aha, others = figures["aha"], figures["other_starts"]
    assert (aha["num"], aha["of"], aha["percent"]) == (2, 3, 66.67)
    assert figures["mended"] == 1  # the other one answers with its first query
    assert (others["num"], others["of"]) == (2, 3)
    assert (figures["aha_of_all"]["num"], figures["aha_of_all"]["of"]) == (2, 6)
    found = {name: (one["num"], one["of"]) for name, one in figures["by_start"].items()}
    assert found == {"rows": (1, 1), "empty": (1, 1), "failed": (1, 2), "none": (1, 2)}


def test_error_classes_are_shares_of_the_wrong_answers():
    errors = cell_figures([[score] for score in EPISODES])["errors"]
    assert tuple(errors) == ERROR_CLASSES
    assert {one["of"] for one in errors.values()} == {2}
    assert [errors[name]["percent"] for name in ("constraint", "other", "execution")] == [50, 50, 0]
    assert sum(one["percent"] for one in errors.values()) == 100
    near = cell_figures([[episode(0, 0, False, em=True)], [episode(1, 0, False)]])["right_by_em"]
    assert (near["num"], near["of"]) == (1, 2)


def test_every_figure_has_an_interval():
    """Except for shares of nothing and of a single dialogue."""
    figures = cell_figures([[score] for score in EPISODES])
    low, high = figures["all"]["ex_interval"]
    assert 0 <= low < figures["all"]["ex"] < high <= 100
    tables = [figures["all"], figures["interaction"]]
    tables += [*figures["by_turn"].values(), *figures["by_hardness"].values()]
    for row in tables:
        for verdict in ("ex", "em"):
            assert (row[f"{verdict}_interval"] is None) == (row["count"] == 0)
    assert figures["costs"]["replies"] == {"mean": 2.0, "of": 6, "interval": [2.0, 2.0]}
    assert figures["ability_intervals"] == NO_ABILITIES  # no episode had an occasion
    assert share([])["percent"] is None and "samples" not in figures


def sampled(dialogue, *results):
    """The samples of a turn; those with the result `a` are right."""
    return [
        episode(dialogue, 0, name == "a", result=name, mean_logprob=-0.5, num_calls=place)
        for place, name in enumerate(results)
    ]


def test_samples_give_pass_at_k_and_votes():
    groups = [sampled(0, "b", "a", "a", "c"), sampled(1, "b", "b", "a", "b")]
    figures = cell_figures(groups)
    assert figures["all"]["ex"] == 0 and figures["costs"]["calls"]["mean"] == 0  # first samples
    passed = {k: one["percent"] for k, one in figures["samples"]["ex"]["pass"].items()}
    # At k = 2 the first turn fails with the two wrong ones of 6 pairs, the second with 3 of 6.
    assert passed == {"1": 37.5, "2": pytest.approx(66.67), "4": 100.0}
    voted = {k: one["num"] for k, one in figures["samples"]["ex"]["vote"].items()}
    assert voted == {"1": 0, "2": 0, "4": 1}
    turns = [Turn(f"dev:{dialogue}:0", 0, "shows", "who ?", "SELECT 2") for dialogue in (0, 1)]
    rows = cell_rows(groups, turns)
    assert [(row["question"], row["gold"]) for row in rows] == [("who ?", "SELECT 2")] * 2
    assert [row["voted"] for row in rows] == [1, 0]
    assert [one["result"] for one in rows[0]["samples"]] == ["b", "a", "a", "c"]
    assert json.loads(json.dumps(rows)) == rows
