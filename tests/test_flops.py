"""Operations of a model as torch counts them, and the peaks of devices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

from helpers.models import FAMILIES, tiny_model, transformers_model
from mtsql.model.flops import FlopMeter, ModelFlops, Work, device_peak, gpu_peak


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matmuls_are_those_that_torch_counts(family):
    """In transformers' decoder, which computes every pair of tokens."""
    model = transformers_model(family)
    model.set_attn_implementation("eager")
    flops = ModelFlops.of_config(model.config)
    work = Work(tokens=5, attended=25, predicted=5)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(5)[None]).logits
    assert counter.get_total_flops() == flops.forward(work)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == flops.training(work) - flops.forward(work)


def test_a_policy_has_the_matmuls_of_its_configuration():
    model = tiny_model("llama")
    assert ModelFlops.of(model) == ModelFlops.of_config(model.config)


def test_frozen_weights_need_one_matmul_less_in_backward():
    config = tiny_model("qwen3").config
    whole, adapted = ModelFlops.of_config(config), ModelFlops.of_config(config, is_adapted=True)
    work = Work(tokens=3, predicted=2)
    assert whole.training(work) == 3 * whole.forward(work)
    assert adapted.training(work) == 2 * whole.forward(work)
    attention = Work(attended=4)
    assert adapted.training(attention) == whole.training(attention) == 3 * whole.forward(attention)


def test_qwen3_4b_has_two_operations_for_each_weight_and_token():
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
    )
    flops = ModelFlops.of_config(config)
    assert flops.per_token == pytest.approx(2 * 3.633e9, rel=1e-3)
    assert flops.per_predicted == pytest.approx(2 * 0.389e9, rel=1e-3)
    assert flops.per_pair == 4 * 32 * 128 * 36


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, peak):
    assert gpu_peak(name) == peak


def test_the_peak_of_a_cpu_is_measured_and_draws_no_random_number():
    state = torch.get_rng_state()
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert peak is not None and 1e8 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    assert device_peak(torch.device("meta"), torch.float32) is None


def test_utilisation_is_a_share_of_the_peak_or_not_known():
    model = ModelFlops(1.0, 1.0, 1.0)
    meter = FlopMeter(model, 200.0)
    assert meter.utilisation(100.0, 2.0) == 0.25
    assert meter.utilisation(0.0, 2.0) is None
    assert FlopMeter(model, None).utilisation(100.0, 2.0) is None
