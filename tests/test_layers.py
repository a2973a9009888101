"""Norm, rotation and gate against plain statements of them, in values, gradients and types."""

import copy

import pytest
import torch
from test_attention import FAMILIES, SHAPE, gradients, in_float64, stock_model, tiny_model
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from mtsql.model import layers
from mtsql.model.attention import PackedContext
from mtsql.model.layers import last_hidden, normed_mlp, rms_norm, rotate, use_our_layers


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
    norm.variance_epsilon = norm.eps
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_uses_them_and_so_does_its_copy(family):
    model = tiny_model(family)
    for ours in (model, copy.deepcopy(model)):
        norms = [m for m in ours.modules() if type(m).__name__.endswith("RMSNorm")]
        assert len(norms) == (9 if family == "qwen3" else 5)
        x = torch.randn(1, 3, SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
        assert type(ours.model.norm(x).grad_fn).__name__ == "_RmsNormBackward"
        for layer in ours.model.layers:
            assert type(layer).__name__ in ours._no_split_modules  # sharding finds it
            assert isinstance(layer, type(stock_model(family).model.layers[0]))
        out = run_layers(ours, torch.arange(5))
        assert type(out.grad_fn.next_functions[0][0]).__name__ == "_RmsNormBackward"
        out.sum().backward()
        assert ours.model.layers[0].mlp.up_proj.weight.grad is not None  # of this copy
        ours.zero_grad()


def run_layers(model, wanted):
    """Of one sequence of five tokens."""
    ids = torch.arange(5)[None]
    context = PackedContext(((0, 2, 2, 5),), torch.device("cpu"))
    return last_hidden(
        model.model,
        wanted,
        input_ids=ids,
        position_ids=ids,
        use_cache=False,
        attention_context=context,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_stops_where_nobody_asks_for_more(family, checkpointing):
    """In order, also twice the same; with the values and gradients of transformers' layers, which
    compute all."""
    wanted, seen = torch.tensor([3, 1, 3]), []
    results = []
    for model in (tiny_model(family), in_float64(stock_model(family))):
        if checkpointing:
            model.train().activation_checkpointing_enable({"use_reentrant": False})
        seen.clear()
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("attention"))
            layer.post_attention_layernorm.register_forward_hook(
                lambda _, __, out: seen.append(out.shape[1])
            )
        model.model.norm.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
        hidden = run_layers(model, wanted)
        forward = list(seen)
        hidden.square().sum().backward()
        results.append((hidden, gradients(model), forward, len(seen) - len(forward)))
    (ours, mine, by_ours, again), (plain, theirs, by_plain, _) = results
    assert by_ours == ["attention", "attention", 3]
    assert by_plain == ["attention", 5, "attention", 5, 5]
    assert again == (2 if checkpointing else 0)  # computed again in backward
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    for name, gradient in mine.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-12)
    assert sum(g is None for g in mine.values()) == sum(g is None for g in theirs.values())


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (7,), (1, 64), (65,)])
@pytest.mark.parametrize("outputs", [4096, 4099])
def test_few_rows_without_gradients_are_multiplied_from_the_other_side(monkeypatch, rows, outputs):
    """Also where the outputs cannot be shared evenly among threads; more rows, gradients and other
    types as ever."""
    model, weight_first = stock_model("qwen2"), []
    monkeypatch.setattr(layers, "TURNS_FEW_ROWS", True)
    model.lm_head = torch.nn.Linear(512, outputs)
    use_our_layers(model)
    plain, product = copy.deepcopy(model.lm_head), torch.bmm
    del plain.forward
    monkeypatch.setattr(torch, "bmm", lambda a, b: weight_first.append(len(a)) or product(a, b))
    x = torch.randn(*rows, 512)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(x), plain(x), rtol=1e-5, atol=1e-5)
        assert model.lm_head(x).is_contiguous()
        threads = torch.get_num_threads() if outputs == 4096 else 1
        assert weight_first == ([] if rows == (65,) else [threads] * 2)
        weight_first.clear()
        assert torch.equal(model.double().lm_head(x.double()), plain.double()(x.double()))
    model.float().lm_head(x).sum().backward()
    assert model.lm_head.weight.grad is not None and not weight_first


def test_another_architecture_stays_as_it_is():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    use_our_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(hasattr(module, "narrows") for module in model.modules())
