"""Optimizer steps over many micro-batches: the same gradient however the work is cut (design rule 6).

Losses are sums. They are divided once, by a denominator summed over all ranks before the first backward, so any split
over micro-batches, packs or ranks gives the gradient of the whole. Every rank runs the same number of micro-batches, a
rank with fewer (or none) some that teach nothing: sharded weights are gathered by all ranks together in each of them.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import LossConfig, with_gradient
from mtsql.learner.packing import Batch, Sample, pack
from mtsql.model.copies import gather_full
from mtsql.model.policy import reference, shard_like, unwrap


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, then constant or cosine."""

    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6 for RL, 5e-6 for SFT, on 1.7B to 4B models)."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging constants."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    warmup_frac: float = 0.0
    """Share of the updates over which the rate rises from 0."""
    schedule: str = "constant"
    """After the warm-up: constant, or cosine (down to a tenth)."""
    offload: bool = False
    """Keep Adam's averages (8 bytes a parameter) in host memory; in a step they visit the GPU one
    parameter at a time. On a CPU it changes nothing."""

    def __post_init__(self):
        if self.lr <= 0 or self.max_grad_norm <= 0:
            raise ValueError("optim.lr and optim.max_grad_norm must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay is {self.weight_decay}: it must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            found = list(self.betas)
            raise ValueError(f"optim.betas is {found}: both must be at least 0 and below 1")
        if not 0 <= self.warmup_frac <= 1:
            raise ValueError("optim.warmup_frac must be between 0 and 1")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optim.schedule must be constant or cosine, not {self.schedule!r}")


def make_optimizer(module: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only matrices are decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True
    )


def learning_rate(config: OptimConfig, update: int, num_updates: int) -> float:
    """The rate of update `update` (from 0) of `num_updates`."""
    num_warmup = round(config.warmup_frac * num_updates)
    if update < num_warmup:
        return config.lr * (update + 1) / num_warmup
    if config.schedule == "constant":
        return config.lr
    progress = (update - num_warmup) / max(1, num_updates - num_warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()))


def require_seed(seed: int) -> None:
    """ValueError for a seed that torch does not take, or that draws the same as another one."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}: it must be at least 0 and below 2 ** 63")


def seed_update(seed: int, update: int, rank: int) -> None:
    """Set every generator of this process from (seed, update, rank): none has to be saved to repeat
    an update, and no two ranks or updates of a run draw the same numbers (up to 4,096 ranks and a
    million updates)."""
    set_seed(generator_seed(seed, update, rank))


def generator_seed(seed: int, update: int, rank: int) -> int:
    """32 bits, all that NumPy takes and torch's CPU generator uses. A hash of all three would meet
    itself among some ten thousand pairs, so only `seed` is hashed."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") ^ ((update << 12 | rank) & 0xFFFFFFFF)


def with_reference(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    frozen: PreTrainedModel | None,
    samples: list[Sample],
    *,
    temperature: float,
    max_tokens: int,
) -> list[Sample]:
    """The samples with the log-probs of the reference policy: `frozen`, or `policy` without its
    adapters."""
    with reference(policy, frozen) as model, accelerator.autocast():
        scores = _score_in_step(accelerator, PolicyModule(model, temperature), samples, max_tokens)
    return [replace(sample, ref_logprobs=s) for sample, s in zip(samples, scores, strict=True)]


def with_recomputed(
    accelerator: Accelerator,
    module: torch.nn.Module,
    samples: list[Sample],
    loss: LossConfig,
    max_tokens: int,
) -> tuple[list[Sample], float | None]:
    """The samples with the learner's own log-probs as the old ones: the first step's ratio is 1
    whatever the engine rounded. And the mean gap to the engine's over the tokens of all ranks.
    Samples not worth a forward stay as they are; without any other there is no gap."""
    scored = with_gradient(samples, loss)
    scores = _score_in_step(accelerator, module, scored, max_tokens)
    gaps = [
        abs(new - old)
        for sample, score in zip(scored, scores, strict=True)
        for new, old, m in zip(score, sample.old_logprobs, sample.loss_mask, strict=True)
        if m
    ]
    total = sum_over_ranks(accelerator, {"gap": sum(gaps), "n": float(len(gaps))})
    new = {
        id(sample): replace(sample, old_logprobs=score)
        for sample, score in zip(scored, scores, strict=True)
    }
    return [new.get(id(sample), sample) for sample in samples], total["gap"] / total["n"] if total[
        "n"
    ] else None


def _score_in_step(
    accelerator: Accelerator, module, samples: list[Sample], max_tokens: int
) -> list[list[float]]:
    """`score` with as many forwards on every rank: sharded weights are gathered by all together in
    each."""
    num_mine = len(pack(samples, max_tokens))
    num_missing = max(gather_list(accelerator, [num_mine])) - num_mine  # known before anyone starts
    scores = score(module, samples, max_tokens, accelerator.device)
    with torch.no_grad():
        for _ in range(num_missing):
            module(empty_batch().to(accelerator.device))
    return scores


def minibatches(
    accelerator: Accelerator, samples: list[Sample], *, num_passes: int, num_parts: int, seed: str
) -> Iterator[list[Sample]]:
    """This rank's samples of each optimizer step: `num_passes` times all of them, each time cut
    into `num_parts`.

    The groups of all ranks (samples that share a prompt, which is computed once) are dealt out
    whole, shuffled by (seed, pass), so a step holds the same groups however many ranks there are.
    With fewer groups than parts, the last parts are empty.
    """
    group_of = [
        hashlib.blake2b(repr(sample.prompt_ids).encode(), digest_size=8).digest()
        for sample in samples
    ]
    groups = sorted(set(gather_list(accelerator, group_of)))
    for number in range(num_passes):
        order = random.Random(f"{seed}/{number}").sample(groups, len(groups))
        for part in range(num_parts):
            chosen = set(order[part::num_parts])
            yield [
                sample for sample, group in zip(samples, group_of, strict=True) if group in chosen
            ]


