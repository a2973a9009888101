"""What a decoder layer computes around its attention, with gradients written by hand: transformers' functions, in
fewer passes over memory, with fewer tensors kept for backward and at no more positions than somebody asks for. And its
matrix products of few rows, where a CPU's library is slow in them.

Between its matrix products a layer normalises, rotates and gates. Autograd follows each of these through five or six
operators and keeps what lies between; the gradient needs none of it. `use_our_layers` puts the functions below in place
of transformers', for training and generation alike. Without that call everything runs as before, only slower.

Legend: T tokens, W hidden width, D head width.
"""

import sys
from functools import cache
from types import MethodType

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Model types whose norms, rotations and gated MLPs are exactly these."""
# Without AVX-512, MKL is slow in products of few rows with the weight on the right. What it is with it: not measured.
TURNS_FEW_ROWS = torch.backends.cpu.get_cpu_capability() == "AVX2"


def use_our_layers(model: PreTrainedModel) -> None:
    """Put our norm, rotation and decoder layer into a model; one of another architecture stays as
    it is.

    The rotation is a function of transformers' module, so it changes for every model of that type
    in this process.
    """
    if model.config.model_type not in ARCHITECTURES:
        return
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("DecoderLayer") and model.config.hidden_act == "silu":
            module.__class__ = _our_kind_of(type(module))
        elif type(module) is nn.Linear and TURNS_FEW_ROWS:
            module.forward = MethodType(_linear, module)
    sys.modules[type(model).__module__].apply_rotary_pos_emb = rotate


def last_hidden(decoder: nn.Module, wanted: torch.Tensor, **inputs) -> torch.Tensor:
    """Last hidden states (P, W) of a decoder at the flat positions `wanted` (P,). Our last layer
    computes its MLP for no others; `inputs` are the decoder's, of a batch of one."""
    layers = getattr(decoder, "layers", None)
    if layers is None or not getattr(layers[-1], "narrows", False):
        return decoder(**inputs).last_hidden_state[0, wanted]
    return decoder(**inputs, wanted=wanted).last_hidden_state[0]


@cache
def _our_kind_of(layer: type) -> type:
    """The same layer with our `forward`. A patched object would not be checkpointed, and sharding
    finds layers by the name of their class."""
    ours = {"forward": _layer, "narrows": True, "__module__": layer.__module__}
    return type(layer.__name__, (layer,), ours)


def _layer(layer, hidden_states, wanted=None, **kwargs):
    """(1, T, W) -> (1, T, W), or of the last layer (1, P, W) at the positions `wanted`, if
    given."""
    new, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    x = hidden_states + new
    if (
        wanted is not None
        and layer.self_attn.layer_idx == layer.self_attn.config.num_hidden_layers - 1
    ):
        x = x[:, wanted]
    return x + normed_mlp(x, layer.post_attention_layernorm, layer.mlp)


def _linear(module, x):
    """Few rows without gradients, as in decoding: with the weight on the left, a share of it for
    each thread, such a CPU takes a third (4 rows) to four fifths (24) of the time, the copy that
    turns the result back included (LOG.md)."""
    weight, rows, threads = module.weight, x.numel() // x.shape[-1], torch.get_num_threads()
    is_float = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not is_float or torch.is_grad_enabled() or not 0 < rows <= min(64, weight.numel() >> 15):
        return F.linear(x, weight, module.bias)
    shares = weight.reshape(threads if len(weight) % threads == 0 else 1, -1, weight.shape[1])
    out = torch.bmm(
        shares, x.reshape(rows, -1).t().expand(len(shares), -1, -1)
    )  # (shares, outputs of each, rows)
    out = out.view(-1, rows).t().contiguous().view(*x.shape[:-1], -1)
    return out if module.bias is None else out.add_(module.bias)


