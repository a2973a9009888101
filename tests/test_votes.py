"""Several samples of a turn: pass@k against enumeration, votes by hand."""

from dataclasses import dataclass
from itertools import combinations

import pytest

from mtsql.rl.votes import numbers_of_samples, pass_at, result_key, vote
from mtsql.sql.query import QueryResult, QueryStatus


@dataclass(frozen=True)
class Sample:
    result: str | None
    mean_logprob: float | None = -0.5
    has_answer: bool = True


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for num_samples in range(1, 7):
        for num_right in range(num_samples + 1):
            verdicts = [place < num_right for place in range(num_samples)]
            for k in range(1, num_samples + 1):
                hits = [any(chosen) for chosen in combinations(verdicts, k)]
                expected = sum(hits) / len(hits)
                assert pass_at(k, num_samples, num_right) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="pass@3 needs 3 samples, and there are 2"):
        pass_at(3, 2, 1)


def test_k_doubles_up_to_the_number_of_samples():
    assert [numbers_of_samples(n) for n in (1, 2, 6, 16)] == [
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]


@pytest.mark.parametrize(
    ("samples", "chosen"),
    [
        ("a b b", 1),  # the largest group
        ("a b b a", 0),  # of equal groups with the same log-probs the first
        ("- - a", 2),  # what does not run has no vote
    ],
)
def test_the_largest_group_of_equal_results_wins(samples, chosen):
    results = [None if name == "-" else name for name in samples.split()]
    assert vote([Sample(result) for result in results]) == chosen


def test_of_equal_groups_the_more_probable_one_wins():
    assert vote([Sample("a", -0.9), Sample("b", -0.2), Sample("a", -0.1), Sample("b", -0.3)]) == 1


def test_without_a_result_the_first_answer_is_chosen():
    assert vote([Sample(None, has_answer=False), Sample(None), Sample(None)]) == 1
    assert vote([Sample(None, None, False), Sample(None, None, False)]) == 0


def rows(*found):
    return QueryResult(QueryStatus.OK, found)


def test_results_with_the_same_rows_have_the_same_key():
    key = result_key(rows((1, "a"), (2, "b")), is_ordered=False)
    assert key == result_key(rows((2.0, "b"), (1, "a")), is_ordered=False)
    assert key == result_key(rows(("a", 1), ("b", 2)), is_ordered=False)  # another column first
    for other in (rows((1, "a")), rows((1, "b"), (2, "a")), rows(("1", "a"), ("2", "b")), rows()):
        assert key != result_key(other, is_ordered=False)
    assert result_key(QueryResult(QueryStatus.ERROR), is_ordered=False) is None


def test_the_order_of_rows_counts_only_where_it_was_asked_for():
    up, down = rows((1,), (2,)), rows((2,), (1,))
    assert result_key(up, is_ordered=False) == result_key(down, is_ordered=False)
    assert result_key(up, is_ordered=True) != result_key(down, is_ordered=True)
    assert result_key(rows((1,)), is_ordered=True) == result_key(rows((1,)), is_ordered=False)


def test_columns_with_the_same_values_may_change_places_in_an_ordered_result():
    key = result_key(rows((1, 2), (2, 1), (3, 3)), is_ordered=True)
    assert key == result_key(rows((2, 1), (1, 2), (3, 3)), is_ordered=True)
    assert key != result_key(rows((1, 1), (2, 2), (3, 3)), is_ordered=True)


def test_birds_rule_ignores_repeated_rows_and_heeds_the_order_of_columns():
    key = result_key(rows((1, "a"), (2, "b")), is_ordered=True, is_set=True)
    again = rows((2, "b"), (1.0, "a"), (2, "b"))
    assert key == result_key(again, is_ordered=True, is_set=True)
    assert key != result_key(rows(("a", 1), ("b", 2)), is_ordered=True, is_set=True)
