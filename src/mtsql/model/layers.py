"""Norm, rotation and gated MLP of a decoder layer, with gradients written by hand.

Autograd would follow each of these functions through five or six operators and keep what lies
between. The gradients below need less memory and fewer passes over it. The functions take
transformers' roundings: statistics in fp32, results in the type of the input.

Legend: T tokens, W hidden width, D head size.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:  # decoder.py imports this module
    from mtsql.model.decoder import Mlp, Norm

TRANSPOSES_FEW_ROWS = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""On CPUs without AVX-512, MKL multiplies a few rows by a large weight slowly if the weight is the
right operand. CPUs with AVX-512 were not measured."""
MAX_FEW_ROWS = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., inputs), weight (outputs, inputs) -> x weight^T + bias (..., outputs)."""
    if TRANSPOSES_FEW_ROWS and _has_few_rows(x, weight):
        return _linear_of_few_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def _has_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is a matmul of decoding on a CPU: few rows, float32, no gradients."""
    is_float = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not is_float or torch.is_grad_enabled():
        return False
    rows = x.numel() // x.shape[-1]
    return 0 < rows <= min(MAX_FEW_ROWS, weight.numel() >> 15)


def _linear_of_few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The weight is the left operand, and each thread gets a share of its rows. With AVX2 this
    takes a third (4 rows of x) to four fifths (24 rows) of the time of `F.linear`, the copy that
    transposes the result included (LOG.md)."""
    rows = x.numel() // x.shape[-1]
    threads = torch.get_num_threads()
    num_shares = threads if len(weight) % threads == 0 else 1
    shares = weight.reshape(num_shares, -1, weight.shape[1])  # (shares, outputs of each, inputs)
    columns = x.reshape(rows, -1).t().expand(num_shares, -1, -1)  # (shares, inputs, rows)
    out = torch.bmm(shares, columns)  # (shares, outputs of each, rows)
    out = out.view(-1, rows).t().contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., W), weight (W,) -> weight * x / sqrt(mean(x^2) + eps). The mean is taken in fp32 or
    wider."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)
    return _normed(x, weight, eps)[0]


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (1, H, T, D) and key (1, K, T, D) with each pair (x[d], x[d + D/2]) rotated by the
    angle of its position; cos and sin (1, T, D) are those of the angles."""
    rotated = _Rotate.apply if torch.is_grad_enabled() else _rotated
    cos = cos.unsqueeze(1)  # (1, 1, T, D)
    sin = sin.unsqueeze(1)
    return rotated(query, cos, sin), rotated(key, cos, sin)


def normed_mlp(x: torch.Tensor, norm: "Norm", mlp: "Mlp") -> torch.Tensor:
    """mlp(norm(x)) of a gated MLP with SiLU, x (..., W).

    If its three layers are plain (no adapter, no bias), only x, its scale, gate and up are kept
    for backward; the norm and silu(gate) * up are computed again there. That is a quarter of what
    a layer would keep, for less time than can be measured (LOG.md). The weights are then used
    without calling their modules, so a forward hook on one of them would not run.
    """
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if torch.is_grad_enabled() and all(_is_plain(module) for module in linears):
        weights = [module.weight for module in linears]
        return _NormedMlp.apply(x, norm.weight, norm.eps, *weights)
    x = rms_norm(x, norm.weight, norm.eps)
    gate = mlp.gate_proj(x)
    up = mlp.up_proj(x)
    if torch.is_grad_enabled():
        return mlp.down_proj(_Gated.apply(gate, up))
    return mlp.down_proj(F.silu(gate).mul_(up))


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes x weight^T: peft's wrappers are no `nn.Linear` themselves."""
    return isinstance(module, nn.Linear) and module.bias is None


class _RmsNorm(torch.autograd.Function):
    """`rms_norm` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        of_x, of_weight = _norm_gradients(grad, x, weight, scale, needs_x, needs_weight)
        return of_x, of_weight, None


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, and its scale 1 / sqrt(mean(x^2) + eps) (..., 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _weighted(x, weight, scale), scale


def _weighted(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * scale, rounded to the type of x, times the weight."""
    out = (x * scale).to(x.dtype)
    return out.mul_(weight) if weight.dtype == out.dtype else out * weight


def _norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `rms_norm` with respect to x and weight; None where not needed."""
    of_x = None
    of_weight = None
    if needs_x:
        # With g = grad * weight and s = scale: s g - s^3 mean(g x) x
        pull = (grad * weight).to(scale.dtype)
        along = torch.linalg.vecdot(pull, x.to(scale.dtype))[..., None]  # (..., 1)
        along = along.mul_(scale.pow(3)).div_(-x.shape[-1])
        of_x = pull.mul_(scale).addcmul_(x, along).to(x.dtype)
    if needs_weight:
        by_row = _rows(grad * x).to(scale.dtype)  # (rows, W), the scale still to be applied
        of_weight = (scale.flatten() @ by_row).to(weight.dtype)
    return of_x, of_weight


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., W) -> (rows, W)."""
    return x.flatten(0, -2)


class _Rotate(torch.autograd.Function):
    """The rotation of one tensor. Its gradient is rotated by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class _Gated(torch.autograd.Function):
    """silu(gate) * up; only gate and up are kept for backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return _gate_gradients(grad, gate, up, F.silu(gate))


def _gate_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of silu(gate) * up with respect to gate and up. `active` is silu(gate) and is
    overwritten."""
    of_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return of_gate, active.mul_(grad)


class _NormedMlp(torch.autograd.Function):
    """(silu(n gate^T) * (n up^T)) down^T, where n is the norm of x. Under autocast the matmuls are
    computed in its type."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: torch.Tensor, eps: float, *weights: torch.Tensor
    ) -> torch.Tensor:
        gate_weight, up_weight, down_weight = weights
        n, scale = _normed(x, norm, eps)
        gate = F.linear(n, gate_weight)
        up = F.linear(n, up_weight)
        ctx.save_for_backward(x, norm, scale, gate, up, *weights)
        return F.linear(F.silu(gate).mul_(up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, norm, scale, gate, up, *weights = ctx.saved_tensors
        gate_weight, up_weight, down_weight = (weight.to(gate.dtype) for weight in weights)
        needs_x, needs_norm, _, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        of_gate = None
        of_up = None
        of_down = None
        active = F.silu(gate)
        if needs_down:
            of_down = _rows(grad).t() @ _rows(active * up)
            of_down = of_down.to(weights[2].dtype)
        grad_gate, grad_up = _gate_gradients(grad @ down_weight, gate, up, active)
        if needs_gate or needs_up:
            n = _rows(_weighted(x, norm, scale).to(gate.dtype))
            if needs_gate:
                of_gate = (_rows(grad_gate).t() @ n).to(weights[0].dtype)
            if needs_up:
                of_up = (_rows(grad_up).t() @ n).to(weights[1].dtype)
        grad_n = _rows(grad_gate @ gate_weight).addmm_(_rows(grad_up), up_weight).view_as(x)
        of_x, of_norm = _norm_gradients(grad_n, x, norm, scale, needs_x, needs_norm)
        return of_x, of_norm, None, of_gate, of_up, of_down