def _norm(module, x):
    return rms_norm(x, module.weight, module.variance_epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., W), weight (W,) -> weight * x / sqrt(mean(x^2) + eps); the mean is taken in fp32 or
    wider."""
    return _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]


def rotate(query, key, cos, sin, unsqueeze_dim=1):
    """query, key (1, heads, T, D), cos, sin (1, T, D) -> both with each pair (x[d], x[d + D/2])
    turned by the angle of its position."""
    turn = _Rotate.apply if torch.is_grad_enabled() else _rotated
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turn(query, cos, sin), turn(key, cos, sin)


def normed_mlp(x: torch.Tensor, norm: nn.Module, mlp: nn.Module) -> torch.Tensor:
    """mlp(norm(x)) of a gated MLP with SiLU, x (..., W). For backward plain linear layers keep x,
    the gate and what is gated; norm and product are computed again there: a quarter of what a layer
    would keep, for less time than can be measured (LOG.md). The weights are used then without
    calling their modules: a forward hook on one would not run."""
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if torch.is_grad_enabled() and all(
        type(linear) is nn.Linear and linear.bias is None for linear in linears
    ):
        return _NormedMlp.apply(
            x, norm.weight, norm.variance_epsilon, *(linear.weight for linear in linears)
        )
    x = rms_norm(x, norm.weight, norm.variance_epsilon)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(
        _Gated.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_norm_gradients(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None


def _normed(x, weight, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
    return _weighed(x, weight, scale), scale


def _weighed(x, weight, scale):
    out = (x * scale).to(x.dtype)
    return out.mul_(weight) if weight.dtype == out.dtype else out * weight


def _norm_gradients(grad, x, weight, scale, needs_x, needs_weight):
    """Of the norm of x, times `grad`: by x and by the weight, or None for what is not needed."""
    grad_x, grad_weight = None, None
    if needs_x:
        pull = (grad * weight).to(scale.dtype)
        along = (
            torch.linalg.vecdot(pull, x.to(scale.dtype))[..., None]
            .mul_(scale.pow(3))
            .div_(-x.shape[-1])
        )
        grad_x = pull.mul_(scale).addcmul_(x, along).to(x.dtype)
    if needs_weight:
        by_row = _rows(grad * x).to(scale.dtype)  # (rows, W), each row still to be scaled
        grad_weight = (scale.flatten() @ by_row).to(weight.dtype)
    return grad_x, grad_weight


def _rows(x):
    return x.flatten(0, -2)


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


class _Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return _gate_gradients(grad, gate, up, F.silu(gate))


def _gate_gradients(grad, gate, up, active):
    """Of silu(gate) * up, times `grad`: by gate and by up; `active`, silu(gate), is overwritten."""
    return torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)


class _NormedMlp(torch.autograd.Function):
    """(silu(n gate^T) * (n up^T)) down^T of the norm n of x. Under autocast the products are taken
    in its type."""

    @staticmethod
    def forward(ctx, x, norm, eps, *weights):
        n, scale = _normed(x, norm, eps)
        gate, up = F.linear(n, weights[0]), F.linear(n, weights[1])
        ctx.save_for_backward(x, norm, scale, gate, up, *weights)
        return F.linear(F.silu(gate).mul_(up), weights[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm, scale, gate, up, *weights = ctx.saved_tensors
        by_gate, by_up, by_down = (weight.to(gate.dtype) for weight in weights)
        needs_x, needs_norm, _, *needs = ctx.needs_input_grad
        grad_weights, active = [None] * 3, F.silu(gate)
        if needs[2]:
            grad_weights[2] = _rows(grad).t() @ _rows(active * up)
        pulls = _gate_gradients(
            grad @ by_down, gate, up, active
        )  # by the gate and by what is gated
        n = _rows(_weighed(x, norm, scale).to(gate.dtype)) if any(needs[:2]) else None
        for i in (0, 1):
            if needs[i]:
                grad_weights[i] = _rows(pulls[i]).t() @ n
        grad_n = _rows(pulls[0] @ by_gate).addmm_(_rows(pulls[1]), by_up).view_as(x)
        typed = [
            g if g is None else g.to(weight.dtype)
            for g, weight in zip(grad_weights, weights, strict=True)
        ]
        return *_norm_gradients(grad_n, x, norm, scale, needs_x, needs_norm), None, *typed
