"""What the engine may use, and the bytes that its cache takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from mtsql.choices import NumBytes
from mtsql.model.policy import EmbeddedConfig

ModelShape = PreTrainedConfig | EmbeddedConfig
"""The configuration of a model folder, or the sizes of an embedded model that is to be built."""
MAX_ROWS = 1 << 16  # each row has a table with room for all blocks of the cache


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use."""

    max_rows: int = 64
    """Maximum number of trajectories that decode together, per rank."""
    block_size: int | None = None
    """Tokens in a block of the cache. null: 256 with flash-attn, which requires a multiple of that,
    and 32 without."""
    cache_bytes: NumBytes = 1 << 30
    """Bytes of memory for keys and values, per rank; never exceeded."""
    max_scheduled_tokens: int = 1024
    """Tokens computed in a step: one for each decoding row, the rest for prompts and
    observations."""
    cuda_graphs: bool = True
    """Decode by CUDA graphs where flash-attn runs. Elsewhere it has no effect."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "block_size", "cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"engine.{name} is {value}: it must be at least 1")
        if self.max_rows > MAX_ROWS:
            raise ValueError(f"engine.max_rows is {self.max_rows}: it must be at most {MAX_ROWS}")
        if self.max_scheduled_tokens < self.max_rows:
            raise ValueError(
                f"engine.max_scheduled_tokens is {self.max_scheduled_tokens}, less than "
                f"engine.max_rows {self.max_rows}: a step could not give every row its token"
            )


def cache_shape(shape: ModelShape) -> tuple[int, int, int]:
    """Layers, key/value heads and head size."""
    if isinstance(shape, EmbeddedConfig):
        return shape.num_layers, shape.num_kv_heads, shape.head_dim
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return shape.num_hidden_layers, shape.num_key_value_heads, head_dim


def block_bytes(shape: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block of the cache."""
    num_layers, num_kv_heads, head_dim = cache_shape(shape)
    return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize


@contextmanager
def cache_memory(config: EngineConfig) -> Iterator[None]:
    """Turn the system's refusal of memory into a ValueError that names the keys."""
    try:
        yield
    except (OSError, MemoryError, OverflowError, torch.OutOfMemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no memory for engine.cache_bytes {config.cache_bytes} with engine.max_rows "
            f"{config.max_rows}: lower them ({reason})"
        ) from error
