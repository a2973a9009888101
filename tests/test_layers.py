"""Norm, rotation and gate against plain statements of them, in values, gradients and types."""

import pytest
import torch
from helpers.models import FAMILIES, SHAPE, transformers_model
from torch.nn import functional as F

from mtsql.model.layers import normed_mlp, rms_norm, rotate


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
    for got, wanted in zip(
        *(torch.autograd.grad(y, inputs, pull) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), out)  # what generation computes


def test_values_and_gradients():
    torch.manual_seed(0)
    same_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), plain_norm, (draw(1, 5, 6), draw(6)))
    same_with_gradients(
        lambda x, w: rms_norm(x, w, 1e-5), plain_norm, (draw(1, 2, 5, 6), draw(6))
    )  # of heads
    angles = torch.randn(5, 4, dtype=torch.float64)
    query, key = draw(1, 3, 5, 8), draw(1, 1, 5, 8)
    for which, x in enumerate((query, key)):
        same_with_gradients(
            lambda y, which=which: rotated(*((y, key) if which == 0 else (query, y)), angles)[
                which
            ],
            lambda y: plain_turn(y, angles),
            (x,),
        )


class Mlp(torch.nn.Module):
    """A gated MLP; one of its layers may be `adapted`, a module that is no plain linear layer."""

    def __init__(self, dtype, adapted=None, bias=False):
        super().__init__()
        for name, shape in (("gate_proj", (6, 8)), ("up_proj", (6, 8)), ("down_proj", (8, 6))):
            linear = torch.nn.Linear(*shape, bias=bias, dtype=dtype)
            setattr(
                self,
                name,
                torch.nn.Sequential(linear, torch.nn.Tanh()) if name == adapted else linear,
            )

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def drawn_mlp(dtype, **kind):
    """A norm, an MLP and the parameters of both."""
    torch.manual_seed(0)
    norm, mlp = torch.nn.RMSNorm(6, eps=1e-5, dtype=dtype), Mlp(dtype, **kind)
    torch.nn.init.normal_(norm.weight)
    return norm, mlp, [*norm.parameters(), *mlp.parameters()]


@pytest.mark.parametrize("adapted", [None, "gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mlp_of_plain_layers_and_with_any_other_module(adapted, bias):
    norm, mlp, weights = drawn_mlp(torch.float64, adapted=adapted, bias=bias)
    inputs = (draw(1, 5, 6), *weights)
    same_with_gradients(lambda x, *_: normed_mlp(x, norm, mlp), lambda x, *_: mlp(norm(x)), inputs)


@pytest.mark.parametrize("frozen", ["norm", "gate_proj", "up_proj", "down_proj", "all"])
def test_frozen_weights_of_the_mlp_get_no_gradient(frozen):
    norm, mlp, weights = drawn_mlp(torch.float64)
    still = {"norm": norm, "all": torch.nn.ModuleList((norm, mlp))}.get(frozen) or getattr(
        mlp, frozen
    )
    still.requires_grad_(False)
    inputs = (draw(1, 5, 6), *(w for w in weights if w.requires_grad))
    same_with_gradients(lambda x, *_: normed_mlp(x, norm, mlp), lambda x, *_: mlp(norm(x)), inputs)


def test_neither_the_norm_nor_the_product_is_kept_for_backward():
    kept = []
    norm, mlp, weights = drawn_mlp(torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        normed_mlp(draw(1, 5, 6), norm, mlp)
    assert kept == [
        (1, 5, 6),
        (6,),
        (1, 5, 1),
        (1, 5, 8),
        (1, 5, 8),
        *(w.shape for w in weights[1:]),
    ]


@pytest.mark.parametrize("adapted", [None, "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_under_autocast(dtype, adapted):
    """Computed in the type autocast gives the projections, gradients in each tensor's own."""
    norm, mlp, weights = drawn_mlp(torch.float32, adapted=adapted)
    x = torch.randn(1, 5, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = normed_mlp(x, norm, mlp), mlp(plain_norm(x.float(), norm.weight))
    assert got.dtype == expected.dtype == torch.bfloat16
    pull = torch.randn_like(expected)
    for mine, wanted in zip(
        *(torch.autograd.grad(y, (x, *weights), pull) for y in (got, expected)), strict=True
    ):
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
    """Also where autocast mixes types: fp32 statistics, then the input's type, then the
    weight's."""
    theirs = transformers_model(family).model.norm.to(weight_dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(1, 7, SHAPE["hidden_size"]).to(dtype).requires_grad_()
    got, expected = rms_norm(x, theirs.weight, theirs.variance_epsilon), theirs(x)
    assert got.dtype == expected.dtype
    is_exact = dtype is weight_dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5 if is_exact else 2**-7, atol=1e-6)
    pull = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, (x, theirs.weight), pull) for y in (got, expected)]
    for mine, wanted in zip(*grads, strict=True):  # sums of seven or sixteen rounded terms
        torch.testing.assert_close(
            mine, wanted, rtol=1e-5 if is_exact else 2**-5, atol=1e-5 if is_exact else 2**-5
        )


def test_rotation_of_rounded_heads_by_precise_angles():
    """What autocast gives it: bfloat16 heads, float32 angles; the gradient comes back in the heads'
    type."""
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
