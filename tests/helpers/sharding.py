"""Updates of a tiny policy by one rank, on its own or with others."""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from helpers.learning import counted_attention
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import LossConfig, with_gradient
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Sample, pack
from mtsql.learner.step import Learner
from mtsql.model.copies import without_adapters
from mtsql.model.policy import (
    AdapterConfig,
    ModelConfig,
    generation_weights,
    is_sharded,
    load_policy,
    load_tokenizer,
    save_policy,
)
from mtsql.run.seeds import seed_update


def samples_of(update: int) -> list[Sample]:
    """Five random samples of one prompt."""
    rng = random.Random(update)
    samples = []
    for _ in range(5):
        ids = [rng.randrange(280) for _ in range(rng.randint(2, 9))]
        mask = [1] * len(ids)
        advantages = [rng.uniform(-1, 1)] * len(ids)
        old_logprobs = [-5.7] * len(ids)
        samples.append(Sample([5, 6, 7], ids, mask, advantages, old_logprobs))
    return samples


def difference(samples: list[Sample]) -> float:
    """The largest difference between the log-probs of policy and reference."""
    pairs = [zip(s.old_logprobs, s.ref_logprobs, strict=True) for s in samples]
    return max(abs(old - ref) for pair in pairs for old, ref in pair)


def num_gathered(learner: Learner) -> int:
    """The number of weights, of policy and reference, that a rank of a sharded model has whole."""
    modules = [module for module in (learner.policy, learner.frozen) if module is not None]
    weights = [p for module in modules for p in module.parameters()]
    return sum(not isinstance(p, DTensor) for p in weights) if is_sharded(learner.policy) else 0


def play(
    accelerator,
    base,
    save,
    lora=False,
    load=None,
    updates=(0, 1),
    dtype="float32",
    recompute=False,
    offload=False,
):
    """Updates by a loss with a KL term. The last rank has most samples and most to generate. Saves
    the policy and Adam's averages; returns the metrics of the updates, the calls of attention in
    each layer and micro-batch, how far the policy was from its reference before each update, the
    number of weights that scoring has left gathered, and the logits of the weights for
    generation."""
    config = ModelConfig(
        path=base,
        lora=AdapterConfig(rank=4 if lora else 0),
        dtype=dtype,
        gradient_checkpointing=recompute,
    )
    optim = OptimConfig(lr=1e-2, offload=offload)
    rank = accelerator.process_index
    num_ranks = accelerator.num_processes
    seed_update(0, 0, 0)
    policy, tokenizer = load_policy(config), load_tokenizer(base)
    loss = LossConfig(kl_coef=0.1)
    learner = Learner(
        policy, accelerator, optim, max_batch_tokens=14, loss=loss, has_reference=True
    )
    layers = without_adapters(policy).model.layers
    result = {"sharded": is_sharded(policy), "steps": [], "attention_calls": [], "moved": []}
    if load:
        state = load_file(Path(load) / "optimizer.safetensors")
        learner.load_state(Path(load) / "model", state)
    for update in updates:
        samples = samples_of(update)
        mine = (
            samples[:1]
            if accelerator.num_processes > 1 and rank == 0
            else samples[accelerator.num_processes - 1 :]
        )
        scored = learner.with_reference(mine)
        result["gathered"] = num_gathered(learner)
        rescored, _ = learner.with_recomputed(scored)
        result["gathered"] += num_gathered(learner)
        result["moved"].append(difference(rescored))
        num_batches = max(learner.ranks.gather([len(pack(with_gradient(scored, loss), 14))]))
        with counted_attention() as calls:
            stats = learner.optimizer_step(scored, 1e-2)
        result["attention_calls"].append(len(calls) / (num_batches * len(layers)))
        result["steps"].append([stats["loss"], stats["kl"], stats["grad_norm"]])
    ids = torch.arange(9)
    with generation_weights(policy, config.compute_dtype) as weights, torch.no_grad():
        # The last rank decodes long after the others are done: no rank may need another for it.
        for _ in range(100 if rank == num_ranks - 1 else 1):
            context = PackedContext(((0, 3, 3, 9),), torch.device("cpu"))
            logits = weights(ids, ids, context)
        sampled = score(PolicyModule(weights), samples_of(0), 99, accelerator.device)
    result["logits"] = logits[:, :8].tolist()
    save_policy(policy, tokenizer, Path(save) / "model", accelerator.is_main_process)
    averages = learner.state()
    if accelerator.is_main_process:
        save_file(averages, Path(save) / "optimizer.safetensors")
    scored = score(learner.module, samples_of(0), 99, accelerator.device)
    result["gap"] = max(
        abs(a - b) for s, t in zip(scored, sampled, strict=True) for a, b in zip(s, t, strict=True)
    )
    accelerator.free_memory()
    return result
