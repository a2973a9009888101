"""A small random model that stands in for the one that a run will train.

It has the architecture, the tokenizer and the chat template of the real one, and few layers of
little width. No weights are read. A random model hardly ever ends a reply, so the embedding of the
end token is longer than the others: replies then end after some ten tokens.

Legend: V vocabulary, W hidden width.
"""

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from mtsql.files import read_json
from mtsql.model.decoder import CausalLM, from_transformers
from mtsql.model.policy import (
    EmbeddedConfig,
    ModelConfig,
    embedded_settings,
    load_tokenizer,
    policy_shape,
    save_policy,
)
from mtsql.model.rendering import Renderer

MARK = "dry_run.json"
"""The file that says that a folder is that of a dry run."""
NUM_LAYERS, WIDTH, INNER_WIDTH, HEAD_DIM, NUM_KV_HEADS = 2, 32, 64, 16, 2
END_FRAC = 0.1
"""Probability that a token of a reply is its last."""


@dataclass(frozen=True)
class Original:
    """The model that a run will train, without its weights."""

    name: str
    """Its folder, or "the embedded model"."""
    shape: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def folder_of_shape(model: ModelConfig) -> str:
    """The folder whose config.json and tokenizer describe `model.path`: that folder itself or,
    while it does not exist, the one with which the dry run of an earlier stage was made, or
    `model.shape_from`. ValueError that says how to get one."""
    path = model.path
    assert path is not None
    if Path(path).exists():
        return path
    earlier = Path(path).parent
    mark = earlier.with_name(f"{earlier.name}-dry") / MARK
    if mark.is_file():
        shape = read_json(mark).get("shape")
        if isinstance(shape, str) and Path(shape).exists():
            return shape
    if model.shape_from and Path(model.shape_from).exists():
        return model.shape_from
    missing = f"model.path {path}: no such folder"
    if model.shape_from:
        name = Path(model.shape_from).name
        raise ValueError(
            f"{missing}, and model.shape_from {model.shape_from} is not there either (get its "
            f"config.json and tokenizer: hf download .../{name} --exclude '*.safetensors' "
            f"--local-dir {model.shape_from})"
        )
    raise ValueError(
        f"{missing}: if an earlier stage will make it, dry-run that stage first, or name a folder "
        "with the config.json and the tokenizer of its model: --model.shape_from FOLDER"
    )


def original(model: ModelConfig, folder: str) -> Original:
    """The model in a folder, without its weights."""
    shape = policy_shape(replace(model, path=folder))
    assert isinstance(shape, PreTrainedConfig)
    return Original(folder, shape, load_tokenizer(folder))


def embedded_original(size: EmbeddedConfig, tokenizer: PreTrainedTokenizerBase) -> Original:
    """The embedded model."""
    return Original("the embedded model", embedded_settings(size, len(tokenizer)), tokenizer)


def small_shape(shape: PreTrainedConfig, num_tokens: int) -> PreTrainedConfig:
    """The same architecture with few layers of little width, for a tokenizer of `num_tokens`
    tokens. As many queries share a key as before, and the heads divide the width."""
    small = copy.deepcopy(shape)
    queries_per_key: int = shape.num_attention_heads // shape.num_key_value_heads
    small.num_hidden_layers = NUM_LAYERS
    small.intermediate_size = INNER_WIDTH
    small.head_dim = HEAD_DIM
    small.num_key_value_heads = min(NUM_KV_HEADS, shape.num_key_value_heads)
    small.num_attention_heads = queries_per_key * small.num_key_value_heads
    small.hidden_size = math.ceil(WIDTH / small.num_attention_heads) * small.num_attention_heads
    small.vocab_size = num_tokens
    if getattr(shape, "layer_types", None):
        small.layer_types = ["full_attention"] * NUM_LAYERS
    return small


def write_stand_in(original: Original, folder: Path, temperature: float, seed: int) -> None:
    """Save the stand-in of a model in `folder`. `temperature` is that of the sampling."""
    num_tokens = max(original.tokenizer.get_vocab().values()) + 1
    settings = small_shape(original.shape, num_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        theirs = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model = from_transformers(theirs)
    stop_ids = sorted(Renderer(original.tokenizer).stop_ids)
    odds = END_FRAC / (1 - END_FRAC) * num_tokens / len(stop_ids)
    lead = max(temperature, 0.1) * math.log(odds)  # of the end token's logit over the others
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight  # (V, W)
        head = model.lm_head.weight  # (V, W), the same if they are tied
        embedding[:, 0] = 1.0  # so the first entry of the normalised stream is about sqrt(W)
        if head is not embedding:
            head[:, 0] = 0.0
        head[stop_ids, 0] += lead / math.sqrt(settings.hidden_size)
    save_policy(model, original.tokenizer, folder)


def count_parameters(
    shape: PreTrainedConfig, lora_rank: int, lora_targets: tuple[str, ...]
) -> tuple[int, int]:
    """Parameters of a model of this shape, a tied weight once, and how many of them are trained."""
    with torch.device("meta"):
        model = CausalLM(shape)
    num_all = sum(weight.numel() for weight in model.parameters())
    if not lora_rank:
        return num_all, num_all
    adapted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in lora_targets
    ]
    return num_all, sum(lora_rank * (one.in_features + one.out_features) for one in adapted)


def write_mark(folder: Path, shape: str) -> None:
    """Mark a folder as that of a dry run."""
    (folder / MARK).write_text(json.dumps({"shape": shape}) + "\n", encoding="utf-8")
