"""Scores of played episodes and their summaries: the official tables, abilities and outcomes."""

from dataclasses import replace

import pytest

from helpers.episodes import GOLD, HISTORY, answer, call, make_env, play, singers
from mtsql.agent.reply import Verdict
from mtsql.rl.evaluate import TurnScore, predictions_text, score_turn, summarize


def turn_score(dialogue, turn, hardness, ex, em, call_memory=None, outcome="answered"):
    abilities = {"call_execute": float(ex), "call_memory": call_memory}
    ids = f"dev:{dialogue}:{turn}", f"dev:{dialogue}"
    return TurnScore(*ids, turn, hardness, ex, em, "SELECT 1", outcome, 2, abilities)


SCORES = [
    turn_score(0, "1", "easy", True, True),
    turn_score(0, "2", "hard", True, False, 1.0),
    turn_score(1, "1", "easy", False, False, outcome="bad_call"),
    turn_score(1, "> 4", "unparsed", True, True, 0.0),
    turn_score(2, "1", "extra", True, True),
]


def test_a_turn_is_scored_by_the_official_metrics_and_the_papers_abilities(tmp_path):
    database = singers(tmp_path / "shows.sqlite")
    replies = [
        call("junk"),
        call(GOLD, ran=Verdict.PASS),
        call(GOLD, "memory_retrieve", ran=Verdict.PASS),
        answer(GOLD.replace(" WHERE", "\nWHERE"), fits=Verdict.PASS),
    ]
    score = score_turn(play(make_env(database, history=HISTORY), replies))
    assert (score.turn_id, score.dialogue_id, score.turn) == ("dev:0:0", "dev:0", "2")
    assert score.ex and score.em and score.prediction == GOLD and score.outcome == "answered"
    assert score.abilities == {
        "call_execute": 1.0,
        "call_memory": 1.0,
        "exec_verify": 0.5,
        "memory_verify": 1.0,
        "propose": pytest.approx(2 / 3),
    }


def test_a_score_says_how_the_episode_started_and_what_it_cost(tmp_path):
    database = singers(tmp_path / "shows.sqlite")
    replies = [call(GOLD, "memory_retrieve"), call("junk"), call(GOLD), answer(GOLD)]
    trajectory = play(make_env(database, history=HISTORY), replies)
    trajectory.prompt_ids = [1, 2, 3]
    trajectory.add_sampled([7, 8], [-0.5, -1.0])
    trajectory.add_context([9])
    score = score_turn(trajectory)
    assert (score.first_execution, score.first_sql, score.num_calls) == ("failed", "junk", 3)
    assert (score.prompt_tokens, score.num_sampled, score.num_observed) == (3, 2, 1)
    assert score.mean_logprob == -0.75 and score.error is None and score.result is not None


@pytest.mark.parametrize(
    ("reply", "error", "start"),
    [
        (answer("SELECT nope"), "execution", None),
        (answer("SELECT name FROM singer"), "constraint", None),
        (call("SELECT name FROM singer WHERE age > 99"), "no_answer", "empty"),
        (call("SELECT name FROM singer"), "no_answer", "rows"),
        (call(GOLD, "memory_retrieve"), "no_answer", None),  # that is no execution for the agent
    ],
)
def test_a_wrong_answer_has_a_class_and_a_start(reply, error, start, tmp_path):
    env = make_env(singers(tmp_path / "shows.sqlite"), history=HISTORY, max_replies=1)
    score = score_turn(play(env, [reply]))
    assert not score.ex and (score.error, score.first_execution) == (error, start)
    assert (score.result is not None) == (error == "constraint")


@pytest.mark.parametrize("rule", ["official", "set"])
def test_the_result_of_an_answer_is_hashed_by_the_rule_of_its_data_set(rule, tmp_path):
    database = singers(tmp_path / "shows.sqlite")

    def result_of(sql):
        env = make_env(database)
        env.turn = replace(env.turn, ex=rule)
        return score_turn(play(env, [answer(sql)])).result

    once = result_of("SELECT name FROM singer")
    twice = result_of("SELECT name FROM singer UNION ALL SELECT name FROM singer")
    assert (once == twice) is (rule == "set")


def test_an_ability_without_an_occasion_is_none(tmp_path):
    score = score_turn(play(make_env(singers(tmp_path / "shows.sqlite")), ["no action"]))
    assert not score.ex and not score.em and (score.prediction, score.outcome) == ("", "no_action")
    assert score.abilities == {
        "call_execute": 0.0,
        "call_memory": None,
        "exec_verify": None,
        "memory_verify": None,
        "propose": None,
    }


def test_a_summary_counts_by_turn_by_hardness_and_by_dialogue():
    summary = summarize(SCORES)
    assert summary["all"] == {"count": 5, "ex": 80.0, "em": 60.0}
    assert summary["by_turn"] == {
        "1": {"count": 3, "ex": 66.67, "em": 66.67},
        "2": {"count": 1, "ex": 100.0, "em": 0.0},
        "3": {"count": 0, "ex": 0.0, "em": 0.0},
        "4": {"count": 0, "ex": 0.0, "em": 0.0},
        "> 4": {"count": 1, "ex": 100.0, "em": 100.0},
    }
    assert summary["by_hardness"] == {
        "easy": {"count": 2, "ex": 50.0, "em": 50.0},
        "medium": {"count": 0, "ex": 0.0, "em": 0.0},
        "hard": {"count": 1, "ex": 100.0, "em": 0.0},
        "extra": {"count": 1, "ex": 100.0, "em": 100.0},
    }  # a gold outside the grammar counts in "all" only
    assert summary["interaction"] == {"count": 3, "ex": 66.67, "em": 33.33}
    assert summary["abilities"] == {
        "call_execute": 0.8,
        "call_memory": 0.5,
    }  # first turns have nothing to remember
    assert summary["outcomes"] == {"answered": 4, "bad_call": 1} and summary["mean_replies"] == 2
    with pytest.raises(ValueError, match="no turn was scored"):
        summarize([])


def test_predictions_are_in_the_official_format():
    assert predictions_text(SCORES) == "SELECT 1\nSELECT 1\n\nSELECT 1\nSELECT 1\n\nSELECT 1\n"
