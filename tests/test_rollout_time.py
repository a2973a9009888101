"""The time model of benchmarks/rollout_time.py: what it plays and what a step costs."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def model(monkeypatch):
    """The benchmark's module, as running its file would import it."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("rollout_time")


def test_every_trajectory_is_played_and_drafts_make_it_faster(model):
    flags = model.Flags(turns=8, group_size=1, reply_tokens=16, num_databases=1, cache_gib=2)
    plain = model.predict(flags, "qwen3-4b", 2, drafts=False, shared=False)
    drafts = model.predict(flags, "qwen3-4b", 2, drafts=True, shared=False)
    assert drafts["rollout_secs"] < plain["rollout_secs"]
    assert drafts["steps"] < 0.8 * plain["steps"]
    assert drafts["learn_secs"] == plain["learn_secs"]  # the same lengths
    assert plain["prefix_hit_frac"] == 0
    shared = model.predict(flags, "qwen3-4b", 2, drafts=False, shared=True)
    hits = 768 / 1200 * 6 / 8  # whole blocks, and each of two ranks computes them once
    assert shared["prefix_hit_frac"] == pytest.approx(hits, abs=1e-3)


def test_the_costs_of_a_step_are_those_of_its_bytes_and_matmuls(model):
    flags = model.Flags(host_ms=0, host_row_us=0, kernel_us=0, eager_layer_ms=0)
    config = model.Qwen3Config(**model.SHAPES["qwen3-4b"], **model.SHARED)
    costs = model.Costs(flags, config, model.ModelFlops.of_config(config))
    assert costs.weight_bytes == pytest.approx(8.04e9, rel=1e-2)
    assert costs.token_bytes == 147_456
    reading = (costs.weight_bytes + 1000 * costs.token_bytes) / 3.35e12 / 0.75
    assert costs.step(model.Work(), 1000, 1, is_eager=False) == pytest.approx(reading)
    slow = model.Costs(model.Flags(host_ms=0, host_row_us=0), config, costs.flops)
    assert slow.step(model.Work(), 0, 1, is_eager=True) == pytest.approx(36 * 0.55e-3)
    assert costs.gathering(1) == 0 < costs.gathering(8)
