"""Decode steps by captured graphs, replayed by a recorder of operators: the same tokens as
without."""

import numpy as np
import pytest
import torch

from helpers.engine import FAMILY, check_dialogues, make_engine, play, prompts, tiny
from helpers.flash_double import record, replace_flash_attn
from mtsql.engine import cuda_graphs
from mtsql.engine.cuda_graphs import DecodeGraphs
from mtsql.engine.paged_attention import step_context


@pytest.fixture
def captured_sizes(monkeypatch) -> list[int]:
    """Engines run with doubles of flash-attn and CUDA graphs; the batch sizes that were captured
    are listed."""
    replace_flash_attn(monkeypatch)
    sizes = []

    def capture(run):
        replay, hidden = record(run)
        sizes.append(len(hidden))
        return replay, hidden

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return sizes


@FAMILY
def test_graphs_change_no_token(family, captured_sizes):
    engine = make_engine(tiny(family, torch.float64), temperature=0.7, max_reply_tokens=9)
    groups = prompts(3, 17, 8)
    observations = [prompts(5, 1), prompts(9, 2), []]
    played = play(engine, groups, observations)
    check_dialogues(tiny(family, torch.float64, "sdpa"), groups, observations, played, 0.7, 1e-9)
    assert captured_sizes[0] == 4  # three rows ran as four


def test_large_batches_run_at_multiples_of_64(captured_sizes):
    engine = make_engine(rows=200, blocks=900, scheduled=400, temperature=0, max_reply_tokens=2)
    played = play(engine, prompts(3), [[]], num_samples=130)
    assert all(len(completions[0].ids) == 2 for completions in played.values())
    assert captured_sizes == [192]  # 130 rows


@torch.no_grad()
def test_rows_with_drafts_run_in_the_same_graphs(captured_sizes):
    """Rows of several tokens, at block edges, in graphs that were captured for other rows."""
    model = tiny(dtype=torch.float64)
    engine = make_engine(model, blocks=40)
    graphs = DecodeGraphs(model.model, engine.pool)
    generator = torch.Generator().manual_seed(0)
    engine.pool.data.copy_(torch.randn(engine.pool.data.shape, generator=generator))
    before = engine.pool.data.clone()
    steps = [([9, 4, 13], [5, 1, 2]), ([8, 5], [4, 1]), ([7, 12, 6, 3], [1, 1, 1, 1])]
    steps += [([16, 1, 2], [4, 1, 2]), ([6], [3])]
    for lengths, num_new in [*steps, *steps]:
        lengths, num_new = np.array(lengths), np.array(num_new)
        tables = np.arange(1, 1 + 4 * len(lengths)).reshape(len(lengths), 4)
        ids = np.random.default_rng(int(lengths.sum())).integers(1, 60, num_new.sum())
        positions = [np.arange(end - n, end) for end, n in zip(lengths, num_new, strict=True)]
        after = []
        for is_captured in (True, False):
            engine.pool.data.copy_(before)
            if is_captured:
                hidden = graphs.run(ids, tables, lengths, num_new).clone()
            else:
                context = step_context(engine.pool, 4, tables, lengths, num_new, [])
                flat = torch.from_numpy(np.concatenate(positions))
                hidden = model.model(torch.from_numpy(ids), flat, context)
            after.append((hidden, engine.pool.data.clone()))
        for by_graph, eager in zip(*after, strict=True):
            torch.testing.assert_close(by_graph, eager, atol=1e-12, rtol=0)
    # With drafts 8 tokens, which hold 5 and 7 too; 4 without drafts; 4 with drafts.
    assert captured_sizes == [8, 4, 4]


def test_nothing_is_captured_when_graphs_are_switched_off(captured_sizes):
    engine = make_engine(max_reply_tokens=3)
    engine.graphs = None  # as EngineConfig.cuda_graphs=False leaves it
    play(engine, prompts(5), [[]])
    assert captured_sizes == []


def test_a_replay_reads_tensors_as_they_are_now():
    x = torch.tensor([1.0, 2.0])
    replay, out = record(lambda: (x + 1) * 3)
    assert out.tolist() == [6, 9]
    x += 1
    replay()
    assert out.tolist() == [9, 12]
