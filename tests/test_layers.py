"""Norm, rotation and MLP against plain statements of them, in values, gradients and types."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.nn import functional as F

from helpers.models import FAMILIES, SHAPE, transformers_model
from mtsql.model import layers
from mtsql.model.layers import normed_mlp, rms_norm, rotate


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())


def plain_rotation(x: Tensor, angles: Tensor) -> Tensor:
    """As complex numbers: (x[d] + i x[d + D/2]) e^(i angle)."""
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def rotated(query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """query and key (1, heads, T, D), angles (T, D/2)."""
    both_halves = torch.cat((angles, angles), dim=-1)[None]  # (1, T, D)
    return rotate(query, key, both_halves.cos(), both_halves.sin())


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same_with_gradients(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Equal values and gradients; and equal values without gradients, as generation computes."""
    torch.manual_seed(1)
    out = ours(*inputs)
    expected = plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(expected)
    our_gradients = torch.autograd.grad(out, inputs, pull)
    plain_gradients = torch.autograd.grad(expected, inputs, pull)
    for mine, wanted in zip(our_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), out)


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 2, 5, 6)])  # hidden states, and heads
def test_the_norm_equals_its_formula(shape):
    torch.manual_seed(0)
    assert_same_with_gradients(norm, plain_norm, (draw(*shape), draw(6)))


def test_the_rotation_equals_that_of_complex_numbers():
    torch.manual_seed(0)
    angles = torch.randn(5, 4, dtype=torch.float64)
    query = draw(1, 3, 5, 8)
    key = draw(1, 1, 5, 8)

    def plain(x: Tensor) -> Tensor:
        return plain_rotation(x, angles)

    assert_same_with_gradients(lambda x: rotated(x, key, angles)[0], plain, (query,))
    assert_same_with_gradients(lambda x: rotated(query, x, angles)[1], plain, (key,))


