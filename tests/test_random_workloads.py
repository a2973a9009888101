"""Drafts, shared beginnings, small caches, preemptions, graphs and late observations together: the
tokens are those of each group alone, and the counts are right."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from helpers.content_model import MODEL, read_content
from helpers.engine import make_engine, tiny
from helpers.flash_double import record, replace_flash_attn
from helpers.random_play import Make, Player, play_alone, random_case
from mtsql.engine import cuda_graphs
from mtsql.engine.engine import Engine

Path = Callable[[pytest.MonkeyPatch], Make]


def by_content(patch: pytest.MonkeyPatch) -> Make:
    """A model that costs nothing."""

    def make(**options) -> Engine:
        engine = make_engine(MODEL, **options)
        read_content(patch, engine)
        return engine

    return make


def on_a_cpu(patch: pytest.MonkeyPatch) -> Make:
    """Blocks are visited where they lie."""
    return partial(make_engine, tiny(dtype=torch.float64))


def gathered(patch: pytest.MonkeyPatch) -> Make:
    """As on a GPU without flash-attn."""

    def make(**options) -> Engine:
        engine = make_engine(tiny(dtype=torch.float64), **options)
        engine.pool.by_tables = True
        return engine

    return make


def by_graphs(patch: pytest.MonkeyPatch) -> Make:
    """As on a GPU with flash-attn."""
    replace_flash_attn(patch)
    patch.setattr(cuda_graphs, "capture", record)
    return on_a_cpu(patch)


def check(seed: int, path: Path) -> Player:
    """Play a random case."""
    case = random_case(seed)
    with pytest.MonkeyPatch.context() as patch:
        alone_path = by_content if path is by_content else on_a_cpu
        alone = play_alone(case, alone_path(patch))
        player = Player(case, path(patch))
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


def check_all(seeds: range, path: Path) -> None:
    """Play many cases, in which everything happens."""
    counts = [check(seed, path).engine.counts for seed in seeds]
    total = sum(counts[1:], counts[0])
    least = len(seeds) // 2
    assert min(total.accepted, total.prefix_hits, total.preemptions) > least
    assert total.drafted - total.accepted > least


def test_tokens_and_counts_are_right_in_any_workload():
    check_all(range(12), by_content)


@pytest.mark.parametrize("path", [on_a_cpu, gathered, by_graphs])
def test_attention_is_right_in_a_random_workload(path):
    check(0, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [by_content, on_a_cpu, gathered, by_graphs])
def test_tokens_and_counts_are_right_in_many_workloads(path):
    check_all(range(1000, 2000 if path is by_content else 1100), path)