def optimizer_tensors(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as "<average>/<parameter>" -> whole tensor, on the main rank; empty on
    the others, which must ask as well where it is sharded."""
    states = getattr(optimizer, "optimizer", optimizer).state
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered = (
        (f"{kind}/{name}", value if kind == "step" else gather_full(on_device(value, p)))
        for name, p in unwrap(module).named_parameters()
        for kind, value in states.get(p, {}).items()
    )
    return {name: value.detach().cpu().contiguous() for name, value in gathered if is_main}


def load_optimizer(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    offload: bool = False,
) -> None:
    """The inverse of `optimizer_tensors`, for any number of ranks. ValueError for tensors of
    another model."""
    states, left = getattr(optimizer, "optimizer", optimizer).state, dict(tensors)
    for name, p in unwrap(module).named_parameters():
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            value = left.pop(f"{kind}/{name}", None)
            if value is None:
                continue
            if kind != "step" and value.shape != p.shape:
                found = tuple(value.shape)
                raise ValueError(
                    f"optimizer.safetensors: {kind}/{name} has shape {found}, not {tuple(p.shape)}"
                )
            if kind == "step":
                value = value.to(p.device)
            else:
                value = shard_like(value, p)
                value = on_host(value) if offload else value
            states[p][kind] = value
    if left:
        raise ValueError(
            f"optimizer.safetensors holds {next(iter(left))}, which this model does not have"
        )


def on_host(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of an average, in (pinned) host memory."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda).copy_(
        local, non_blocking=True
    )


def on_device(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """An average where and as its parameter `p` is: on its device, cut over the ranks like it."""
    if isinstance(value, DTensor) or not isinstance(p, DTensor):
        return value.to(p.device)
    local = value.to(p.to_local().device, non_blocking=True)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def step_offloaded(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` with the averages in host memory: one parameter's at a time are on the
    device. All copies are queued in the device's own order, so none has to be waited for."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = inner.param_groups
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            hosts = {kind: value for kind, value in inner.state[p].items() if kind != "step"}
            inner.state[p].update({kind: on_device(value, p) for kind, value in hosts.items()})
            inner.param_groups = [{**group, "params": [p]}]
            inner.step()
            for kind in [kind for kind in inner.state[p] if kind != "step"]:
                value = inner.state[p][kind]
                local = value.to_local() if isinstance(value, DTensor) else value
                host = (
                    hosts[kind].copy_(local, non_blocking=True) if kind in hosts else on_host(local)
                )
                inner.state[p][kind] = host
    inner.param_groups = groups


def optimizer_step(
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    loss_of: Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict]],
    denominator: float,
    *,
    max_tokens: int,
    config: OptimConfig,
    lr: float,
) -> dict[str, float]:
    """One optimizer step over this rank's `samples`; returns sums over all ranks, plus grad_norm.

    `loss_of(module, batch)` gives a loss sum and a dict of sums; `denominator` is already summed
    over ranks. If no rank has anything to learn, nothing happens (no step by momentum or weight
    decay alone) and the result is empty.
    """
    batches = pack(samples, max_tokens)
    num_batches = max(gather_list(accelerator, [len(batches)]))
    if not num_batches:
        return {}
    for group in optimizer.param_groups:
        group["lr"] = lr
    sums: dict[str, float] = {"num_computed": 0.0, "num_distinct": 0.0, "num_tokens": 0.0}
    for index in range(num_batches):
        # Gradients travel once, after the last micro-batch; shards would have to be kept whole until then.
        with (
            nullcontext()
            if index == num_batches - 1 or accelerator.is_fsdp2
            else accelerator.no_sync(module)
        ):
            if index >= len(batches):
                accelerator.backward(module(empty_batch().to(accelerator.device))[0].sum() * 0.0)
                continue
            batch = batches[index].to(accelerator.device)
            loss_sum, stats = loss_of(module, batch)
            accelerator.backward(loss_sum * accelerator.num_processes / denominator)
        for name, value in {**stats, "loss": loss_sum.detach() / denominator}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        sums["num_computed"] += batch.num_computed
        sums["num_distinct"] += batch.num_distinct
        sums["num_tokens"] += len(batch.targets)
    grad_norm = accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
    step_offloaded(optimizer) if config.offload else optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**sum_over_ranks(accelerator, sums), "grad_norm": float(gather_full(grad_norm))}


def empty_batch() -> Batch:
    """One token, whose log-prob is to be multiplied by zero: the micro-batch of a rank that has
    none left."""
    return pack([Sample(prompt_ids=[0], ids=[0], loss_mask=[1])], 2)[0]


def sum_over_ranks(accelerator: Accelerator, sums: dict[str, float]) -> dict[str, float]:
    """Every rank's dict of floats added up; ranks may hold different keys."""
    if accelerator.num_processes == 1:
        return sums
    gathered: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, sums)
    names = sorted({name for part in gathered for name in part})
    return {name: sum(part.get(name, 0.0) for part in gathered) for name in names}


def gather_list(accelerator: Accelerator, items: list) -> list:
    """All ranks' picklable items in rank order, on every rank."""
    if accelerator.num_processes == 1:
        return items
    gathered: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
