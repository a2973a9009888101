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

from mtsql.model.processor import default_few_rows

if TYPE_CHECKING:  # decoder.py imports this module
    from mtsql.model.decoder import Mlp, Norm


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, few_rows: int | None = None
) -> torch.Tensor:
    """x (..., inputs), weight (outputs, inputs) -> x weight^T + bias (..., outputs).

    `few_rows`: see `ModelConfig`. None: by the processor and the type of the matmul.
    """
    dtype = _decode_dtype(x, weight)
    if dtype is not None:
        limit = default_few_rows(dtype) if few_rows is None else few_rows
        rows = x.numel() // x.shape[-1]
        if 0 < rows <= min(limit, weight.numel() >> 15):  # of small weights only the fewest pay
            return _linear_of_few_rows(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _decode_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The type of a matmul of decoding, which is on a CPU and without gradients. None for others,
    and for other types than float32 and bfloat16."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") if weight.dtype != torch.float64 else None
    has_rule = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype if has_rule else None


def _linear_of_few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (rows, inputs) -> (rows, outputs), with the weight as the left operand. In float32 each
    thread gets a share of the weight's rows. With AVX2 this takes a third (4 rows of x) to four
    fifths (24 rows) of the time of `F.linear`, the copy that transposes the result included
    (LOG.md). In bfloat16 the matmul shares its work itself, and autocast's cache knows the weight
    only as a whole."""
    rows = len(x)
    if weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        threads = torch.get_num_threads()
        num_shares = threads if len(weight) % threads == 0 else 1
        shares = weight.reshape(num_shares, -1, weight.shape[1])  # (shares, outputs, inputs)
        out = torch.bmm(shares, x.t().expand(num_shares, -1, -1))  # (shares, outputs, rows)
        out = out.view(-1, rows)
    else:
        out = weight @ x.t()  # (outputs, rows)
    out = out.t().contiguous()
    return out if bias is None else out.add_(bias)


def cast_for_matmuls(x: torch.Tensor) -> torch.Tensor:
    """x in the type that autocast would cast it to. Several matmuls of the same x then share one
    cast. Without autocast it stays as it is."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
    x = cast_for_matmuls(rms_norm(x, norm.weight, norm.eps))
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


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether torch has a kernel for the norm and one for its gradient, behind `F.rms_norm`. Here
    both are called as they are, because `_NormedMlp` needs the scale. On a CPU the operators of
    this file are faster for many rows (LOG.md)."""
    return x.device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, and its scale 1 / sqrt(mean(x^2) + eps) (..., 1)."""
    if _has_kernels(x):  # they want a single type, and round the result only
        shared = torch.promote_types(x.dtype, weight.dtype)
        norm_kernel = torch.ops.aten._fused_rms_norm
        return norm_kernel(x.to(shared), weight.shape, weight.to(shared), eps)
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
    if _has_kernels(x):
        shared = torch.promote_types(x.dtype, weight.dtype)
        gradient_kernel = torch.ops.aten._fused_rms_norm_backward
        inputs = grad.to(shared), x.to(shared), weight.shape, scale, weight.to(shared)
        of_x, of_weight = gradient_kernel(*inputs, [needs_x, needs_weight])
        return (
            of_x.to(x.dtype) if needs_x else None,
            of_weight.to(weight.dtype) if needs_weight else None,
        )
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
        n = cast_for_matmuls(n)
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
