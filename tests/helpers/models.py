"""Tiny models: the embedded one as a saved folder, and in float64 ours and transformers' with the
same weights."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mtsql.agent.protocol import TAGS
from mtsql.model.decoder import CausalLM, from_transformers
from mtsql.model.policy import EmbeddedConfig, build_embedded, save_policy
from mtsql.model.tokenizer import train_tokenizer

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], bool]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, False),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, True),
    "llama": (LlamaConfig, LlamaForCausalLM, False),
}
"""Configuration, model, and whether its head is tied to the embedding."""
SHAPE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EMBEDDED = EmbeddedConfig(
    num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)
"""The sizes of the tiny embedded model."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens."""
    return train_tokenizer(["SELECT name FROM singer"], 300, TAGS)


def save_embedded(folder: Path, size: EmbeddedConfig = EMBEDDED) -> Path:
    """Save the tiny embedded model and its tokenizer in `folder`."""
    tokenizer = tiny_tokenizer()
    save_policy(build_embedded(tokenizer, size, seed=1), tokenizer, folder)
    return folder


def tiny_model(family: str) -> CausalLM:
    """Our decoder, with the weights of `transformers_model`."""
    return from_transformers(transformers_model(family))


def transformers_model(family: str) -> PreTrainedModel:
    """The model of transformers, its weights drawn from a fixed seed."""
    config, model, is_tied = FAMILIES[family]
    torch.manual_seed(0)
    return model._from_config(config(**SHAPE, tie_word_embeddings=is_tied), dtype=torch.float64)


def exact_transformers_model(family: str) -> PreTrainedModel:
    """The same with norms that are computed in float64."""
    return with_exact_norms(transformers_model(family))


def with_exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers with torch's norms. transformers computes its norms in float32 even
    in a model of float64, and float32 sums depend on the shape of the batch."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                exact.weight = child.weight
                setattr(parent, name, exact)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Name -> gradient of every trained weight."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
