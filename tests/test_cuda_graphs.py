"""Decode steps by captured graphs, played by a recorder of operators: the same tokens as without."""

import numpy as np
import pytest
import torch
from flash_double import record, stand_in
from test_engine import FAMILIES, check_dialogues, engine, play, prompts, tiny

from mtsql.engine import cuda_graphs as graphs
from mtsql.engine import engine as engine_module
from mtsql.engine import paged_attention as kvcache


@pytest.fixture
def recorded(monkeypatch):
    """Engines that believe in flash-attn and CUDA graphs; yields the sizes that were captured."""
    stand_in(monkeypatch, kvcache, engine_module)
    monkeypatch.setattr(engine_module, "FLASH_BLOCK", 4)
    sizes = []

    def capture(run):
        replay, hidden = record(run)
        sizes.append(len(hidden))
        return replay, hidden

    monkeypatch.setattr(graphs, "capture", capture)
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_change_no_token(family, recorded):
    model = tiny(family, torch.float64)
    groups, observations = prompts(3, 17, 8), [prompts(5, 1), prompts(9, 2), []]
    played = play(engine(model, temperature=0.7, max_reply_tokens=9), groups, observations)
    check_dialogues(tiny(family, torch.float64, "sdpa"), groups, observations, played, 0.7, 1e-9)
    assert recorded == [4, 2]  # three rows ran as four


def test_ladder_of_sizes(recorded):
    ours = engine(rows=200, blocks=900, batch=400, temperature=0, max_reply_tokens=2)
    played = play(ours, prompts(*[3] * 130), [[]] * 130)
    assert all(len(replies[0].ids) == 2 for replies in played.values())
    assert recorded == [192]  # 130 rows, in steps of 64


def test_without_graphs_nothing_is_captured(recorded):
    ours = engine(max_reply_tokens=3)
    ours.graphs = None  # what `EngineConfig.cuda_graphs` sets
    play(ours, prompts(5), [[]])
    assert recorded == []


def test_replay_sees_no_python(recorded):
    """The recorder itself: a value that Python read is as frozen as in a CUDA graph."""
    x = torch.tensor([1.0, 2.0])
    replay, out = record(lambda: x * float(x[0]) + x)
    assert np.allclose(out, [2, 4])
    x += 1
    replay()
    assert np.allclose(out, [2 * 1 + 2, 3 * 1 + 3])
