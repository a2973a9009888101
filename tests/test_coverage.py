"""Coverage tables, counted by hand."""

from types import SimpleNamespace

import pytest

from helpers.collecting import scored
from mtsql.agent.env import Outcome
from mtsql.rl.coverage import (
    add_counts,
    coverage,
    coverage_lines,
    coverage_metrics,
    rollout_counts,
)

LEVELS = {"a:0": "easy", "a:1": "hard", "b:0": "easy", "b:1": None, "c:0": "hard", "c:5": "hard"}
"""Six turns of three dialogues, with their hardness."""
TURNS = [SimpleNamespace(turn_id=name, index=int(name[-1])) for name in LEVELS]


def one(turn_id, is_right, outcome=Outcome.ANSWERED, num_tokens=2):
    trajectory = scored(1.0, outcome, num_tokens, turn_id=turn_id)
    trajectory.components = {"ex": is_right, "em": is_right}
    return trajectory


def table(*solved):
    return coverage(TURNS, set(solved), lambda turn: LEVELS[turn.turn_id])


def test_turns_are_counted_by_hardness_by_place_and_by_dialogue():
    found = table("a:0", "a:1", "b:1")
    assert (found["turns"], found["solved"]) == (6, 3)
    assert found["by_hardness"] == {
        "easy": {"turns": 2, "solved": 1},
        "hard": {"turns": 3, "solved": 1},
        "unparsed": {"turns": 1, "solved": 1},
    }
    assert found["by_turn"] == {
        "1": {"turns": 3, "solved": 1},
        "2": {"turns": 2, "solved": 2},
        "> 4": {"turns": 1, "solved": 0},
    }
    assert found["dialogues"] == {"dialogues": 3, "solved": 1, "partly_solved": 1, "unsolved": 1}


GROUPS = [
    [one("a:0", True, num_tokens=6), one("a:0", False), one("a:0", True)],
    [one("b:0", False, Outcome.MAX_REPLIES, num_tokens=0), one("b:0", False), one("b:0", False)],
]


def test_rollouts_are_counted_by_turn_and_by_ending():
    counts = rollout_counts(GROUPS)
    assert counts == {
        "successes": {"a:0": [2, 3], "b:0": [0, 3]},
        "num": 6,
        "right": 2,
        "tokens": 14,
        "tokens_of_right": 8,
        "replies": {"0": 1, "1": 5},
        "replies_of_right": {"1": 2},
        "endings": {"answered": 5, "max_replies": 1},
    }
    parts = [rollout_counts(GROUPS[1:]), rollout_counts(GROUPS[:1])]
    assert add_counts(parts) == add_counts(reversed(parts)) == counts
    assert list(add_counts(parts)["successes"]) == ["a:0", "b:0"]


def test_the_numbers_are_shown_and_logged_as_shares():
    found, counts = table("a:0", "a:1"), rollout_counts(GROUPS)
    row = coverage_metrics(found, counts)
    shares = {"solved_frac": 1 / 3, "solved_frac/easy": 1 / 2, "solved_frac/turn_over_4": 0.0}
    shares |= {"right_frac": 1 / 3, "response_tokens": 14 / 6, "mean_replies": 5 / 6}
    shares |= {"outcome/max_replies": 1 / 6, "dialogues_solved_frac": 1 / 3, "num_episodes": 6}
    assert {key: row[key] for key in shares} == pytest.approx(shares)
    assert coverage_lines(found, counts) == [
        "solved so far 33.3% of 6 turns: easy 50.0%, hard 33.3%, unparsed 0.0%; by turn: "
        "1 33.3%, 2 50.0%, > 4 0.0%; whole dialogues 33.3%",
        "rollouts: 33.3% right; 0.8 replies and 2 tokens on average; ended: answered 83.3%, "
        "max_replies 16.7%",
    ]
