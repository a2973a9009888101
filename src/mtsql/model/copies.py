"""Plain copies of a policy: to generate with, and as a reference.

A policy with adapters or sharded weights cannot decode as it is. It is gathered into a plain copy
once per rollout, so decoding needs no collective and the trained weights are never changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from mtsql.model.decoder import CausalLM

if TYPE_CHECKING:
    from peft import PeftModel


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    return unwrap(inner) if isinstance(inner, torch.nn.Module) else model


def without_adapters(model: torch.nn.Module) -> CausalLM:
    """The decoder and its head, of which peft may have wrapped some layers."""
    return cast(CausalLM, model.get_base_model() if is_adapted(model) else model)


@contextmanager
def generation_weights(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32
) -> Iterator[CausalLM]:
    """The model to generate with, in eval mode; inside the `with`, computation is autocast to
    `dtype` as it is in training.

    A model with plain weights is yielded as it is. Adapters are merged and FSDP2 shards gathered in
    a plain copy that lives as long as the `with` (memory: all weights in `dtype`). All ranks of a
    sharded model must enter together.
    """
    model = unwrap(model)
    was_training = model.training
    is_plain = not is_adapted(model) and not is_sharded(model)
    device = next(model.parameters()).device.type
    with nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype):
        try:
            yield without_adapters(model).eval() if is_plain else _full_copy(model, dtype)
        finally:
            model.train(was_training)


def make_reference(model: torch.nn.Module) -> CausalLM | None:
    """A frozen copy of the policy as it is now, for `reference`. None if the adapters are fresh:
    these add nothing yet and can be switched off instead, which costs no memory."""
    model = unwrap(model)
    return None if is_adapted(model) and _are_fresh_adapters(model) else _full_copy(model)


def _are_fresh_adapters(model: torch.nn.Module) -> bool:
    """Whether only LoRA's A and B are trained and every B is 0."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not all(".lora_A." in name or ".lora_B." in name for name in trained):
        return False
    added = [weight for name, weight in trained.items() if ".lora_B." in name]
    do_something = [bool(gather_full(weight).any()) for weight in added]
    return not any(do_something)


@contextmanager
def reference(model: torch.nn.Module, frozen: CausalLM | None) -> Iterator[torch.nn.Module]:
    """The reference policy inside the `with`: `frozen`, or `model` with its adapters off. If it is
    sharded, all ranks must enter together, and it is a plain copy of the base model: the layers of
    a sharded model compute only inside its own forward pass, and only on all ranks together."""
    if frozen is not None:
        yield frozen
    elif is_sharded(unwrap(model)):
        yield _full_copy(unwrap(model), merge=False)
    else:  # without a frozen copy the policy has adapters
        with cast("PeftModel", unwrap(model)).disable_adapter():
            yield model


def shard_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device of `weight` and split over the ranks as it is."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    return tensor


def _full_copy(
    model: torch.nn.Module, dtype: torch.dtype | None = None, merge: bool = True
) -> CausalLM:
    """A plain, frozen model with the same function: adapters merged (or left out), shards gathered.
    Cast to `dtype`, as FSDP2's mixed precision casts every parameter; under LoRA the frozen weights
    have that type already."""
    source = without_adapters(model)
    named = [*source.named_parameters(remove_duplicate=False), *source.named_buffers()]
    tensors = {_plain_name(name): tensor.detach() for name, tensor in named}
    adapted = {
        _plain_name(name): module
        for name, module in source.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    with torch.device("meta"):
        copy = CausalLM(source.config)
    for path, module in copy.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            tensor = tensors[f"{path}.{name}"]
            wanted = dtype or tensor.dtype
            if merge and name == "weight" and path in adapted:
                tensor = _merged(adapted[path], tensor)
            tensor = gather_full(tensor.to(wanted, copy=True))
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, gather_full(tensors[f"{path}.{name}"]).clone())
    copy.set_few_rows(source.lm_head.few_rows)
    return copy.eval()


def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) that computes what this layer of peft computes with its adapter.
    `weight` is the frozen one. DoRA trains the length of each row separately."""
    delta = layer.get_delta_weight("default").detach()  # (out, in)
    merged: torch.Tensor = weight.to(delta.dtype) + delta
    if "default" in layer.lora_magnitude_vector:
        length = layer.lora_magnitude_vector["default"].weight.detach()  # (out,)
        merged = merged * (length / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def _plain_name(name: str) -> str:
    """The name of a weight in the checkpoint: peft puts the layer it wraps under `base_layer`."""
    return name.replace("base_layer.", "")


def is_adapted(model: torch.nn.Module) -> TypeGuard["PeftModel"]:
    """Whether peft has added adapters to the model."""
    return hasattr(model, "peft_config")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has split the weights over the ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards (every rank must ask for it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
