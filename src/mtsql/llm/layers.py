"""What a decoder layer computes element by element, with gradients written by hand: transformers' functions, in fewer
passes over memory and with fewer tensors kept for backward.

Between its matrix products a layer normalises, rotates and gates. Autograd follows each of these through five or six
operators and keeps what lies between; the gradient needs none of it. `use_our_layers` puts the functions below in place
of transformers', for training and generation alike. Without that call everything runs as before, only slower.

Legend: T tokens, W hidden width, D head width.
"""

import sys
from types import MethodType

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Model types whose norms, rotations and gated MLPs are exactly these."""


def use_our_layers(model: PreTrainedModel) -> None:
    """Put our norm, rotation and gate into a model; one of another architecture stays as it is.

    The rotation is a function of transformers' module, so it changes for every model of that type in this process.
    """
    if model.config.model_type not in ARCHITECTURES:
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif type(module).__name__.endswith("MLP") and model.config.hidden_act == "silu":
            module.forward = MethodType(_mlp, module)
    sys.modules[type(model).__module__].apply_rotary_pos_emb = rotate


def _norm(module, x):
    return rms_norm(x, module.weight, module.variance_epsilon)


def _mlp(module, x):
    return gated_down(module.gate_proj(x), module.up_proj(x), module.down_proj)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., W), weight (W,) -> weight * x / sqrt(mean(x^2) + eps); the mean is taken in fp32 or wider."""
    return _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]


def rotate(query, key, cos, sin, unsqueeze_dim=1):
    """query, key (1, heads, T, D), cos, sin (1, T, D) -> both with each pair (x[d], x[d + D/2]) turned by the angle of
    its position."""
    turn = _Rotate.apply if torch.is_grad_enabled() else _rotated
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turn(query, cos, sin), turn(key, cos, sin)


def gated_down(gate: torch.Tensor, up: torch.Tensor, down: nn.Module) -> torch.Tensor:
    """down(silu(gate) * up), gate and up of one shape. Before a plain linear layer the product is not kept for backward
    but computed again there: a fifth of what a layer keeps, for a hundredth of its time (LOG.md). Its weight is
    used then without calling it: a forward hook on it would not run."""
    if not torch.is_grad_enabled():
        return down(F.silu(gate).mul_(up))
    if type(down) is nn.Linear and down.bias is None:
        return _GatedDown.apply(gate, up, down.weight.to(gate.dtype))
    return down(_GatedDown.apply(gate, up, None))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            pull = (grad * weight).to(scale.dtype)
            along = torch.linalg.vecdot(pull, x.to(scale.dtype))[..., None].mul_(scale.pow(3)).div_(-x.shape[-1])
            grad_x = pull.mul_(scale).addcmul_(x, along).to(x.dtype)
        if ctx.needs_input_grad[1]:
            by_row = (grad * x).flatten(0, -2).to(scale.dtype)  # (rows, W), each row still to be scaled
            grad_weight = (scale.flatten() @ by_row).to(weight.dtype)
        return grad_x, grad_weight, None


def _normed(x, weight, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
    out = (x * scale).to(x.dtype)
    return out.mul_(weight) if weight.dtype == out.dtype else out * weight, scale


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x, cos, sin):
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class _GatedDown(torch.autograd.Function):
    """(silu(gate) * up) weight^T, or without a weight silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        gated = F.silu(gate).mul_(up)
        return gated if weight is None else F.linear(gated, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        active, grad_weight = F.silu(gate), None
        if weight is not None:
            if ctx.needs_input_grad[2]:
                grad_weight = grad.flatten(0, -2).t() @ (active * up).flatten(0, -2).to(grad.dtype)
            grad = grad @ weight.to(grad.dtype)
        return torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad), grad_weight
