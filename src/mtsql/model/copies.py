"""Plain copies of a policy: to generate with, as a reference, and whole where ranks hold shards.

Whatever cannot decode as it stands (adapters, sharded weights) is gathered into a plain copy once
per rollout: decoding needs no collective and the trained weights are never touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtsql.model.attention import ATTENTION_NAME
from mtsql.model.layers import use_our_layers


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while isinstance(
        inner := getattr(model, "module", getattr(model, "_orig_mod", None)), torch.nn.Module
    ):
        model = inner
    return model


@contextmanager
def generation_weights(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32
) -> Iterator[PreTrainedModel]:
    """The model to generate with, in eval mode; inside the `with`, computation is autocast to
    `dtype` as it is in training.

    A model with plain weights is given as it is. Adapters are merged and FSDP2 shards gathered in a
    plain copy that lives as long as the `with` (memory: all weights in `dtype`); every rank of a
    sharded model must enter together.
    """
    model = unwrap(model)
    was_training = model.training
    plain = not is_adapted(model) and not is_sharded(model)
    device = next(model.parameters()).device.type
    with nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype):
        try:
            yield model.eval() if plain else _full_copy(model, dtype)
        finally:
            model.train(was_training)


def make_reference(model: torch.nn.Module) -> PreTrainedModel | None:
    """A frozen copy of the policy as it is now, for `reference`. None where fresh adapters (which
    add nothing yet) can be switched off instead: that costs no memory."""
    model = unwrap(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    added = [p for name, p in trained.items() if ".lora_B." in name]
    is_only_lora = all(".lora_A." in name or ".lora_B." in name for name in trained)
    if is_adapted(model) and is_only_lora and not any([gather_full(p).any() for p in added]):
        return None
    return _full_copy(model)


@contextmanager
def reference(model: torch.nn.Module, frozen: PreTrainedModel | None) -> Iterator[torch.nn.Module]:
    """The reference policy inside the `with`: `frozen`, or `model` with its adapters off (where it
    is sharded, a plain copy of what the adapters stand on: every rank must enter together)."""
    if frozen is not None:
        yield frozen
    elif is_sharded(unwrap(model)):
        # The layers of a sharded model compute only inside its own forward, and only on all ranks
        # together.
        yield _full_copy(unwrap(model), merge=False)
    else:
        with unwrap(model).disable_adapter():
            yield model


def shard_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device of `weight` and cut over the ranks as it is."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    return tensor


def _full_copy(
    model: torch.nn.Module, dtype: torch.dtype | None = None, merge: bool = True
) -> PreTrainedModel:
    """A plain, frozen model with the same function: adapters merged (or left out), shards gathered.
    Cast to `dtype`, as FSDP2's mixed precision casts every parameter; under LoRA the frozen weights
    have that type already."""
    source = model.get_base_model() if is_adapted(model) else model
    tensors = dict([*source.named_parameters(remove_duplicate=False), *source.named_buffers()])
    tensors = {_plain_name(name): tensor.detach() for name, tensor in tensors.items()}
    adapted = {
        _plain_name(n): m for n, m in source.named_modules() if hasattr(m, "get_delta_weight")
    }
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(source.config, attn_implementation=ATTENTION_NAME)
    use_our_layers(copy)
    for path, module in copy.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            tensor = tensors[f"{path}.{name}"]
            to = dtype or tensor.dtype
            if merge and name == "weight" and path in adapted:
                tensor = _merged(adapted[path], tensor)
            setattr(
                module,
                name,
                torch.nn.Parameter(gather_full(tensor.to(to, copy=True)), requires_grad=False),
            )
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, gather_full(tensors[f"{path}.{name}"]).clone())
    return copy.eval()


def _merged(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) of the layer that peft has put round one of this weight. Under DoRA each
    row has a length that is trained by itself."""
    delta = layer.get_delta_weight("default").detach()  # (out, in)
    merged = weight.to(delta.dtype) + delta
    if "default" in layer.lora_magnitude_vector:
        length = layer.lora_magnitude_vector["default"].weight.detach()  # (out,)
        merged = merged * (length / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def _plain_name(name: str) -> str:
    """A name as in the model that was loaded, without what peft and checkpoint wrappers add."""
    return name.replace("base_layer.", "").replace("_checkpoint_wrapped_module.", "")


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether peft has put adapters round the model."""
    return hasattr(model, "peft_config")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has cut the weights over the ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards (every rank must ask for it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
