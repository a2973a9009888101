"""Chunks of rollouts: a killed sweep goes on with the first missing one, with any number of ranks,
and finds what the straight sweep finds.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.collecting import FakeEngine
from helpers.thread_ranks import on_ranks
from mtsql.engine.counts import EngineCounts
from mtsql.rl import sweep as sweeping
from mtsql.rl.sweep import Sweep, chunks_of, read_chunks, sweep, sweep_key
from mtsql.run.ranks import Ranks

TURNS = [SimpleNamespace(turn_id=f"t{i:02}", db_id=f"d{i % 3}") for i in range(20)]
"""Twenty turns of three databases."""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A sweep of twenty turns in seven chunks, of which the first two are looked at."""
    monkeypatch.setattr(sweeping, "TURNS_PER_CHUNK", 3)
    monkeypatch.setattr(sweeping, "FIRST_TURNS", 5)
    return Sweep("round 0", tmp_path / "chunks", "key", chunks_of(TURNS, 0), 4)


class Player:
    """Plays chunks, and dies after `num_left` of them. `played` holds their turns."""

    def __init__(self, num_left=99):
        self.engine = FakeEngine()
        self.num_left = num_left
        self.played = []

    def play(self, turns, show):
        if not self.num_left:
            raise ZeroDivisionError("the process dies")
        self.num_left -= 1
        self.played.append([turn.turn_id for turn in turns])
        self.engine.counts += EngineCounts(sampled=len(turns), sql_wait_secs=1.0)
        for number in range(4 * len(turns)):
            show(number + 1, 4 * len(turns))
        return {"turns": [(turn.turn_id, 1 / 3) for turn in turns]}

    def sweep(self, plan, ranks=None, **options):
        return sweep(plan, self.engine, self.play, ranks or Ranks(), **options)


def lines(plan):
    """All lines of all ranks."""
    return sorted(line for file in plan.folder.iterdir() for line in file.read_text().splitlines())


def test_the_turns_of_a_database_are_in_the_same_chunks_and_the_seed_orders_the_chunks(plan):
    ids = [[turn.turn_id for turn in chunk] for chunk in plan.chunks]
    assert sorted(sum(ids, [])) == [turn.turn_id for turn in TURNS]
    assert sorted(ids)[0] == ["t00", "t03", "t06"] and len(ids) == 7
    other = [[turn.turn_id for turn in chunk] for chunk in chunks_of(TURNS, 1)]
    assert other != ids and sorted(other) == sorted(ids)
    assert chunks_of([], 0) == []


def test_a_sweep_plays_each_chunk_with_an_empty_cache_and_keeps_it_as_a_line(plan):
    player, shown = Player(), []
    swept = player.sweep(plan, show=lambda *numbers: shown.append(numbers))
    assert player.engine.num_emptied == len(player.played) == 7
    assert shown == [(number, 80) for number in range(1, 81)]
    assert [[turn for turn, _ in found["turns"]] for found in swept.found] == player.played
    assert swept.work == EngineCounts(sampled=20)
    assert swept.played == EngineCounts(sampled=20, sql_wait_secs=7.0)
    first = json.loads((plan.folder / "rank0.jsonl").read_text().splitlines()[0])
    assert first.pop("work")["sampled"] == 3
    found = {"turns": [[turn, 1 / 3] for turn in player.played[0]]}
    expected = {"of": "round 0", "key": "key", "chunk": 0, "turns": player.played[0]}
    assert first == {**expected, "found": found}


