"""Which trajectories a run keeps: a share of the turns, bounded in size, the same each time."""

import gzip
import json

import pytest

from mtsql.rl.kept import KeptConfig, file_content, is_kept, packed


def groups_of(count: int, size: int = 100):
    return [(f"train:{n}:0", packed([{"turn_id": n, "text": "x" * size}])) for n in range(count)]


def turns_in(content: bytes) -> list[int]:
    return [json.loads(line)["turn_id"] for line in gzip.decompress(content).splitlines()]


def test_records_are_lines_that_any_reader_of_gzip_reads():
    content = packed([{"a": "é\n"}, {"a": None}]) + packed([{"a": "half \ud83d"}])
    lines = gzip.decompress(content).decode().splitlines()
    assert [json.loads(line)["a"] for line in lines] == ["é\n", None, "half ?"]
    assert packed([{"a": 1}]) == packed([{"a": 1}])  # no time, no name of a file


def test_the_order_in_which_ranks_give_groups_changes_nothing():
    groups = groups_of(12)
    straight = file_content(groups, 3, KeptConfig())
    assert file_content(groups[1::2] + groups[0::2], 3, KeptConfig()) == straight
    assert turns_in(straight) == list(range(12))  # 9 before 10


def test_a_file_is_bounded_and_which_turns_it_has_depends_on_the_update():
    groups = groups_of(40)
    size = len(groups[20][1])
    config = KeptConfig(max_mb=10.5 * size / 1e6)
    kept = [turns_in(file_content(groups, update, config)) for update in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]
    assert len(kept[0]) == 10 and kept[0] == sorted(kept[0])


def test_a_share_of_the_turns_is_kept_and_a_larger_share_has_all_of_a_smaller_one():
    turns = [f"train:{number}:1" for number in range(2000)]
    few = {turn for turn in turns if is_kept(turn, 1, KeptConfig(keep_frac=0.2))}
    more = {turn for turn in turns if is_kept(turn, 1, KeptConfig(keep_frac=0.5))}
    assert few < more and 300 < len(few) < 500
    assert not any(is_kept(turn, 1, KeptConfig(keep_frac=0.0)) for turn in turns)
    assert all(is_kept(turn, 1, KeptConfig()) for turn in turns)
    assert file_content([], 1, KeptConfig()) == b""


@pytest.mark.parametrize(
    ("values", "name"),
    [({"keep_frac": 1.1}, "keep_frac"), ({"max_mb": 0.0}, "max_mb"), ({"max_mb": -1.0}, "max_mb")],
)
def test_values_out_of_range_are_named(values, name):
    with pytest.raises(ValueError, match=f"trajectories.{name} is "):
        KeptConfig(**values)
