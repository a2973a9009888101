"""One denominator: two processes with uneven work take the same step as one."""

import random

import pytest
import torch
from accelerate import Accelerator

from mtsql.learner import OptimConfig, learning_rate, make_optimizer, take_step
from mtsql.llm.logprobs import PolicyModule
from mtsql.llm.losses import LossConfig, policy_loss
from mtsql.llm.model import EmbeddedSize, build_embedded
from mtsql.llm.packing import Sample
from mtsql.llm.tokenizer import train_tokenizer

SIZE = EmbeddedSize(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, head_dim=8)


def one_update(share, accelerator=None, offload=False) -> list[float]:
    """Take one GRPO step over `share[rank]` of five samples; the gradient norm, the loss and some updated weights."""
    accelerator = accelerator or Accelerator(cpu=True)
    policy = build_embedded(train_tokenizer(["words"] * 9, SIZE.vocab_size), SIZE, seed=1)
    module = PolicyModule(policy)
    config = OptimConfig(lr=1e-2, offload=offload)
    module, optimizer = accelerator.prepare(module, make_optimizer(module, config))
    rng, samples = random.Random(0), []
    for _ in range(5):
        ids = [rng.randrange(300) for _ in range(rng.randint(2, 9))]
        samples.append(Sample([5, 6, 7], ids, [1] * len(ids), [rng.uniform(-1, 1)] * len(ids), [-5.7] * len(ids)))
    num_tokens = sum(s.num_trained for s in samples)
    mine = [samples[i] for i in share[accelerator.process_index]]
    stats = take_step(accelerator, module, optimizer, mine,
                      lambda m, b: policy_loss(*m(b), b, LossConfig(kl_coef=0)), num_tokens, max_tokens=14,
                      config=config, lr=1e-2)  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return [stats["grad_norm"], stats["loss"], *weights[::500].tolist()]


def test_averages_in_host_memory_change_no_bit():
    assert one_update([range(5)], offload=True) == one_update([range(5)])


def test_schedules_at_their_ends():
    warm = OptimConfig(lr=1.0, warmup_frac=0.1, schedule="cosine")
    assert [learning_rate(warm, u, 20) for u in (0, 1)] == [0.5, 1.0]
    assert learning_rate(warm, 2, 20) == 1.0 and learning_rate(warm, 20, 20) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0), 0, 1) == 1.0
    with pytest.raises(ValueError, match="optim.schedule"):
        OptimConfig(schedule="linear")
