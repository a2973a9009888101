"""Policies: any Hugging Face causal LM folder, or the embedded model; LoRA; loading and saving.

Trained weights are float32 and computed with in `ModelConfig.compute_dtype`, by autocast in
training and generation alike, so that both see the same rounding. What generates is in copies.py,
how a folder is read in folders.py, and which adapters are taken in adapters.py.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import logging

from mtsql.model import folders
from mtsql.model.adapters import (
    AdapterConfig,
    add_adapters,
    attach_adapter,
    read_adapter,
    require_same,
    saved_name,
)
from mtsql.model.attention import ATTENTION_NAME, register_attention
from mtsql.model.copies import (
    gather_full,
    generation_weights,
    is_adapted,
    is_sharded,
    make_reference,
    reference,
    shard_like,
    unwrap,
)
from mtsql.model.layers import use_our_layers
from mtsql.model.tokenizer import require_vocabulary

__all__ = [
    "EmbeddedConfig",
    "AdapterConfig",
    "ModelConfig",
    "build_embedded",
    "generation_weights",
    "is_sharded",
    "load_policy",
    "load_tokenizer",
    "load_trained",
    "make_reference",
    "policy_shape",
    "reference",
    "save_policy",
    "shard_like",
    "unwrap",
    "whole",
]


@dataclass(frozen=True)
class EmbeddedConfig:
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
    max_positions: int = 8192
    """Longest sequence in tokens."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"model.embedded.{name} is {value}: it must be at least 1")
        require_vocabulary(self.vocab_size)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.embedded.num_heads is {self.num_heads}: it must be a multiple of "
                f"model.embedded.num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.embedded.head_dim is {self.head_dim}: it must be even, because positions "
                "are rotations of pairs"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which policy is trained."""

    path: str | None = None
    """Folder of a Hugging Face causal LM (or peft adapter) with a ChatML or Llama 3 chat template,
    or a .gguf file. Not set: the embedded model."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """Shape of the embedded model, where there is no path."""
    lora: AdapterConfig = AdapterConfig()
    """Adapters instead of full-parameter training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed with; auto: bfloat16 on a GPU, float32 on a CPU. Trained weights are float32
    either way; under LoRA the frozen ones are kept in this type."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""

    def __post_init__(self):
        if self.lora.rank and self.path is None:
            raise ValueError(
                "model.lora.rank is set, but the embedded model has no adapters: set model.path"
            )
        if self.path is None:
            self.lora.require_effect()

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
    """The tokenizer of a model folder; an adapter without one has that of its base model.
    ValueError naming the folder if it is missing or holds none, or the file that cannot be read."""
    folder, gguf = folders.locate(path)
    if not gguf and not folders.has_tokenizer(folder):
        if (adapter := read_adapter(folder)) is None:
            raise ValueError(f"model.path {path}: no tokenizer in this folder")
        folder, gguf = folders.locate(adapter.base)
        if not gguf and not folders.has_tokenizer(folder):
            raise ValueError(
                f"model.path {path}: no tokenizer in this folder, nor in its base model "
                f"{adapter.base}"
            )
    if not gguf:
        folders.check_tokenizer(folder)
    try:
        with folders.reading(f"model.path {path if gguf else folder / 'tokenizer_config.json'}"):
            return AutoTokenizer.from_pretrained(
                folder, **gguf, trust_remote_code=False, local_files_only=True
            )
    except ValueError:
        folders.blame_tokenizer(folder)
        raise


def policy_shape(config: ModelConfig) -> PreTrainedConfig | EmbeddedConfig:
    """The shape of the policy, without its weights: what its folder (or the base model of its
    adapter) says, or `config.embedded`. ValueError as `load_policy`, for what can be seen so
    early."""
    if config.path is None:
        return config.embedded
    folder, gguf = folders.locate(config.path)
    adapter = None if gguf else read_adapter(folder)
    return folders.read_model_config(adapter.base if adapter else config.path)


def load_policy(config: ModelConfig) -> PreTrainedModel:
    """The policy with our attention, its trained weights in float32, dropout off; a peft model
    under LoRA. ValueError, naming the folder or the file, for what is missing, damaged or cannot be
    trained here."""
    folder, gguf = folders.locate(config.path)
    if adapter := None if gguf else read_adapter(folder):
        require_same(config.lora, adapter)
        return attach_adapter(_load_model(adapter.base, config, config.compute_dtype), adapter)
    config.lora.require_effect()
    if not config.lora.rank:
        return _load_model(config.path, config, torch.float32)
    return add_adapters(
        _load_model(config.path, config, config.compute_dtype), config.lora, config.path
    )


def _load_model(path: str, config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder that is no adapter, its weights in `dtype`."""
    settings = folders.read_model_config(path)
    folder, gguf = folders.locate(path)
    kind = (
        {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    )
    if not gguf:
        folders.require_shapes(settings, folders.weight_files(folder))
    register_attention()
    with folders.reading(f"model.path {path}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **gguf,
            **kind,
        )
    folders.require_all_weights(found, folder)
    for name, weight in model.named_parameters():
        folders.require_finite(name, weight, f"model.path {path}")
    _require_our_attention(model, path)
    use_our_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def build_embedded(
    tokenizer: PreTrainedTokenizerBase, size: EmbeddedConfig, seed: int
) -> PreTrainedModel:
    """The embedded model, its weights drawn from `seed`; the global random state is kept."""
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


def save_policy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    is_main: bool = True,
    notes: dict[str, dict] | None = None,
) -> None:
    """Write an ordinary Hugging Face (or peft) folder, first beside `folder`, then renamed into
    place.

    `notes`: file name -> content of JSON files that the folder also holds. With FSDP2 every rank
    calls this, as gathering the shards takes them all; only `is_main` writes.
    """
    model, folder = unwrap(model), Path(folder)
    state = None
    if is_sharded(model):
        sharded, gathered = model.state_dict(keep_vars=True), {}
        for (
            weight
        ) in sharded.values():  # tied ones once: what is one weight here is one in the folder
            if id(weight) not in gathered:
                full = gather_full(weight.detach())
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
    if is_adapted(
        model
    ):  # peft would look for the base model's vocabulary, on the network if it has to
        model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
    else:
        model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    for name, note in (notes or {}).items():
        (partial / name).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Set the trainable weights from a folder that `save_policy` wrote for this very model.
    ValueError naming the weight that is missing or has another shape."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= folders.read_tensors(file)
    with torch.no_grad():
        for name, weight in unwrap(model).named_parameters():
            if not weight.requires_grad:
                continue
            value = tensors.get(saved_name(name))
            if value is None or value.shape != weight.shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(
                    f"{folder}: {name} is {found}, the model has it as {tuple(weight.shape)}"
                )
            weight.copy_(shard_like(value, weight))


class _Reached(Exception):
    """The probe's attention was called."""


class _Probe:
    def attend(self, *_):
        raise _Reached


def _require_our_attention(model: PreTrainedModel, path: str | None) -> None:
    """Model code that ignores our attention, or loses its context, attends to the wrong tokens."""
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        with folders.reading(f"model.path {path}: {type(model).__name__} cannot be computed here"):
            model(input_ids=zero, position_ids=zero, use_cache=False, attention_context=_Probe())
    except _Reached:
        return
    except ValueError as error:
        if "attention_context" not in str(error):  # or else its code has lost the context
            raise
    raise ValueError(
        f"model.path {path}: {type(model).__name__} bypasses transformers' attention interface"
    )
