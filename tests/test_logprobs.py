"""Log-probs without full logits: against the textbook, by gradcheck, and what they allocate."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import exact_transformers_model, tiny_model
from mtsql.learner.logprobs import MIN_CHUNK, PolicyModule, head_logprobs, score, token_logprobs
from mtsql.learner.packing import Sample, pack


def head(
    num_positions: int = 7, width: int = 5, vocab: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states (P, W), weight (V, W), bias (V,) and targets (P,)."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, width, generator=draw, dtype=dtype)
    weight = torch.randn(vocab, width, generator=draw, dtype=dtype)
    bias = torch.randn(vocab, generator=draw, dtype=dtype)
    targets = torch.randint(vocab, (num_positions,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def textbook(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy from full logits."""
    logp = ((hidden @ weight.t() + bias) / temperature).log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_those_of_full_logits_for_any_chunk(chunk):
    hidden, weight, bias, targets = head()
    got = head_logprobs(hidden, weight, bias, targets, 0.7, chunk)
    expected = textbook(hidden, weight, bias, targets, 0.7)
    pull = torch.randn(2, len(targets), dtype=torch.float64)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    inputs = (hidden, weight, bias)
    for part in (slice(0, 1), slice(1, 2), slice(0, 2)):  # log-prob alone, entropy alone, both
        pulls = list(pull[part])
        mine = torch.autograd.grad(got[part], inputs, pulls, retain_graph=True)
        wanted = torch.autograd.grad(expected[part], inputs, pulls, retain_graph=True)
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class WithoutGradient(torch.autograd.Function):
    """A later step that returns no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_if_no_gradient_comes_from_above_all_gradients_are_zero():
    hidden, weight, bias, targets = head()
    logprobs, _ = head_logprobs(hidden, weight, bias, targets)
    WithoutGradient.apply(logprobs).sum().backward()
    assert not hidden.grad.any() and not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_the_numerical_ones(has_bias):
    hidden, weight, bias, targets = head()
    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: head_logprobs(h, w, b, targets, temperature=1.3, chunk=3),
        inputs,
        check_undefined_grad=False,
    )


def test_a_frozen_head_gets_no_gradient_and_bfloat16_logits_are_summed_in_fp32():
    hidden, weight, bias, targets = head(dtype=torch.bfloat16)
    weight.requires_grad_(False)
    logprobs, entropy = head_logprobs(hidden, weight, None, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad is None and hidden.grad.dtype == torch.bfloat16


def test_autocast_computes_as_if_its_inputs_were_rounded():
    hidden, weight, _, targets = head(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = head_logprobs(hidden, weight, None, targets)
    logprobs.sum().backward()
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected, _ = head_logprobs(*rounded, None, targets)
    expected.sum().backward()
    assert torch.equal(logprobs, expected)
    assert torch.equal(weight.grad, rounded[1].grad.float()) and weight.grad.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("num_positions", [200, 400])
def test_no_tensor_grows_with_positions_times_vocabulary(num_positions):
    vocab = 151_936
    hidden, weight, _, targets = head(num_positions, 2, vocab, torch.float32)
    with LargestTensor() as largest:
        logprobs, entropy = head_logprobs(hidden, weight, None, targets)
        (logprobs.sum() + entropy.sum()).backward()
    # one chunk of logits, however many positions
    assert largest.numel == MIN_CHUNK * vocab < num_positions * vocab


SAMPLES = [
    Sample([1, 2], [3, 4, 5], [1, 0, 1]),
    Sample([6], [7, 8], [0, 0]),
    Sample([9, 10, 11], [12, 13, 14, 15], [0, 1, 1, 1]),
    Sample([1, 2], [16], [1]),
]


@pytest.mark.parametrize("max_tokens", [100, 7])
def test_score_returns_each_sample_its_own(max_tokens):
    """In the order given, 0 where the mask is 0, for any packing and at the module's
    temperature."""
    module = PolicyModule(tiny_model("qwen3"), temperature=0.5)
    theirs = exact_transformers_model("qwen3")
    scores = score(module, SAMPLES, max_tokens, torch.device("cpu"))
    assert [len(s) for s in scores] == [3, 2, 4, 1]
    assert scores[1] == [0.0, 0.0]
    assert scores[2][0] == 0.0
    for sample, mine in zip(SAMPLES, scores, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logp = (theirs(input_ids=ids, use_cache=False).logits[0] / 0.5).log_softmax(-1)
        for i, is_trained in enumerate(sample.loss_mask):
            if is_trained:
                expected = logp[len(sample.prompt_ids) + i - 1, sample.ids[i]].item()
                assert mine[i] == pytest.approx(expected, abs=1e-12)


def test_a_tied_head_sends_its_gradient_to_the_embedding():
    model = tiny_model("qwen3")
    [batch] = pack(SAMPLES[:1], 10)
    token_logprobs(model, batch)[0].sum().backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    by_token = model.model.embed_tokens.weight.grad.abs().sum(1)
    assert (by_token > 0).all()  # the softmax reaches every row


def test_an_adapted_head_is_refused_by_name():
    [batch] = pack(SAMPLES[:1], 10)
    model = tiny_model("qwen3")
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="output head is a Identity"):
        token_logprobs(model, batch)


def test_a_model_under_bfloat16_autocast_stays_close_to_float32():
    model = tiny_model("llama").float()
    [batch] = pack(SAMPLES, 100)
    exact, _ = token_logprobs(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, entropy = token_logprobs(model, batch)
    assert rounded.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    rounded.sum().backward()
    for weight in model.parameters():
        assert weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()
