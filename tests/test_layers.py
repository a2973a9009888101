"""Norm, rotation and gate against plain statements of them, in values, gradients and types."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from mtsql.llm.layers import gated_down, rms_norm, rotate, use_our_layers
from test_attention import FAMILIES, SHAPE, stock_model, tiny_model


def plain_norm(x, weight, eps=1e-5):
    return weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def plain_turn(x, angles):
    """As complex numbers: (x[d] + i x[d + D/2]) e^(i angle)."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotated(query, key, angles):
    wide = torch.cat((angles, angles), dim=-1)[None]  # (1, T, D)
    return rotate(query, key, wide.cos(), wide.sin())


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def same_with_gradients(ours, plain, inputs):
    torch.manual_seed(1)
    out, expected = ours(*inputs), plain(*inputs)
    pull = torch.randn_like(expected)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(y, inputs, pull) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), out)  # what generation computes


def test_values_and_gradients():
    torch.manual_seed(0)
    same_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), plain_norm, (draw(1, 5, 6), draw(6)))
    same_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), plain_norm, (draw(1, 2, 5, 6), draw(6)))  # of heads
    angles = torch.randn(5, 4, dtype=torch.float64)
    query, key = draw(1, 3, 5, 8), draw(1, 1, 5, 8)
    for which, x in enumerate((query, key)):
        same_with_gradients(
            lambda y, which=which: rotated(*((y, key) if which == 0 else (query, y)), angles)[which],
            lambda y: plain_turn(y, angles), (x,),
        )  # fmt: skip


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_gate_before_a_plain_linear_layer_and_before_any_other_module(is_plain):
    """An adapter around the layer is such another module."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    down = linear if is_plain else torch.nn.Sequential(linear, torch.nn.Tanh())
    inputs = draw(1, 5, 6), draw(1, 5, 6), linear.weight
    same_with_gradients(lambda g, u, _: gated_down(g, u, down), lambda g, u, _: down(F.silu(g) * u), inputs)
    linear.requires_grad_(False)
    same_with_gradients(lambda g, u: gated_down(g, u, down), lambda g, u: down(F.silu(g) * u), inputs[:2])


def test_the_gated_product_is_not_kept_for_backward():
    kept = []
    down = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gated_down(draw(1, 5, 6), draw(1, 5, 6), down)
    assert kept == [(1, 5, 6), (1, 5, 6), down.weight.shape]


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_the_gate_under_autocast(gate_dtype):
    """Computed in the type autocast gives the projections, gradients in the weight's own."""
    torch.manual_seed(0)
    down = torch.nn.Linear(6, 4, bias=False)
    gate, up = (torch.randn(1, 5, 6).to(gate_dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = gated_down(gate, up, down), down(F.silu(gate) * up)
    assert got.dtype == expected.dtype == torch.bfloat16
    inputs, pull = (gate, up, down.weight), torch.randn_like(expected)
    for mine, wanted in zip(*(torch.autograd.grad(y, inputs, pull) for y in (got, expected)), strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=2**-5, atol=2**-5)


def test_frozen_weights_get_no_gradient():
    """Adapters freeze the norms: only the input's gradient is computed, and it is the same."""
    x, weight = draw(1, 3, 4), torch.randn(4, dtype=torch.float64)
    same_with_gradients(lambda y: rms_norm(y, weight, 1e-5), lambda y: plain_norm(y, weight), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_as_transformers_does(family, dtype, weight_dtype):
    """Also where autocast mixes types: fp32 statistics, then the input's type, then the weight's."""
    theirs = stock_model(family).model.norm.to(weight_dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(1, 7, SHAPE["hidden_size"]).to(dtype).requires_grad_()
    got, expected = rms_norm(x, theirs.weight, theirs.variance_epsilon), theirs(x)
    assert got.dtype == expected.dtype
    is_exact = dtype is weight_dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5 if is_exact else 2**-7, atol=1e-6)
    pull = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, (x, theirs.weight), pull) for y in (got, expected)]
    for mine, wanted in zip(*grads, strict=True):  # sums of seven or sixteen rounded terms
        torch.testing.assert_close(mine, wanted, rtol=1e-5 if is_exact else 2**-5, atol=1e-5 if is_exact else 2**-5)


def test_rotation_of_rounded_heads_by_precise_angles():
    """What autocast gives it: bfloat16 heads, float32 angles; the gradient comes back in the heads' type."""
    torch.manual_seed(0)
    angles = torch.randn(5, 4)
    heads = torch.randn(1, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    turned, _ = rotated(heads, heads, angles)
    expected = plain_turn(heads.float(), angles)
    torch.testing.assert_close(turned, expected)
    pull = torch.randn_like(expected)
    mine, wanted = (torch.autograd.grad(y, heads, pull)[0] for y in (turned, expected))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_uses_them_and_so_does_its_copy(family):
    model = tiny_model(family)
    for ours in (model, copy.deepcopy(model)):
        norms = [m for m in ours.modules() if type(m).__name__.endswith("RMSNorm")]
        mlps = [m for m in ours.modules() if type(m).__name__.endswith("MLP")]
        assert len(norms) == (9 if family == "qwen3" else 5) and len(mlps) == 2
        x = torch.randn(1, 3, SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
        assert type(ours.model.norm(x).grad_fn).__name__ == "_RmsNormBackward"
        mlps[0](x).sum().backward()
        assert mlps[0].up_proj.weight.grad is not None  # of this copy
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())


def test_another_architecture_stays_as_it_is():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    use_our_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())
