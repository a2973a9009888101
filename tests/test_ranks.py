"""What crosses from one process to another. Two real processes are in test_two_processes."""

import pytest

from mtsql.run.ranks import Ranks


def test_items_are_dealt_out_in_turn_and_each_goes_to_one_rank():
    items = list("abcde")
    shares = [Ranks(index, 3).share(items) for index in range(3)]
    assert shares == [["a", "d"], ["b", "e"], ["c"]]
    assert Ranks(2, 3).share(["a"]) == [] and Ranks().share(items) == items


def test_a_process_that_is_alone_needs_no_process_group():
    alone = Ranks()
    assert alone.is_main and not Ranks(1, 2).is_main
    assert alone.gather([1, 2]) == [1, 2] and alone.sum({"a": 1.0}) == {"a": 1.0}
    assert alone.from_main(max, 3, 4) == 4


def test_a_mistake_on_the_main_rank_is_raised_there():
    def fail(what):
        raise ValueError(f"no {what}")

    with pytest.raises(ValueError, match="no file"):
        Ranks().on_main(fail, "file")