@pytest.mark.parametrize("num_played", [0, 1, 4, 6])
@pytest.mark.parametrize("num_torn", [0, 1, 30])
def test_a_killed_sweep_goes_on_with_the_first_missing_chunk(num_played, num_torn, plan, tmp_path):
    """`num_torn` bytes of the last line are lost, too."""
    straight = Sweep("round 0", tmp_path / "straight", "key", plan.chunks, 4)
    expected = Player().sweep(straight)
    with pytest.raises(ZeroDivisionError):
        Player(num_played).sweep(plan)
    file = plan.folder / "rank0.jsonl"
    if num_played:
        file.write_bytes(file.read_bytes()[: -num_torn or None])
    player = Player()
    swept = player.sweep(plan)
    assert len(player.played) == 7 - num_played + bool(num_played and num_torn)
    assert (swept.found, swept.work) == (expected.found, expected.work)
    assert file.read_bytes() == (straight.folder / "rank0.jsonl").read_bytes()
    again = Player().sweep(plan)
    assert again.found == expected.found and again.played == EngineCounts()


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("after", [1, 2])
def test_another_number_of_ranks_goes_on_and_finds_the_same(before, after, plan, tmp_path):
    expected = Player().sweep(Sweep("round 0", tmp_path / "straight", "key", plan.chunks, 4))

    def die(ranks):
        with pytest.raises(ZeroDivisionError):
            Player(1).sweep(plan, ranks)

    on_ranks(before, die)
    assert len(lines(plan)) == before
    found = on_ranks(after, lambda ranks: Player().sweep(plan, ranks))
    assert [(one.found, one.work) for one in found] == [(expected.found, expected.work)] * after
    num_kept = sum(len(chunk) for chunk in plan.chunks[:before])
    assert sum(one.played.sampled for one in found) == 20 - num_kept
    assert lines(plan) == lines(Sweep("", tmp_path / "straight", "key", plan.chunks, 4))


def test_all_ranks_look_at_the_first_turns_and_can_end_the_sweep_there(plan):
    seen = []

    def refuse(found):
        seen.append(sorted(turn for one in found for turn, _ in one["turns"]))
        raise ValueError("nothing is right")

    def play(ranks):
        with pytest.raises(ValueError, match="nothing is right"):
            Player().sweep(plan, ranks, check=refuse)

    on_ranks(2, play)  # a chunk each
    assert seen[0] == seen[1] and len(seen) == 2 and len(seen[0]) >= 5
    assert len(lines(plan)) == 2
    with pytest.raises(ValueError, match="nothing is right"):
        Player(0).sweep(plan, check=refuse)  # what is kept is enough: nothing is played
    looked = []
    player = Player()
    player.sweep(plan, check=lambda found: looked.append((len(found), len(player.played))))
    assert looked == [(2, 0)] and len(player.played) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{torn in the middle", "not JSON"),
        ('{"chunk": 0}', "not a finished chunk of this program"),
        ("[1]", "not a finished chunk"),
        ("\udcff", "not UTF-8"),
        ("", "not JSON"),
    ],
)
def test_damage_other_than_a_torn_end_names_file_and_line(line, words, plan):
    Player().sweep(plan)
    file = plan.folder / "rank0.jsonl"
    kept = file.read_bytes().splitlines(keepends=True)
    kept[1] = line.encode(errors="surrogateescape") + b"\n"
    file.write_bytes(b"".join(kept))
    with pytest.raises(ValueError, match=words) as error:
        Player().sweep(plan)
    assert str(error.value).startswith(f"{file}, line 2: ")


def test_chunks_of_other_weights_turns_or_settings_are_not_used(plan):
    model = torch.nn.Linear(2, 2)
    key = sweep_key(model, plan.chunks, {"seed": 0})
    assert key == sweep_key(model, plan.chunks, {"seed": 0})
    assert key != sweep_key(model, plan.chunks, {"seed": 1})
    assert key != sweep_key(model, plan.chunks[1:], {"seed": 0})
    with torch.no_grad():
        model.weight += 1e-6
    assert key != sweep_key(model, plan.chunks, {"seed": 0})
    Player().sweep(plan)
    other = Sweep("round 0", plan.folder, "other", plan.chunks, 4)
    assert read_chunks(other) == {}
    player = Player()
    player.sweep(other)
    assert len(player.played) == 7 and len(lines(plan)) == 14
    assert len(read_chunks(plan)) == len(read_chunks(other)) == 7
