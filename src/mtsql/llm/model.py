"""Policies: any Hugging Face causal LM folder, or the small embedded model; LoRA; weights for generation; saving."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mtsql.llm.attention import ATTENTION_NAME, register_attention


@dataclass(frozen=True)
class EmbeddedSize:
    """Shape of the embedded model (Qwen3 architecture, tied embeddings)."""

    vocab_size: int = 1536
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 3
    intermediate_size: int = 512
    head_dim: int = 32


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters by peft. rank 0: full-parameter training."""

    rank: int = 0
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Which policy is trained."""

    path: str | None = None
    """Folder of a Hugging Face causal LM with a ChatML or Llama 3 chat template. None: the embedded model."""
    embedded: EmbeddedSize = EmbeddedSize()
    """Shape of the embedded model, where there is no path."""
    lora: LoraSettings = LoraSettings()
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. ValueError naming the folder if it is missing or holds none."""
    _require_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"model.path {path}: no tokenizer in this folder ({error})") from error


def load_policy(config: ModelConfig) -> PreTrainedModel:
    """The policy with fp32 master weights and our attention. ValueError for what cannot be trained here, by name."""
    _require_folder(config.path)
    settings = AutoConfig.from_pretrained(config.path)
    if any(kind != "full_attention" for kind in getattr(settings, "layer_types", None) or []):
        raise ValueError(f"model.path {config.path}: sliding-window attention is not supported")
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.lora.rank:
        from peft import LoraConfig, get_peft_model  # heavy to import, needed here only

        model = get_peft_model(
            model,
            LoraConfig(
                r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    return model


def build_embedded(tokenizer: PreTrainedTokenizerBase, size: EmbeddedSize, seed: int) -> PreTrainedModel:
    """The embedded model with weights drawn from `seed`."""
    register_attention()
    settings = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM._from_config(settings, attn_implementation=ATTENTION_NAME, dtype=torch.float32)


@contextmanager
def generation_weights(model: torch.nn.Module) -> Iterator[PreTrainedModel]:
    """The weights to generate with: the model itself, or, under LoRA, the base model with its adapters merged. Base
    weights are put back bit for bit afterwards."""
    was_training = model.training
    model.eval()
    if not hasattr(model, "merge_adapter"):
        try:
            yield model
        finally:
            model.train(was_training)
        return
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    model.merge_adapter()
    try:
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
        model.train(was_training)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face (or peft) folder: first beside `folder`, then renamed into place."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _require_folder(path: str | None) -> None:
    if path is None or not Path(path).is_dir():
        raise ValueError(f"model.path {path}: no such folder")
