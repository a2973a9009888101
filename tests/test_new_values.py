"""New values look like those of their column, and new rows have new keys."""

import random
from collections.abc import Callable

import pytest

from mtsql.judge.new_values import NewValues, new_rows


@pytest.mark.parametrize(
    ("values", "is_like"),
    [
        (["2001-02-03", "1999-12-31"], lambda v: len(v) == 10 and v[4:] in ("-02-03", "-12-31")),
        (["USA", "Peru"], lambda v: len(v) in (3, 4) and v.isalpha() and v[0].isupper()),
        (["02139", "10001"], lambda v: len(v) == 5 and v.isdigit()),
        ([1, 2, 3, 50], lambda v: type(v) is int and 0 <= v <= 60),
        ([0, 5], lambda v: v > 0),
        ([-5, 5], lambda v: -15 <= v <= 15),
        ([1.5, 2.25], lambda v: isinstance(v, float) and v >= 0),
        ([None, "a", "b"], lambda v: len(v) in (1, 2) and v.islower()),
    ],
)
def test_new_values_look_like_those_of_the_column_and_lie_on_both_sides(
    values: list, is_like: Callable[[object], bool]
) -> None:
    rng = random.Random(1)
    drawn = [NewValues(values).draw(rng) for _ in range(200)]
    found = [value for value in drawn if value is not None]
    assert len(found) > 100
    assert not set(found) & set(values)
    assert all(map(is_like, found)), found[:20]
    known = [value for value in values if value is not None]
    assert max(found) > max(known)
    # Numbers of a column without negative ones are not negative, and no text sorts before "a".
    assert min(found) < min(known) or min(known) in (0, 1, "a")


@pytest.mark.parametrize(
    ("values", "is_like"),
    [
        (["北京", "上海"], lambda v: len(v) == 3),
        (["?", "!"], lambda v: len(v) == 2),
        ([b"x", b"y"], lambda v: isinstance(v, bytes)),
        ([2**60, 2**61], lambda v: 2**60 - 10 <= v < 2**63),
    ],
)
def test_values_without_letters_or_of_any_size_have_new_ones(
    values: list, is_like: Callable[[object], bool]
) -> None:
    rng = random.Random(1)
    found = [NewValues(values).draw(rng) for _ in range(50)]
    assert not set(found) & set(values)
    assert all(is_like(value) for value in found if value is not None)


@pytest.mark.parametrize("values", [[], [None, None], ['{"a": 1}', "[1]"], ["", " "]])
def test_a_column_of_null_json_or_blanks_has_no_new_value(values: list) -> None:
    assert NewValues(values).draw(random.Random(1)) is None


def made_rows(rows: list[tuple], **keys: object) -> list[tuple]:
    """New rows of a table of two columns."""
    none = frozenset()
    defaults = dict(own_keys=none, unique=none, references={0: [], 1: []}, primary_key=(0,))
    return new_rows(rows, **defaults | keys, fixed=none, share=0.1, rng=random.Random(0))


def test_a_row_whose_unique_reference_has_no_new_key_is_left_out() -> None:
    rows = [(1, 1), (2, 2)]
    both = frozenset({0, 1})
    assert made_rows(rows, unique=both) == []
    assert made_rows(rows, unique=both, references={0: [7], 1: [9]}) == [(7, 9)]


def test_a_row_that_would_repeat_a_primary_key_is_left_out() -> None:
    rows = [(1, 2), (1, 3), (2, 2)] * 10
    assert made_rows(rows, primary_key=(0, 1)) == []
