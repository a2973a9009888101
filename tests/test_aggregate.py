"""The official tables from scores, worked out by hand."""

from mtsql.judge.aggregate import Figures, Score, aggregate
from mtsql.judge.exact_match import PARTS, Part


def test_scores_are_averaged_by_turn_level_and_interaction() -> None:
    parts = (Part(1, 1, 1),) * len(PARTS)
    scores = [Score("a", turn, "easy", em=turn != 6, ex=True, parts=parts) for turn in range(7)]
    scores.append(Score("b", 0, None, em=False, ex=False))
    summary = aggregate(scores, num_empty_interactions=2)
    assert summary.by_turn["> 4"] == Figures(3, 2 / 3, 1.0)
    assert summary.by_hardness["easy"].count == 7
    assert summary.by_hardness["all"].count == 8
    assert summary.interactions == Figures(4, 2 / 4, 3 / 4)


def test_a_verdict_that_was_not_computed_has_no_mean() -> None:
    summary = aggregate([Score(1, 0, "easy", ex=True)])
    assert summary.by_hardness["all"] == Figures(1, None, 1.0)
    assert summary.interactions == Figures(1, None, 1.0)


def test_the_mean_of_nothing_is_zero() -> None:
    assert aggregate([]).interactions == Figures(0, 0.0, 0.0)