class Mlp(nn.Module):
    """A gated MLP. One of its layers may be `adapted`: then it is not a plain linear layer."""

    def __init__(self, dtype: torch.dtype, adapted: str | None = None, bias: bool = False):
        super().__init__()
        for name, shape in (("gate_proj", (6, 8)), ("up_proj", (6, 8)), ("down_proj", (8, 6))):
            layer = nn.Linear(*shape, bias=bias, dtype=dtype)
            if name == adapted:
                layer = nn.Sequential(layer, nn.Tanh())
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NormedMlp(nn.Module):
    """A norm and an MLP, computed plainly."""

    def __init__(self, dtype: torch.dtype, adapted: str | None = None, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(6, eps=1e-5, dtype=dtype)
        self.mlp = Mlp(dtype, adapted, bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.mlp(self.norm(x))

    def by_ours(self, x: Tensor, *_: Tensor) -> Tensor:
        return normed_mlp(x, self.norm, self.mlp)


@pytest.mark.parametrize("adapted", [None, "gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mlp_equals_the_plain_one_with_and_without_adapters(adapted, bias):
    model = NormedMlp(torch.float64, adapted, bias)
    inputs = (draw(1, 5, 6), *model.parameters())
    assert_same_with_gradients(model.by_ours, model, inputs)


@pytest.mark.parametrize(
    "frozen",
    ["norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", ""],
    ids=lambda n: n or "all",
)
def test_frozen_weights_of_the_mlp_get_no_gradient(frozen):
    model = NormedMlp(torch.float64)
    model.get_submodule(frozen).requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert_same_with_gradients(model.by_ours, model, (draw(1, 5, 6), *trained))


def test_the_mlp_keeps_neither_the_norm_nor_the_gated_values_for_backward():
    kept = []
    model = NormedMlp(torch.float64)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.by_ours(draw(1, 5, 6))
    weights = [weight.shape for weight in model.mlp.parameters()]
    #               x          norm  scale      gate       up
    assert kept == [(1, 5, 6), (6,), (1, 5, 1), (1, 5, 8), (1, 5, 8), *weights]


@pytest.mark.parametrize("adapted", [None, "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_have_the_types_of_their_tensors(dtype, adapted):
    """The output has the type that autocast gives to the projections."""
    model = NormedMlp(torch.float32, adapted)
    x = torch.randn(1, 5, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model.by_ours(x)
        expected = model.mlp(plain_norm(x.float(), model.norm.weight))
    assert out.dtype == expected.dtype == torch.bfloat16
    pull = torch.randn_like(expected)
    inputs = (x, *model.parameters())
    our_gradients = torch.autograd.grad(out, inputs, pull)
    plain_gradients = torch.autograd.grad(expected, inputs, pull)
    for mine, wanted in zip(our_gradients, plain_gradients, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=2**-5, atol=2**-5)


def test_a_frozen_norm_still_gives_the_gradient_of_its_input():
    """Adapters freeze the norms."""
    x = draw(1, 3, 4)
    weight = torch.randn(4, dtype=torch.float64)
    assert_same_with_gradients(lambda y: norm(y, weight), lambda y: plain_norm(y, weight), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_rounds_as_transformers_does(family, dtype, weight_dtype):
    """Also where autocast mixes types: fp32 statistics, then the input's type, then the
    weight's."""
    theirs = transformers_model(family).model.norm.to(weight_dtype)
    nn.init.normal_(theirs.weight)
    x = torch.randn(1, 7, SHAPE["hidden_size"]).to(dtype).requires_grad_()
    out = rms_norm(x, theirs.weight, theirs.variance_epsilon)
    expected = theirs(x)
    is_exact = dtype is weight_dtype is torch.float32
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5 if is_exact else 2**-7, atol=1e-6)
    pull = torch.randn_like(expected)
    inputs = (x, theirs.weight)
    our_gradients = torch.autograd.grad(out, inputs, pull)
    their_gradients = torch.autograd.grad(expected, inputs, pull)
    tolerance = 1e-5 if is_exact else 2**-5  # sums of seven or sixteen rounded terms
    for mine, wanted in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_bfloat16_heads_are_rotated_by_float32_angles():
    """Autocast gives these types. The gradient comes back in the type of the heads."""
    torch.manual_seed(0)
    angles = torch.randn(5, 4)
    heads = torch.randn(1, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    out, _ = rotated(heads, heads, angles)
    expected = plain_rotation(heads.float(), angles)
    torch.testing.assert_close(out, expected)
    pull = torch.randn_like(expected)
    (mine,) = torch.autograd.grad(out, heads, pull)
    (wanted,) = torch.autograd.grad(expected, heads, pull)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_the_kernels_that_a_gpu_has_for_the_norm_get_one_type_and_agree(monkeypatch, dtypes):
    """On a CPU torch has the first of them; for the second, its decomposition stands in."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 6).to(dtypes[0]).requires_grad_()
    weight = torch.rand(6).to(dtypes[1]).requires_grad_()
    pull = torch.randn(1, 5, 6)
    expected = rms_norm(x, weight, 1e-5)
    wanted = torch.autograd.grad(expected, (x, weight), pull.to(expected.dtype))
    backward = torch.ops.aten._fused_rms_norm_backward
    decomposed = decomposition_table[backward.default]

    def kernel(grad: Tensor, x: Tensor, shape: Any, scale: Tensor, weight: Tensor, mask: Any):
        assert grad.dtype == x.dtype == weight.dtype == scale.dtype == torch.float32
        return decomposed(grad, x, list(shape), scale, weight, mask)

    monkeypatch.setattr(layers, "_has_kernels", lambda _: True)
    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", kernel)
    out = rms_norm(x, weight, 1e-5)
    found = torch.autograd.grad(out, (x, weight), pull.to(out.dtype))
    bound = 1e-5 if dtypes[0] is torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), out)
