"""AdamW: its learning rate, its state on disk, and its averages in host memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from mtsql.choices import require_choices
from mtsql.model.copies import gather_full, shard_like, unwrap

Schedule = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and its learning rate by update."""

    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6 for RL, 5e-6 for SFT, on 1.7B to 4B models)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices. Norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's averages of the gradient and of its square."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    warmup_frac: float = 0.0
    """Fraction of the updates in which the rate rises linearly to its peak (0: no warm-up)."""
    schedule: Schedule = "constant"
    """The rate after the warm-up. linear, cosine: it falls until the last update. wsd
    (warm-up-stable-decay): it is constant and falls at the end, by a cosine."""
    min_lr_frac: float = 0.1
    """The rate that linear, cosine and wsd fall to, as a fraction of the peak. constant does not
    use it."""
    decay_frac: float = 0.2
    """wsd only: fraction of the updates, at the end, in which the rate falls."""
    offload: bool = False
    """Keep Adam's averages (8 bytes a parameter) in host memory. In a step they are copied to the
    GPU one parameter at a time. On a CPU it changes nothing."""

    def __post_init__(self) -> None:
        require_choices(self, "optim")
        if self.lr <= 0 or self.max_grad_norm <= 0:
            raise ValueError("optim.lr and optim.max_grad_norm must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay is {self.weight_decay}: it must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            found = list(self.betas)
            raise ValueError(f"optim.betas is {found}: both must be at least 0 and below 1")
        if not 0 <= self.warmup_frac <= 1:
            raise ValueError("optim.warmup_frac must be between 0 and 1")
        if not 0 <= self.min_lr_frac < 1:
            raise ValueError(
                f"optim.min_lr_frac is {self.min_lr_frac}: it must be at least 0 and below 1"
            )
        if not 0 < self.decay_frac <= 1:
            raise ValueError(
                f"optim.decay_frac is {self.decay_frac}: it must be above 0 and at most 1"
            )


def make_optimizer(module: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Only matrices are decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() >= 2]
    others = [p for p in trainable if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    not_empty = [group for group in groups if group["params"]]
    return torch.optim.AdamW(not_empty, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, update: int, num_updates: int) -> float:
    """The rate of update `update` (from 0) of `num_updates`; further updates keep the rate that it
    ends at. It is never 0.

    It depends on nothing else, so a resumed run needs no state of a schedule.
    """
    update = min(update, num_updates)
    num_warmup = round(config.warmup_frac * num_updates)
    num_decay = min(round(config.decay_frac * num_updates), num_updates - num_warmup)
    factor = _schedule(config.schedule, num_warmup, num_decay, num_updates, config.min_lr_frac)
    # transformers counts finished steps, so its warm-up begins at rate 0. Count the update that is
    # being done, too, while the rate rises.
    return config.lr * factor(max(update, min(update + 1, num_warmup)))


@cache
def _schedule(
    schedule: Schedule, num_warmup: int, num_decay: int, num_updates: int, min_lr_frac: float
) -> Callable[[int], float]:
    """The rate of a step (from 0) as a fraction of the peak, by transformers' `get_scheduler`."""
    from transformers import get_scheduler  # slow to import, and not needed to read flags

    settings: dict[Schedule, tuple[str, dict[str, float]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("polynomial", {"lr_end": min_lr_frac, "power": 1.0}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": min_lr_frac}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": num_decay, "min_lr_ratio": min_lr_frac},
        ),
    }
    name, options = settings[schedule]
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=num_warmup,
        # If all updates are warm-up, `polynomial` would divide by 0.
        num_training_steps=max(num_updates, num_warmup + 1),
        scheduler_specific_kwargs=options,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def optimizer_tensors(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as "<average>/<parameter>" -> full tensor on the main rank.

    It is empty on the other ranks, which must call this too where the state is sharded.
    """
    states = _unwrapped(optimizer).state
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = {}
    for name, p in unwrap(module).named_parameters():
        for kind, value in states.get(p, {}).items():
            if kind != "step":
                value = gather_full(on_device(value, p))
            if is_main:
                tensors[f"{kind}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    offload: bool = False,
) -> None:
    """The inverse of `optimizer_tensors`, for any number of ranks. ValueError for tensors of
    another model."""
    states = _unwrapped(optimizer).state
    left = dict(tensors)
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
    """A copy of this rank's part of an average in (pinned) host memory."""
    local = _local(value)
    host = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    return host.copy_(local, non_blocking=True)


def on_device(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """An average on the device of its parameter `p`, sharded over the ranks as `p` is."""
    if isinstance(value, DTensor) or not isinstance(p, DTensor):
        return value.to(p.device, non_blocking=True)
    local = value.to(p.to_local().device, non_blocking=True)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def step_offloaded(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` with the averages in host memory.

    The averages of one parameter at a time are on the device. All copies are queued in the
    device's own order, so the host waits for none of them.
    """
    inner = _unwrapped(optimizer)
    groups = inner.param_groups
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = inner.state[p]
            hosts = {kind: value for kind, value in state.items() if kind != "step"}
            for kind, value in hosts.items():
                state[kind] = on_device(value, p)
            inner.param_groups = [{**group, "params": [p]}]
            inner.step()
            for kind in [kind for kind in state if kind != "step"]:
                if kind in hosts:
                    local = _local(state[kind])
                    state[kind] = hosts[kind].copy_(local, non_blocking=True)
                else:  # the parameter's first step has made its averages
                    state[kind] = on_host(state[kind])
    inner.param_groups = groups


def count_changes(optimizer: torch.optim.Optimizer) -> None:
    """Have the version of each weight grow, as operators that change a tensor do. Fused AdamW does
    not (torch 2.13), and by the version an engine sees that its cache is of older weights."""
    weights = [p for group in _unwrapped(optimizer).param_groups for p in group["params"]]
    torch.autograd.graph.increment_version([p for p in weights if not isinstance(p, DTensor)])


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value
