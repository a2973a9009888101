"""Policies: any Hugging Face causal LM folder, or the small embedded model; LoRA; generation; saving.

Trained weights are float32 and computed with in `ModelConfig.compute_dtype`, by autocast in training and
generation alike, so that both see the same rounding. Whatever cannot decode as it stands (adapters, sharded
weights) is gathered into a plain copy once per rollout: decoding needs no collective and the trained weights
are never touched.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config
from transformers.utils import logging

from mtsql.llm.attention import ATTENTION_NAME, register_attention
from mtsql.llm.layers import use_our_layers


@dataclass(frozen=True)
class EmbeddedSize:
    """Shape of the embedded model (Qwen3 architecture, tied embeddings)."""

    vocab_size: int = 1536
    """Most tokens its tokenizer may have."""
    num_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_heads: int = 6
    """Query heads."""
    num_kv_heads: int = 3
    """Key and value heads."""
    head_dim: int = 32
    """Width of a head."""
    intermediate_size: int = 512
    """Width of the gated MLP."""
    max_positions: int = 4096
    """Longest sequence in tokens."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters by peft."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: int = 32
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


@dataclass(frozen=True)
class ModelConfig:
    """Which policy is trained."""

    path: str | None = None
    """Folder of a Hugging Face causal LM (or peft adapter) with a ChatML or Llama 3 chat template, or a .gguf
    file. Not set: the embedded model."""
    embedded: EmbeddedSize = EmbeddedSize()
    """Shape of the embedded model, where there is no path."""
    lora: LoraSettings = LoraSettings()
    """Adapters instead of full-parameter training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed with; auto: bfloat16 on a GPU, float32 on a CPU. Trained weights are float32 either
    way; under LoRA the frozen ones are kept in this type."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""

    def __post_init__(self):
        if self.lora.rank < 0:
            raise ValueError(f"model.lora.rank is {self.lora.rank}: set 0 (off) or more")
        if self.lora.rank and self.path is None:
            raise ValueError("model.lora.rank is set, but the embedded model has no adapters: set model.path")

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype`, with auto resolved for this machine."""
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def mixed_precision(self) -> str:
        """The same for `Accelerator(mixed_precision=...)`."""
        return "bf16" if self.compute_dtype is torch.bfloat16 else "no"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. ValueError naming the folder if it is missing or holds none."""
    folder, gguf = _locate(path)
    known = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not gguf and not any((folder / name).is_file() for name in known):
        raise ValueError(f"model.path {path}: no tokenizer in this folder")
    with _named(path):
        return AutoTokenizer.from_pretrained(folder, **gguf)


def load_policy(config: ModelConfig) -> PreTrainedModel:
    """The policy with our attention, its trained weights in float32, dropout off; a peft model under LoRA.
    ValueError, naming the folder, for what is missing or cannot be trained here."""
    folder, gguf = _locate(config.path)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return _load_adapter(config, adapter)
    with _named(config.path):
        settings = AutoConfig.from_pretrained(folder, **gguf)
    _require_full_attention(settings, config.path)
    register_attention()
    logging.disable_progress_bar()
    dtype = config.compute_dtype if config.lora.rank else torch.float32
    kind = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    with _named(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION_NAME, **gguf, **kind
        )
    _require_our_attention(model, config.path)
    use_our_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return _with_lora(model, config) if config.lora.rank else model


def build_embedded(tokenizer: PreTrainedTokenizerBase, size: EmbeddedSize, seed: int) -> PreTrainedModel:
    """The embedded model with weights drawn from `seed`; the global random state stays as it was."""
    register_attention()
    settings = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            settings, attn_implementation=ATTENTION_NAME, dtype=torch.float32
        )
    use_our_layers(model)
    return model


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), torch.nn.Module):
        model = inner
    return model


@contextmanager
def generation_weights(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32
) -> Iterator[PreTrainedModel]:
    """The model to generate with, in eval mode; inside the `with`, computation is autocast to `dtype` as it
    is in training.

    A model with plain weights is given as it is. Adapters are merged and FSDP2 shards gathered in a plain
    copy that lives as long as the `with` (memory: all weights in `dtype`); every rank of a
    sharded model must enter together.
    """
    model = unwrap(model)
    was_training = model.training
    plain = not _is_lora(model) and not is_sharded(model)
    device = next(model.parameters()).device.type
    with nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype):
        try:
            yield model.eval() if plain else _full_copy(model, dtype)
        finally:
            model.train(was_training)


def make_reference(model: torch.nn.Module) -> PreTrainedModel | None:
    """A frozen copy of the policy as it is now, for `reference`. None where fresh adapters (which add nothing
    yet) can be switched off instead: that costs no memory."""
    model = unwrap(model)
    added = [p for name, p in model.named_parameters() if "lora_B" in name]
    if added and not any([whole(p).any() for p in added]):
        return None
    return _full_copy(model)


@contextmanager
def reference(model: torch.nn.Module, frozen: PreTrainedModel | None) -> Iterator[torch.nn.Module]:
    """The reference policy inside the `with`: `frozen`, or `model` with its adapters off (where it is sharded, a plain
    copy of what the adapters stand on: every rank must enter together)."""
    if frozen is not None:
        yield frozen
    elif is_sharded(unwrap(model)):
        # The layers of a sharded model compute only inside its own forward, and only on all ranks together.
        yield _full_copy(unwrap(model), merge=False)
    else:
        with unwrap(model).disable_adapter():
            yield model


def save_policy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    is_main: bool = True,
    notes: dict[str, dict] | None = None,
) -> None:
    """Write an ordinary Hugging Face (or peft) folder, first beside `folder`, then renamed into place.

    `notes`: file name -> content of JSON files that the folder also holds. With FSDP2 every rank
    calls this, as gathering the shards takes them all; only `is_main` writes.
    """
    model, folder = unwrap(model), Path(folder)
    state = None
    if is_sharded(model):
        sharded, gathered = model.state_dict(keep_vars=True), {}
        for weight in sharded.values():  # tied ones once: what is one weight here is one in the folder
            if id(weight) not in gathered:
                full = whole(weight.detach())
                gathered[id(weight)] = full.cpu() if is_main else None
        state = {name: gathered[id(weight)] for name, weight in sharded.items()}
    if not is_main:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    logging.disable_progress_bar()
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    for name, note in (notes or {}).items():
        (partial / name).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Set the trainable weights from a folder that `save_policy` wrote for this very model. ValueError naming the
    weight that is missing or has another shape."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    with torch.no_grad():
        for name, weight in unwrap(model).named_parameters():
            if not weight.requires_grad:
                continue
            value = tensors.get(name.replace(".default.", "."))
            if value is None or value.shape != weight.shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(f"{folder}: {name} is {found}, the model has it as {tuple(weight.shape)}")
            weight.copy_(shard_like(value, weight))


def shard_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device of `weight` and cut over the ranks as it is."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    return tensor


def _full_copy(
    model: torch.nn.Module, dtype: torch.dtype | None = None, merge: bool = True
) -> PreTrainedModel:
    """A plain, frozen model with the same function: adapters merged (or left out), shards gathered. Cast to `dtype`, as
    FSDP2's mixed precision casts every parameter; under LoRA the frozen weights have that type already."""
    source = model.get_base_model() if _is_lora(model) else model
    tensors = dict([*source.named_parameters(remove_duplicate=False), *source.named_buffers()])
    tensors = {_plain_name(name): tensor.detach() for name, tensor in tensors.items()}
    adapted = {_plain_name(n): m for n, m in source.named_modules() if hasattr(m, "get_delta_weight")}
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(source.config, attn_implementation=ATTENTION_NAME)
    use_our_layers(copy)
    for path, module in copy.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            tensor = tensors[f"{path}.{name}"]
            to = dtype or tensor.dtype
            if merge and name == "weight" and path in adapted:
                delta = adapted[path].get_delta_weight("default").detach()  # (out, in)
                tensor = tensor.to(delta.dtype) + delta
            setattr(module, name, torch.nn.Parameter(whole(tensor.to(to, copy=True)), requires_grad=False))
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, whole(tensors[f"{path}.{name}"]).clone())
    return copy.eval()


