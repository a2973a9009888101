"""A tiny learner, samples for it, and what its steps return. `share[rank]` says which samples or
groups a rank has."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from mtsql.agent.protocol import TAGS
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner, minibatches
from mtsql.model.policy import EmbeddedConfig, build_embedded
from mtsql.model.tokenizer import train_tokenizer

SIZE = EmbeddedConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    head_dim=8,
)
LR = 1e-2


def make_learner(
    accelerator: Accelerator | None = None, max_batch_tokens: int = 20, offload: bool = False
) -> Learner:
    """A learner of a tiny model, always with the same weights."""
    policy = build_embedded(train_tokenizer(["words"] * 9, SIZE.vocab_size, TAGS), SIZE, seed=1)
    return Learner(
        policy,
        accelerator or Accelerator(cpu=True),
        OptimConfig(lr=LR, offload=offload),
        max_batch_tokens=max_batch_tokens,
        loss=LossConfig(kl_coef=0),
    )


def some_weights(learner: Learner) -> list[float]:
    """Every five hundredth weight."""
    weights = torch.cat([p.detach().flatten() for p in learner.policy.parameters()])
    return weights[::500].tolist()


def sample_of(prompt_ids: list[int], ids: list[int], advantage: float, old: float) -> Sample:
    """A sample whose tokens are all trained, with the same advantage and old log-prob for each."""
    num = len(ids)
    return Sample(prompt_ids, ids, [1] * num, [advantage] * num, [old] * num)


def groups_of(
    num_groups: int = 5, without_advantage: tuple[int, ...] = (), old: float = -5.7
) -> list[list[Sample]]:
    """Groups of two samples; each group has a prompt of its own."""
    rng = random.Random(0)
    groups = []
    for number in range(num_groups):
        group = []
        for low, high in ((0, 1), (-1, 0)):
            advantage = 0.0 if number in without_advantage else rng.uniform(low, high)
            ids = [rng.randrange(250) for _ in range(rng.randint(2, 9))]
            group.append(sample_of([5, 6, number], ids, advantage, old))
        groups.append(group)
    return groups


def several_steps(share: list, accelerator: Accelerator | None = None) -> dict:
    """Two passes of three optimizer steps over five groups, old log-probs recomputed. The second
    group has no advantage."""
    learner = make_learner(accelerator)
    groups = groups_of(without_advantage=(1,))
    samples = [sample for place in share[learner.ranks.index] for sample in groups[place]]
    samples, gap = learner.with_recomputed(samples)
    parts = minibatches(samples, learner.ranks, num_passes=2, num_parts=3, seed="0/7")
    steps = [learner.optimizer_step(part, LR) for part in parts]
    return {"gap": gap, "steps": steps, "weights": some_weights(learner)}


def one_update(
    share: list, accelerator: Accelerator | None = None, offload: bool = False
) -> list[float]:
    """One optimizer step over five samples: the gradient norm, the loss and some of the updated
    weights."""
    learner = make_learner(accelerator, max_batch_tokens=14, offload=offload)
    rng = random.Random(0)
    samples = []
    for _ in range(5):
        ids = [rng.randrange(300) for _ in range(rng.randint(2, 9))]
        samples.append(sample_of([5, 6, 7], ids, rng.uniform(-1, 1), -5.7))
    mine = [samples[place] for place in share[learner.ranks.index]]
    step = learner.optimizer_step(mine, LR)
    return [step["grad_norm"], step["loss"], *some_weights(learner)]


@contextmanager
def counted_attention() -> Iterator[list[int]]:
    """Inside the `with`, each call of the learner's attention adds its layer to the list."""
    calls: list[int] = []
    attend = PackedContext.attend

    def counted(self: PackedContext, layer: int, *tensors: object) -> torch.Tensor:
        calls.append(layer)
        return attend(self, layer, *tensors)

    PackedContext.attend = counted
    try:
        yield calls
    finally:
        PackedContext.attend = attend


class _Casts(TorchDispatchMode):
    """Notes the name of each weight of a model that is cast to another type."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.found.append(self.names[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_casts(model: torch.nn.Module) -> Iterator[list[str]]:
    """Inside the `with`, the name of a weight is added to the list each time it is cast."""
    with _Casts(model) as mode:
        yield mode.found
