"""Policies: a Hugging Face folder or the embedded model, LoRA, loading and saving.

Trained weights are float32. Training and generation both compute in `ModelConfig.compute_dtype` by
autocast, so both round alike. The model is in decoder.py, the weights for generation in copies.py,
the reading of folders in folders.py, and adapters in adapters.py.
"""

import copy
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from mtsql.choices import require_choices
from mtsql.model import folders
from mtsql.model.adapters import (
    AdapterConfig,
    add_adapters,
    attach_adapter,
    read_adapter,
    require_same,
    saved_name,
)
from mtsql.model.architectures import ARCHITECTURES
from mtsql.model.copies import (
    gather_full,
    generation_weights,
    is_adapted,
    is_sharded,
    make_reference,
    shard_like,
    unwrap,
    without_adapters,
)
from mtsql.model.decoder import CausalLM, from_transformers
from mtsql.model.processor import (
    DTYPES,
    Dtype,
    default_few_rows,
    gpu_capability,
    pick_dtype,
    this_processor,
)
from mtsql.model.tokenizer import require_vocabulary

if TYPE_CHECKING:
    from peft import PeftModel

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
    "resolved",
    "save_policy",
    "shard_like",
    "unwrap",
]

MAX_SHARD_SIZE = "50GB"


@dataclass(frozen=True)
class EmbeddedConfig:
    """Shape of the embedded model (Qwen3 architecture, tied embeddings)."""

    vocab_size: int = 1536
    """Maximum number of tokens in its vocabulary."""
    num_layers: int = 4
    """Number of decoder layers."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_heads: int = 6
    """Number of query heads."""
    num_kv_heads: int = 3
    """Number of key and value heads."""
    head_dim: int = 32
    """Width of a head."""
    intermediate_size: int = 512
    """Width of the gated MLP."""
    max_positions: int = 8192
    """Maximum length of a sequence, in tokens."""

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
    """Folder of a Llama, Qwen2 or Qwen3 model (or of a peft adapter for one) with a ChatML or Llama
    3 chat template, or a .gguf file. null: the embedded model."""
    shape_from: str | None = None
    """Folder of a model with the architecture and the tokenizer that `path` will have. --dry_run
    reads it while `path` does not exist; a run does not. null: none."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """Shape of the embedded model, which is trained from scratch if `model.path` is null."""
    lora: AdapterConfig = AdapterConfig()
    """Adapters instead of full-parameter training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the computation. auto: bfloat16 on GPUs since Ampere, and, if the model is at least
    384 wide, on CPUs with AMX and on AMD's with AVX512-BF16; float32 elsewhere. A run keeps what
    auto meant at its start. Trained weights are always float32; under LoRA the frozen ones have
    this type."""
    few_rows: int | None = None
    """On a CPU, decode matmuls of at most this many rows have the weight as their left operand,
    which is faster on some processors. 0: none. null: by processor and type."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        require_choices(self, "model")
        if self.few_rows is not None and self.few_rows < 0:
            raise ValueError(f"model.few_rows is {self.few_rows}: it must be 0 (none) or more")
        if self.lora.rank and self.path is None:
            raise ValueError(
                "model.lora.rank is set, but the embedded model has no adapters: set model.path"
            )
        if self.path is None:
            self.lora.require_effect()

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype`, with auto resolved for this machine. ValueError as in `policy_shape`."""
        dtype = _auto_dtype(self) if self.dtype == "auto" else self.dtype
        return DTYPES[dtype]

    @property
    def mixed_precision(self) -> str:
        """The same for `Accelerator(mixed_precision=...)`."""
        return "bf16" if self.compute_dtype is torch.bfloat16 else "no"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; an adapter without one uses that of its base model.
    ValueError that names the folder if it is missing or holds none, or the unreadable file."""
    folder, gguf = folders.locate(path)
    if not gguf and not folders.has_tokenizer(folder):
        adapter = read_adapter(folder)
        if adapter is None:
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
    """The shape of the policy, without its weights: the configuration in its folder (or in that of
    its adapter's base model), or `config.embedded`. ValueError as in `load_policy`, as far as the
    configuration shows the fault."""
    if config.path is None:
        return config.embedded
    folder, gguf = folders.locate(config.path)
    adapter = None if gguf else read_adapter(folder)
    return folders.read_model_config(adapter.base if adapter else config.path)


def resolved(config: ModelConfig) -> ModelConfig:
    """The configuration with `dtype` and `few_rows` set to what they mean on this machine.
    ValueError as in `policy_shape`."""
    dtype = _auto_dtype(config) if config.dtype == "auto" else config.dtype
    few_rows = config.few_rows
    if few_rows is None:
        few_rows = 0 if torch.cuda.is_available() else default_few_rows(DTYPES[dtype])
    return replace(config, dtype=dtype, few_rows=few_rows)


def _auto_dtype(config: ModelConfig) -> Dtype:
    return pick_dtype(gpu_capability(), this_processor(), policy_shape(config).hidden_size)


def trains_new_adapters(config: ModelConfig) -> bool:
    """Whether the policy gets new adapters, which add nothing yet. ValueError as in
    `read_adapter`."""
    if not config.lora.rank or config.path is None:
        return False
    return read_adapter(Path(config.path)) is None


def load_policy(config: ModelConfig) -> "CausalLM | PeftModel":
    """The policy, its trained weights in float32; under LoRA peft's wrapper of the model.
    ValueError that names the folder or the file for a model that is missing, damaged or not
    supported."""
    path = config.path
    if path is None:
        raise folders.no_folder(path)
    folder, gguf = folders.locate(path)
    adapter = None if gguf else read_adapter(folder)
    if adapter:
        require_same(config.lora, adapter)
        base = _load_model(adapter.base, config, config.compute_dtype)
        return attach_adapter(base, adapter)
    config.lora.require_effect()
    if not config.lora.rank:
        return _load_model(path, config, torch.float32)
    base = _load_model(path, config, config.compute_dtype)
    return add_adapters(base, config.lora, path)


def _load_model(path: str, config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """The model of a folder that is no adapter, its weights in `dtype`. transformers reads the
    files, because it knows shards, GGUF and the names of older checkpoints."""
    settings = folders.read_model_config(path)
    folder, gguf = folders.locate(path)
    if gguf:
        kind: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    else:
        kind = {"use_safetensors": True}
        folders.require_shapes(settings, folders.weight_files(folder))
    with folders.reading(f"model.path {path}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **gguf,
            **kind,
        )
    theirs, found = loaded  # a pair, because of output_loading_info
    folders.require_all_weights(found, folder)
    model = from_transformers(theirs)
    for name, weight in model.named_parameters():
        folders.require_finite(name, weight, f"model.path {path}")
    model.set_few_rows(config.few_rows)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    return model


def embedded_settings(size: EmbeddedConfig, num_tokens: int) -> Qwen3Config:
    """The embedded model's configuration, for a tokenizer of `num_tokens` tokens."""
    return Qwen3Config(
        vocab_size=num_tokens,
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
        eos_token_id=None,
        pad_token_id=None,
    )


def build_embedded(tokenizer: PreTrainedTokenizerBase, size: EmbeddedConfig, seed: int) -> CausalLM:
    """The embedded model, its weights drawn from `seed` as transformers draws them. The global
    random state is kept."""
    settings = embedded_settings(size, len(tokenizer))
    settings.eos_token_id = tokenizer.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        theirs = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return from_transformers(theirs)


def save_policy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    is_main: bool = True,
    notes: dict[str, dict] | None = None,
) -> None:
    """Write an ordinary Hugging Face (or peft) folder. It is written beside `folder` and then
    renamed, so an interrupted save leaves the older folder intact.

    `notes`: file name -> content of JSON files that the folder also holds. With FSDP2 every rank
    must call this, because all of them take part in gathering the shards; only `is_main` writes.
    """
    model = unwrap(model)
    folder = Path(folder)
    state = _full_state(model, is_main) if is_sharded(model) else model.state_dict()
    if not is_main:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if is_adapted(model):
        # With save_embedding_layers peft would look for the base model's vocabulary on the network.
        model.save_pretrained(str(partial), state_dict=state, save_embedding_layers=False)
    else:
        _write_model(without_adapters(model), state, partial)
    tokenizer.save_pretrained(partial)
    for name, note in (notes or {}).items():
        (partial / name).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _full_state(model: torch.nn.Module, is_main: bool) -> dict[str, torch.Tensor]:
    """Name -> gathered weight, on the CPU of the main rank; nothing on the others. Tied weights are
    gathered once and stay one tensor."""
    sharded = model.state_dict(keep_vars=True)
    gathered: dict[int, torch.Tensor | None] = {}
    for weight in sharded.values():
        if id(weight) not in gathered:
            full = gather_full(weight.detach())
            # FSDP2 pads rows that the ranks do not divide. A copy leaves the padding behind, which
            # a file of weights cannot hold.
            gathered[id(weight)] = full.to("cpu", copy=True) if is_main else None
    by_name = {name: gathered[id(weight)] for name, weight in sharded.items()}
    return {name: full for name, full in by_name.items() if full is not None}


def _write_model(model: CausalLM, state: dict[str, torch.Tensor], folder: Path) -> None:
    """The configurations and the weights as transformers writes them. A tied head is left out."""
    config = copy.deepcopy(model.config)
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.dtype = state["model.norm.weight"].dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if config.tie_word_embeddings:
        state = {name: weight for name, weight in state.items() if name != "lm_head.weight"}
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Set the trainable weights from a folder that `save_policy` wrote for this very model.
    ValueError as in `require_trained`."""
    require_trained(model, folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= folders.read_tensors(file)
    with torch.no_grad():
        for name, weight in unwrap(model).named_parameters():
            if weight.requires_grad:
                weight.copy_(shard_like(tensors[saved_name(name)], weight))


def require_trained(model: torch.nn.Module, folder: Path) -> None:
    """ValueError that names a trainable weight of the model that a folder lacks or has in another
    shape. Only the headers of its files are read."""
    stored = folders.stored_shapes(sorted(folder.glob("*.safetensors")))
    for name, weight in unwrap(model).named_parameters():
        found, shape = stored.get(saved_name(name)), tuple(weight.shape)
        if weight.requires_grad and found != shape:
            what = "missing" if found is None else f"of shape {found}"
            raise ValueError(f"{folder}: {name} is {what}, the model has it as {shape}")
