"""Compute the official tables from the scores of single turns."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mtsql.judge.exact_match import PARTS, Part
from mtsql.judge.hardness import HARDNESS

LEVELS = (*HARDNESS, "all")
"""The levels of the tables by hardness."""
TURNS = ("1", "2", "3", "4", "> 4")
"""The rows of the table by turn."""


@dataclass(frozen=True)
class Score:
    """The verdicts on one turn.

    turn: counted from 0. hardness: None if the gold query does not parse. em, ex: None if not
    computed.
    """

    interaction: Hashable
    turn: int
    hardness: str | None
    em: bool | None = None
    ex: bool | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Figures:
    """Mean verdicts over `count` turns or interactions, between 0 and 1.

    The mean of nothing is 0; None means that the verdict was not computed.
    """

    count: int
    em: float | None
    ex: float | None


@dataclass(frozen=True)
class PartFigures:
    """The figures of one partial score, between 0 and 1."""

    accuracy: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Summary:
    """The official tables.

    by_hardness: keys are LEVELS. by_turn: keys are TURNS. interactions: the share of interactions
    in which every turn is right (interaction match). parts: level -> part -> figures.
    """

    by_hardness: dict[str, Figures]
    by_turn: dict[str, Figures]
    interactions: Figures
    parts: dict[str, dict[str, PartFigures]]


def aggregate(scores: Sequence[Score], num_empty_interactions: int = 0) -> Summary:
    """Compute the official tables from the scores of single turns.

    num_empty_interactions: interactions without turns, which two blank lines in a row make. Quirk:
    each counts as right in every turn.
    """
    by_level = {}
    for level in LEVELS:
        by_level[level] = [score for score in scores if level in ("all", score.hardness)]
    by_turn = {}
    for index, name in enumerate(TURNS):
        by_turn[name] = [score for score in scores if min(score.turn, len(TURNS) - 1) == index]
    return Summary(
        by_hardness={level: _figures(group) for level, group in by_level.items()},
        by_turn={name: _figures(group) for name, group in by_turn.items()},
        interactions=_interaction_figures(scores, num_empty_interactions),
        parts={level: _all_part_figures(group) for level, group in by_level.items()},
    )


def _figures(scores: Sequence[Score]) -> Figures:
    em = _mean([score.em for score in scores])
    ex = _mean([score.ex for score in scores])
    return Figures(len(scores), em, ex)


def _interaction_figures(scores: Sequence[Score], num_empty: int) -> Figures:
    groups: dict[Hashable, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.interaction, []).append(score)
    em: list[bool | None] = [True] * num_empty
    ex: list[bool | None] = [True] * num_empty
    for group in groups.values():
        em.append(_all([score.em for score in group]))
        ex.append(_all([score.ex for score in group]))
    return Figures(len(em), _mean(em), _mean(ex))


def _all_part_figures(scores: Sequence[Score]) -> dict[str, PartFigures]:
    figures = {}
    for index, name in enumerate(PARTS):
        figures[name] = _part_figures([score.parts[index] for score in scores if score.parts])
    return figures


def _part_figures(parts: Sequence[Part]) -> PartFigures:
    """Accuracy is taken over the predictions that have the part, recall over the gold queries."""
    if not parts:
        return PartFigures(0.0, 0.0, 0.0)
    accuracy = _share([part.f1 == 1 for part in parts if part.num_pred > 0])
    recall = _share([part.f1 == 1 for part in parts if part.num_gold > 0])
    total = accuracy + recall
    f1 = 2 * accuracy * recall / total if total else 1.0  # quirk: the F1 of two zeros is 1
    return PartFigures(accuracy, recall, f1)


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    return None if None in verdicts else all(verdicts)


def _mean(verdicts: Sequence[bool | None]) -> float | None:
    computed = [verdict for verdict in verdicts if verdict is not None]
    return _share(computed) if len(computed) == len(verdicts) else None


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 0.0
