"""Drafts, shared beginnings, small caches, preemptions, graphs and late observations together: the
tokens are those of each group alone, and the counts are right."""

from collections.abc import Callable

import numpy as np
import pytest

from helpers.flash_double import record, replace_flash_attn
from helpers.random_play import Player, play_alone, random_case
from mtsql.engine import cuda_graphs


def on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Blocks are visited where they lie."""


def gathered(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU without flash-attn."""
    init = Player.__init__

    def by_tables(self, case):
        init(self, case)
        self.engine.pool.by_tables = True

    patch.setattr(Player, "__init__", by_tables)


def by_graphs(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU with flash-attn."""
    replace_flash_attn(patch)
    patch.setattr(cuda_graphs, "capture", record)


PATHS = pytest.mark.parametrize("path", [on_a_cpu, gathered, by_graphs], ids=lambda f: f.__name__)


def check(seed: int, path: Callable[[pytest.MonkeyPatch], None]) -> Player:
    """Play a random case."""
    case = random_case(seed)
    alone = play_alone(case)
    with pytest.MonkeyPatch.context() as patch:
        path(patch)
        player = Player(case)
        assert (player.engine.graphs is not None) == (path is by_graphs)
        player.play()
    player.check_end()
    for name, completions in player.played.items():
        num = len(completions)
        assert name in player.closed_early or num == len(alone[name])
        expected = alone[name][:num]
        assert [one.ids for one in completions] == [one.ids for one in expected]
        assert [one.reason for one in completions] == [one.reason for one in expected]
        for one, other in zip(completions, expected, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-9)
    return player


@PATHS
@pytest.mark.parametrize("seed", range(6))
def test_tokens_and_counts_are_right_in_any_workload(seed, path):
    check(seed, path)


@pytest.mark.slow
@PATHS
def test_tokens_and_counts_are_right_in_many_workloads(path):
    counts = [check(seed, path).engine.counts for seed in range(1000, 1200)]
    total = sum(counts[1:], counts[0])
    assert min(total.accepted, total.prefix_hits, total.preemptions) > 1000