def _plain_name(name: str) -> str:
    """A name as in the model that was loaded, without what peft and checkpoint wrappers add to it."""
    return name.replace("base_layer.", "").replace("_checkpoint_wrapped_module.", "")


def _with_lora(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model  # slow to import, and only adapters need it

    targets = list(config.lora.targets)
    linear = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if missing := [target for target in targets if target not in linear]:
        known = ", ".join(sorted(linear))
        raise ValueError(f"model.lora.targets: {config.path} has no layer {missing[0]!r}, only {known}")
    settings = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def _load_adapter(config: ModelConfig, adapter: Path) -> PreTrainedModel:
    """A saved peft folder on its base model, to be trained on or evaluated."""
    from peft import PeftModel  # slow to import, and only adapters need it

    if not (adapter.parent / "adapter_model.safetensors").is_file():
        raise ValueError(f"model.path {config.path}: no adapter_model.safetensors beside {adapter.name}")
    saved = json.loads(adapter.read_text())
    if config.lora.rank not in (0, saved["r"]):
        raise ValueError(f"model.lora.rank is {config.lora.rank}, but {config.path} holds rank {saved['r']}")
    whole = replace(config, path=saved["base_model_name_or_path"], lora=replace(config.lora, rank=0))
    return PeftModel.from_pretrained(
        load_policy(whole).to(config.compute_dtype), adapter.parent, is_trainable=True
    )


def _locate(path: str | None) -> tuple[Path, dict[str, str]]:
    """The folder, and transformers' `gguf_file` argument where the path is a GGUF file."""
    if path is not None and path.endswith(".gguf") and Path(path).is_file():
        return Path(path).parent, {"gguf_file": Path(path).name}
    if path is None or not Path(path).is_dir():
        raise ValueError(f"model.path {path}: no such folder (get one: hf download NAME --local-dir FOLDER)")
    return Path(path), {}


@contextmanager
def _named(path: str | None) -> Iterator[None]:
    """What transformers says of a folder it cannot read, as a one-line error that names the folder."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"model.path {path}: {str(error).strip().splitlines()[0]}") from error


def _require_full_attention(settings: PreTrainedConfig, path: str | None) -> None:
    kinds = getattr(settings, "layer_types", None)
    window = getattr(settings, "sliding_window", None) if kinds is None else None
    if window or any(kind != "full_attention" for kind in kinds or []):
        raise ValueError(f"model.path {path}: sliding-window or linear attention is not supported, only full")
    if getattr(settings, "attn_logit_softcapping", None):
        raise ValueError(f"model.path {path}: soft-capped attention is not supported")


class _Reached(Exception):
    """The probe's attention was called."""


class _Probe:
    def attend(self, *_):
        raise _Reached


def _require_our_attention(model: PreTrainedModel, path: str | None) -> None:
    """Model code that ignores our attention, or loses its context, would attend to the wrong tokens."""
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        model(input_ids=zero, position_ids=zero, use_cache=False, attention_context=_Probe())
    except _Reached:
        return
    raise ValueError(f"model.path {path}: {type(model).__name__} bypasses transformers' attention interface")


def _is_lora(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has cut the weights over the ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards (every rank must ask for it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
