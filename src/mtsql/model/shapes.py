"""The published sizes of models that the recipes name, for plans that are made before a model's
folder is there.
"""

import re
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

SHAPES: dict[str, PreTrainedConfig] = {
    name: Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=is_tied,
        max_position_embeddings=40_960,
    )
    for name, width, inner, layers, heads, is_tied in (
        ("qwen3-0.6b", 1024, 3072, 28, 16, True),
        ("qwen3-1.7b", 2048, 6144, 28, 16, True),
        ("qwen3-4b", 2560, 9728, 36, 32, True),
        ("qwen3-8b", 4096, 12_288, 36, 32, False),
    )
} | {
    name: LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    )
    for name, width, layers, heads in (
        ("llama-3.2-1b", 2048, 16, 32),
        ("llama-3.2-3b", 3072, 28, 24),
    )
}
"""Name -> configuration without weights (from the models' own config.json)."""


def shape_named(path: str) -> str | None:
    """The name in `SHAPES` that a model's path contains, such as `models/Qwen3-1.7B`; the longest
    if there are several, None if there is none. Capitals and separators do not matter."""
    text = _letters(Path(path).as_posix())
    found = [name for name in SHAPES if _letters(name) in text]
    return max(found, key=len) if found else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", text.lower())
