"""How much of the gold's result a query returns, by hand and as properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtsql.judge.result_match import MAX_SMALL, result_match

GOLD = [("Ann", 41), ("Bob", 25)]


@pytest.mark.parametrize(
    ("pred", "columns", "rows"),
    [
        (GOLD, 1, 1),
        ([(25, "Bob"), (41, "Ann")], 1, 1),  # another order of columns and rows
        ([("Ann",), ("Bob",)], 2 / 3, 1 / 2),  # a column is missing
        ([(1, 41), (2, 25)], 1 / 2, 0),  # another column: no row agrees in both
        ([("Ann", 41, 1), ("Bob", 25, 1)], 4 / 5, 2 / 3),  # a column too many
        ([*GOLD, ("Cid", 30), ("Dee", 35)], 0, 2 * 2 / 6),  # a filter is missing
        ([("Ann", 41)], 0, 2 / 3),  # a filter too many
        ([*GOLD, *GOLD], 1, 2 * 2 / 6),  # DISTINCT is missing
        ([("Ann", 25), ("Bob", 41)], 1, 0),  # each column is right, no row is
        ([("x", "y")], 0, 0),
        ([], 0, 0),
        ([(None, None)], 0, 0),
    ],
)
def test_scores_by_hand(pred, columns, rows):
    assert result_match(pred, GOLD) == pytest.approx((columns, rows))


def test_an_empty_gold_pays_nobody():
    for gold in ([], [(None,)]):
        assert result_match([], gold) == result_match([(None,)], gold) == (0, 0)


def test_floats_are_rounded_and_numbers_are_no_texts():
    assert result_match([(0.1 + 0.2,)], [(0.3,)]) == (1, 1)
    assert result_match([("1",)], [(1,)]) == (0, 0)


def test_a_result_that_is_far_too_large_is_not_looked_at():
    dump = [*GOLD, *[("x", number) for number in range(MAX_SMALL)]]
    assert result_match(dump, GOLD) == (0, 0)
    large = [("x", number) for number in range(2 * MAX_SMALL)]
    assert result_match(large, large) == (1, 1)


cells = st.sampled_from([0, 1, "a", None, 2.5])
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[cells] * width), min_size=1, max_size=5)
)


@settings(max_examples=40)
@given(tables, tables, st.randoms(use_true_random=False))
def test_scores_are_between_0_and_1_and_do_not_depend_on_the_order_of_rows(pred, gold, random):
    columns, rows = result_match(pred, gold)
    assert 0 <= columns <= 1 and 0 <= rows <= 1
    shuffled = random.sample(pred, len(pred))
    assert result_match(shuffled, gold) == (columns, rows)
    if any(cell is not None for row in gold for cell in row):
        assert result_match(gold, gold) == (1, 1)
