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


def make_reference(model: torch.nn.Module, dtype: torch.dtype | None = None) -> CausalLM | None:
    """A frozen copy of the policy as it is now. It rounds as the policy does when this computes in
    `dtype` (None: in the type of its weights), so the KL of equal weights is 0; only adapters are
    merged before they are rounded. None if the adapters are fresh: these add nothing yet and can be
    switched off instead, which costs no memory."""
    model = unwrap(model)
    return None if is_adapted(model) and _are_fresh_adapters(model) else _full_copy(model, dtype)


def _are_fresh_adapters(model: torch.nn.Module) -> bool:
    """Whether only LoRA's A and B are trained and every B is 0."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not all(".lora_A." in name or ".lora_B." in name for name in trained):
        return False
    added = [weight for name, weight in trained.items() if ".lora_B." in name]
    do_something = [bool(gather_full(weight).any()) for weight in added]
    return not any(do_something)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Inside the `with`, a policy with adapters computes what its base model computes."""
    adapted = cast("PeftModel", unwrap(model))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with adapted.disable_adapter():
        # peft also marks the adapters as frozen. FSDP2 chooses the type of the gradients in its
        # first forward pass, by the weights that are trained then.
        for p in trained:
            p.requires_grad_(True)
        yield


def shard_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device of `weight` and split over the ranks as it is."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    return tensor


def _full_copy(model: torch.nn.Module, dtype: torch.dtype | None) -> CausalLM:
    """A plain, frozen model with the same function: adapters merged, shards gathered, tied weights
    tied. Each weight has the type in which the policy computes with it (see `_computed_dtype`)."""
    source = without_adapters(model)
    whole = is_adapted(model) or is_sharded(model)
    named = [*source.named_parameters(remove_duplicate=False), *source.named_buffers()]
    tensors = {_plain_name(name): tensor for name, tensor in named}
    adapted = {
        _plain_name(name): module
        for name, module in source.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    with torch.device("meta"):
        copy = CausalLM(source.config)
    copies: dict[int, torch.nn.Parameter] = {}  # id of a weight without an adapter -> its copy
    for path, module in copy.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            weight = tensors[f"{path}.{name}"]
            has_adapter = name == "weight" and path in adapted
            if not has_adapter and id(weight) in copies:
                setattr(module, name, copies[id(weight)])
                continue
            tensor = weight.detach()
            wanted = _computed_dtype(module, tensor, dtype, whole)
            if has_adapter:
                tensor = _merged(adapted[path], tensor)
            tensor = gather_full(tensor.to(wanted, copy=True))
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(module, name, parameter)
            if not has_adapter:
                copies[id(weight)] = parameter
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, gather_full(tensors[f"{path}.{name}"]).clone())
    copy.set_few_rows(source.lm_head.few_rows)
    return copy.eval()


def _computed_dtype(
    module: torch.nn.Module, weight: torch.Tensor, dtype: torch.dtype | None, whole: bool
) -> torch.dtype:
    """The type in which a policy that computes in `dtype` uses this weight. FSDP2 casts all
    weights (`whole`), and under adapters the frozen ones have that type already. Autocast casts the
    linear layers only: embeddings (of which a tied head is a part) and norms stay in float32."""
    is_cast = whole or isinstance(module, torch.nn.Linear)
    return dtype if dtype is not None and is_cast else weight.dtype


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
