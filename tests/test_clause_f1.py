"""Clause F1, worked out by hand."""

import pytest

from helpers.official import SHOWS
from mtsql.judge.clause_f1 import clause_f1


@pytest.mark.parametrize(
    ("pred", "gold", "score", "strict_score"),
    [
        ("SELECT name FROM singer", "SELECT name FROM singer", 1, 1),
        ("SELECT T1.name FROM singer AS T1", "SELECT name FROM singer", 1, 1),
        # select: {name, age} against {name} = 2 * 1 / 3; from: 1
        ("SELECT name , age FROM singer", "SELECT name FROM singer", (2 / 3 + 1) / 2, 1 / 2),
        ("SELECT age , name FROM singer", "SELECT name , age FROM singer", 1, 1 / 2),
        # select: {name, distinct} against {name}; from: 1; where: empty on one side
        (
            "SELECT DISTINCT name FROM singer WHERE age > 3",
            "SELECT name FROM singer",
            (2 / 3 + 1 + 0) / 3,
            1 / 3,
        ),
        # where: {age > 3, and, name = 'a'} against {age > 3}: 2 * 1 / 4
        (
            "SELECT name FROM singer WHERE age > 3 AND name = 'a'",
            "SELECT name FROM singer WHERE age > 3",
            (1 + 1 + 1 / 2) / 3,
            2 / 3,
        ),
        # values count
        (
            "SELECT name FROM singer WHERE age > 3",
            "SELECT name FROM singer WHERE age > 4",
            2 / 3,
            2 / 3,
        ),
        # order and limit are two clauses; the direction counts, the number of LIMIT does not
        (
            "SELECT name FROM singer ORDER BY age LIMIT 1",
            "SELECT name FROM singer ORDER BY age DESC LIMIT 3",
            (1 + 1 + 0 + 1) / 4,
            3 / 4,
        ),
        # the arm is scored by the same rule: select 0, from 1
        (
            "SELECT name FROM singer UNION SELECT age FROM singer",
            "SELECT name FROM singer UNION SELECT name FROM singer",
            (1 + 1 + 1 / 2) / 3,
            2 / 3,
        ),
        # union and except are two clauses, each empty on one side
        (
            "SELECT name FROM singer UNION SELECT name FROM singer",
            "SELECT name FROM singer EXCEPT SELECT name FROM singer",
            2 / 4,
            2 / 4,
        ),
        # group by and having are two clauses
        (
            "SELECT name FROM singer GROUP BY name",
            "SELECT name FROM singer GROUP BY name HAVING count(*) > 1",
            3 / 4,
            3 / 4,
        ),
        ("no query", "SELECT name FROM singer", 0, 0),
        ("SELECT name FROM singer", "no query", 0, 0),
        ("SELECT FROM", "SELECT FROM", 0, 1),
    ],
)
def test_the_score_is_a_mean_over_the_clauses_that_either_query_has(
    pred: str, gold: str, score: float, strict_score: float
) -> None:
    assert clause_f1(pred, gold, SHOWS) == pytest.approx(score)
    assert clause_f1(pred, gold, SHOWS, strict=True) == pytest.approx(strict_score)
