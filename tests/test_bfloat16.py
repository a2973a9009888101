"""Engine and learner in bfloat16 on a CPU, and in float32, against the same weights in float64."""

import contextlib
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.engine import keys, prompts
from helpers.models import gradients, tiny_tokenizer
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.learner.logprobs import token_logprobs
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packing import Sample, pack
from mtsql.learner.step import Learner
from mtsql.model.copies import generation_weights
from mtsql.model.decoder import CausalLM
from mtsql.model.policy import EmbeddedConfig, build_embedded

SIZE = EmbeddedConfig(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96
)
REPLY = 12
MATMULS = ("mm", "bmm", "addmm", "baddbmm", "addmm_")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
BOUNDS = {torch.float32: (2e-6, 1 - 1e-9), torch.bfloat16: (1e-2, 0.999)}
"""Mean difference of log-probs, and least cosine of a gradient."""


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """A model whose distributions are far from uniform."""
    built = build_embedded(tiny_tokenizer(), SIZE, seed=1)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    return built.eval()


def in_type(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype) if dtype is torch.bfloat16 else contextlib.nullcontext()


def start(model: CausalLM) -> Engine:
    """An engine with two groups of three rows."""
    sampling = SamplingConfig(max_reply_tokens=REPLY, max_trajectory_tokens=REPLY)
    engine = Engine(model, (), sampling, EngineConfig(8, block_size=8, cache_bytes=1 << 22))
    for turn, prompt in enumerate(prompts(13, 20)):
        engine.open_group(prompt, keys(3, turn))
    return engine


def sampled(model: CausalLM, dtype: torch.dtype) -> list[Sample]:
    """What the engine samples in `dtype`, with its log-probs."""
    samples = []
    with generation_weights(model, dtype) as weights:
        engine = start(weights)
        while engine.has_work:
            for done in engine.step():
                prompt = prompts(13, 20)[done.handle // 3]
                mask = [1] * len(done.ids)
                samples.append(Sample(prompt, done.ids, mask, [0.0] * len(mask), done.logprobs))
                engine.close(done.handle)
    return samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_and_learner_agree_with_float64_as_far_as_their_type_rounds(model, dtype):
    (batch,) = pack(sampled(model, dtype), 1000)
    exact = build_embedded(tiny_tokenizer(), SIZE, seed=1)
    exact.load_state_dict(model.state_dict())
    exact.double()
    with in_type(dtype):
        ours, entropy = token_logprobs(model, batch)
    expected, exact_entropy = token_logprobs(exact, batch)
    bound, least_cosine = BOUNDS[dtype]
    expected_values = expected.detach()
    scale = float(expected_values.abs().mean())
    assert ours.dtype == entropy.dtype == torch.float32
    values = ours.detach()
    assert float((values - expected_values).abs().mean()) < bound * scale
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=5 * bound, atol=5 * bound)
    assert float((batch.old_logprobs - expected_values).abs().mean()) < 2 * bound * scale
    gap = float((batch.old_logprobs - values).abs().mean())
    assert (0 if dtype is torch.float32 else 1e-5) <= gap < 2 * bound * scale
    pull = torch.linspace(-1, 1, len(ours))
    (ours * pull).sum().backward()
    (expected * pull.double()).sum().backward()
    wanted = gradients(exact)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        cosine = cosine_similarity(grad.double().flatten(), wanted[name].flatten(), dim=0)
        assert float(cosine) > least_cosine, name
    model.zero_grad()


class Watch(TorchDispatchMode):
    """The types of all matmuls, without those of vectors (a sum over rows in the norm's gradient,
    which is float32), and the shapes of all tensors that are cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls: list[tuple[str, torch.dtype]] = []
        self.casts: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in MATMULS or name.startswith(ATTENTION):
            operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() > 1]
            if all(min(operand.shape[-2:]) > 1 for operand in operands):
                self.matmuls += [(name, operand.dtype) for operand in operands]
        if name == "_to_copy" and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.casts.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_every_matmul_of_learning_is_in_bfloat16_but_the_backward_of_attention(model):
    """The CPU's kernel for that is slow in bfloat16. Each weight is cast once forward, and those of
    the MLP once more backward, because they are not kept."""
    (batch,) = pack(sampled(model, torch.bfloat16), 1000)
    with Watch() as forward, in_type(torch.bfloat16):
        logprobs, _ = token_logprobs(model, batch)
    with Watch() as backward:
        logprobs.sum().backward()
    model.zero_grad()
    assert {dtype for _, dtype in forward.matmuls} == {torch.bfloat16}
    slow = f"{ATTENTION}_backward"
    assert {dtype for name, dtype in backward.matmuls if name != slow} == {torch.bfloat16}
    assert {dtype for name, dtype in backward.matmuls if name == slow} == {torch.float32}
    weights = [tuple(w.shape) for w in model.parameters() if w.dim() == 2]
    of_mlp = {
        (SIZE.intermediate_size, SIZE.hidden_size),
        (SIZE.hidden_size, SIZE.intermediate_size),
    }
    for shape in set(weights):
        num = weights.count(shape)
        assert forward.casts.count(shape) == num, shape
        assert backward.casts.count(shape) == (num if shape in of_mlp else 0), shape


def test_every_matmul_of_decoding_is_in_bfloat16_and_no_weight_is_cast_again(model):
    with generation_weights(model, torch.bfloat16) as weights:
        engine = start(weights)
        for _ in range(3):
            engine.step()
        with Watch() as watch:
            engine.step()
        for handle in list(engine._rows):
            engine.close(handle)
    assert watch.matmuls and {dtype for _, dtype in watch.matmuls} == {torch.bfloat16}
    assert not {tuple(w.shape) for w in model.parameters()} & set(watch.casts)


def test_each_rollout_is_of_the_newest_weights(fresh_accelerate):
    """Autocast keeps the weights that it has cast until the rollout ends, and no longer: else the
    next one would be of the old weights, and the learner's log-probs would differ from its own."""
    policy = build_embedded(tiny_tokenizer(), SIZE, seed=1)
    learner = Learner(
        policy,
        Accelerator(cpu=True, mixed_precision="bf16"),
        OptimConfig(),
        max_batch_tokens=1000,
        loss=LossConfig(kl_coef=0.0),
    )
    for _ in range(3):
        samples = sampled(policy, torch.bfloat16)
        samples = [replace(one, advantages=[n - 2.5] * REPLY) for n, one in enumerate(samples)]
        _, rounding = learner.with_recomputed(samples)
        learner.optimizer_step(samples, 3e-2)
        _, moved = learner.with_recomputed(samples)
        assert rounding < 0.02 and moved > 20 * rounding
