"""Decode steps by captured graphs, replayed by a recorder of operators: the same tokens as
without."""

import pytest
import torch

from helpers.engine import FAMILY, check_dialogues, make_engine, play, prompts, tiny
from helpers.flash_double import record, replace_flash_attn
from mtsql.engine import cuda_graphs


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
    assert captured_sizes == [4, 2]  # three rows ran as four


def test_large_batches_run_at_multiples_of_64(captured_sizes):
    engine = make_engine(rows=200, blocks=900, scheduled=400, temperature=0, max_reply_tokens=2)
    played = play(engine, prompts(3), [[]], num_samples=130)
    assert all(len(completions[0].ids) == 2 for completions in played.values())
    assert captured_sizes == [192]  # 130 rows


def test_nothing_is_captured_when_graphs_are_switched_off(captured_sizes):
    engine = make_engine(max_reply_tokens=3)
    engine.graphs = None  # as EngineConfig.cuda_graphs=False leaves it
    play(engine, prompts(5), [[]])
    assert captured_sizes == []


def test_the_recorder_keeps_values_that_python_has_read():
    """A value that Python read while recording stays as it was, as in a CUDA graph."""
    x = torch.tensor([1.0, 2.0])
    replay, out = record(lambda: x * float(x[0]) + x)
    assert out.tolist() == [2, 4]
    x += 1
    replay()
    assert out.tolist() == [2 * 1 + 2, 3 * 1 + 3]
