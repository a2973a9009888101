"""What the engine may use, and the bytes that its cache takes."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from mtsql.choices import NumBytes
from mtsql.engine.paged_attention import uses_flash
from mtsql.model.attention_path import FLASH_BLOCK, PLAIN_BLOCK, main_device
from mtsql.model.policy import EmbeddedConfig
from mtsql.model.sizes import BUDGETS

ModelShape = PreTrainedConfig | EmbeddedConfig
"""The configuration of a model folder, or the sizes of an embedded model that is to be built."""
CostTable = tuple[tuple[int, float], ...]
"""(tokens, milliseconds of a step that computes so many), by growing tokens."""
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
    """Tokens computed in a step: one for each decoding row, the rest for prompts and observations,
    then for drafts."""
    max_draft: int = 8
    """Maximum number of drafted tokens of a row in a step. 0: no drafts. The tokens are the same
    with drafts and without, up to rounding; only the time differs."""
    step_costs: CostTable | None = None
    """What a step costs by its number of tokens, as [tokens, milliseconds] pairs: it decides how
    much is drafted. `mtsql measure` prints them. null: an estimate from the model's shape."""
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
        if self.max_draft < 0:
            raise ValueError(f"engine.max_draft is {self.max_draft}: it must be 0 (off) or more")
        if self.step_costs is not None:
            _check_costs(self.step_costs)


def _check_costs(table: CostTable) -> None:
    tokens = [num for num, _ in table]
    costs = [cost for _, cost in table]
    if not tokens or tokens[0] < 1 or sorted(set(tokens)) != tokens:
        raise ValueError(
            f"engine.step_costs has the tokens {tokens}: they must be at least 1 and grow"
        )
    if costs[0] <= 0 or sorted(costs) != costs:
        raise ValueError(
            f"engine.step_costs has the costs {costs}: they must be above 0 and not decrease"
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


def resolved_block_size(limits: EngineConfig, use_flash: bool) -> int:
    """Tokens in a block of the cache: what `limits` says, or what suits the attention.

    ValueError if flash-attn, which reads the blocks if `use_flash`, cannot read this size.
    """
    if limits.block_size is None:
        return FLASH_BLOCK if use_flash else PLAIN_BLOCK
    if use_flash and limits.block_size % FLASH_BLOCK:
        raise ValueError(
            f"engine.block_size is {limits.block_size}: flash-attn requires a multiple of "
            f"{FLASH_BLOCK}"
        )
    return limits.block_size


def check_engine(
    limits: EngineConfig, shape: ModelShape, max_tokens: int, dtype: torch.dtype
) -> None:
    """Check, before any weights are loaded, that a model can be run with these limits.

    ValueError that names the key of `engine` if a prompt with its trajectory, `max_tokens`
    together, does not fit in the cache, or if this machine has no memory for the cache (checked
    only without a GPU). `dtype` is that of keys and values, `ModelConfig.compute_dtype`.
    """
    block_size = resolved_block_size(limits, uses_flash(main_device(), dtype))
    # A prompt that ends inside a block keeps it for itself, so there may be one block more.
    num_blocks = -(-max_tokens // block_size) + 1
    needed = num_blocks * block_bytes(shape, block_size, dtype)
    if limits.cache_bytes < needed:
        raise ValueError(
            f"engine.cache_bytes is {limits.cache_bytes}, but one prompt with its trajectory "
            f"({BUDGETS}: {max_tokens} tokens, in blocks of engine.block_size {block_size}) "
            f"needs {needed} bytes: raise it"
        )
    if not torch.cuda.is_available():
        with cache_memory(limits):
            mmap.mmap(-1, limits.cache_bytes).close()  # only reserved, so it takes no time
