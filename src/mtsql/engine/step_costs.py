"""What an engine step costs by the number of its tokens: the table by which drafts are chosen.

Only ratios matter. A table is measured once (`measure`) and kept in the configuration, or it is
derived from the model's shape (`default_costs`). It never changes during a run, so a resumed run
drafts what the uninterrupted one would have drafted.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtsql.engine.blocks import BlockPool
from mtsql.engine.config import CostTable, ModelShape, cache_shape
from mtsql.engine.paged_attention import step_context, uses_flash
from mtsql.engine.sampling import SamplingConfig, sample
from mtsql.model.decoder import CausalLM
from mtsql.model.policy import EmbeddedConfig

MEASURED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GROUP = 16
"""Rows that share a prompt while steps are measured."""


class Speeds(NamedTuple):
    """How fast a device is, in milliseconds."""

    step: float
    """Of a step, without its layers."""
    layer: float
    """Of a layer, for one token or many."""
    layer_token: float
    """Of a layer for each token, without the matmuls with weights."""
    bytes_read: float
    """Bytes of weights read in a millisecond."""
    multiplied: float
    """Multiplications in a millisecond."""


SPEEDS: dict[tuple[str, bool], Speeds] = {
    ("cpu", False): Speeds(0.4, 0.5, 0.009, 12e6, 115e6),
    ("cpu", True): Speeds(0.4, 1.15, 0.01, 12e6, 330e6),
    ("cuda", False): Speeds(0.5, 0.05, 0.0, 2e9, 10e9),
    ("cuda", True): Speeds(0.5, 0.05, 0.0, 2e9, 150e9),
}
"""Assumed speeds by type of the device and whether numbers have two bytes. Those of CPUs fit two
models, of 4 and of 30 layers, on two threads of a Xeon with AMX (LOG.md); those of GPUs are
estimates from data sheets."""


class Costs:
    """A cost for every number of tokens: linear between the points of a table and after them."""

    def __init__(self, table: CostTable) -> None:
        """`table`: (tokens, milliseconds), by growing tokens."""
        self.tokens = np.array([tokens for tokens, _ in table], dtype=np.float64)
        self.costs = np.array([cost for _, cost in table], dtype=np.float64)
        self.slope = 0.0  # after the last point
        if len(table) > 1:
            self.slope = (self.costs[-1] - self.costs[-2]) / (self.tokens[-1] - self.tokens[-2])

    def between(self, first: int, last: int) -> np.ndarray:
        """The costs of `first` to `last` tokens, both included."""
        tokens = np.arange(first, last + 1)
        beyond = np.maximum(tokens - self.tokens[-1], 0) * self.slope
        costs: np.ndarray = np.interp(tokens, self.tokens, self.costs) + beyond
        return costs


def num_multiplied(shape: ModelShape) -> int:
    """Weights that each token is multiplied with: those of all layers and of the head."""
    num_layers, num_kv_heads, head_dim = cache_shape(shape)
    num_heads: int
    match shape:
        case EmbeddedConfig():
            num_heads = shape.num_heads
        case _:
            num_heads = shape.num_attention_heads
    width = shape.hidden_size
    attention = 2 * width * head_dim * (num_heads + num_kv_heads)
    layer = attention + 3 * width * shape.intermediate_size
    multiplied: int = num_layers * layer + width * shape.vocab_size
    return multiplied


def default_costs(shape: ModelShape, dtype: torch.dtype, device_type: str) -> CostTable:
    """A table for a model of this shape. A CPU first reads the weights and then multiplies by them,
    so both count; on a GPU the longer of the two does."""
    device_type = "cpu" if device_type == "cpu" else "cuda"
    speeds = SPEEDS[device_type, dtype.itemsize == 2]
    num_weights = num_multiplied(shape)
    num_layers = cache_shape(shape)[0]
    fixed = speeds.step + speeds.layer * num_layers
    read = num_weights * dtype.itemsize / speeds.bytes_read
    token = num_weights / speeds.multiplied + speeds.layer_token * num_layers
    together = sum if device_type == "cpu" else max
    return tuple((num, fixed + together((read, num * token))) for num in MEASURED_TOKENS)


@torch.no_grad()
def measure(
    model: CausalLM,
    dtype: torch.dtype,
    num_tokens: tuple[int, ...] = MEASURED_TOKENS,
    context: int = 256,
    num_runs: int = 7,
) -> CostTable:
    """Measure decode steps of these numbers of tokens, each with `context` tokens before it.

    `dtype` is that of keys and values. Enter autocast around the call if the engine computes in it.
    Costs are medians of `num_runs` steps, made monotone.
    """
    size = 256 if uses_flash(model.lm_head.weight.device, dtype) else 32
    medians = [_measure_step(model, dtype, num, context, size, num_runs) for num in num_tokens]
    costs = np.maximum.accumulate(medians)
    return tuple(zip(num_tokens, (round(float(cost), 3) for cost in costs), strict=True))


def _measure_step(
    model: CausalLM, dtype: torch.dtype, num_tokens: int, context: int, size: int, num_runs: int
) -> float:
    """Milliseconds of a decode step of `num_tokens` rows."""
    device = model.lm_head.weight.device
    num_prompt = -(-context // size)
    num_groups = -(-num_tokens // GROUP)
    num_layers, num_kv_heads, head_dim = cache_shape(model.config)
    num_blocks = num_tokens + num_groups * num_prompt
    use_flash = uses_flash(device, dtype)
    pool = BlockPool(
        num_layers, num_blocks, size, num_kv_heads, head_dim, dtype, device, use_flash=use_flash
    )
    own = np.array(pool.take(num_tokens))
    shared = np.array(pool.take(num_groups * num_prompt, from_top=True)).reshape(-1, num_prompt)
    tables = np.column_stack((np.repeat(shared, GROUP, axis=0)[:num_tokens], own))  # (R, B)
    lengths = np.full(num_tokens, num_prompt * size + 1)
    ids = torch.arange(num_tokens, device=device) % model.config.vocab_size
    positions = torch.from_numpy(lengths - 1).to(device)
    noise = torch.full((num_tokens,), 0.5, dtype=torch.float64, device=device)
    wanted = torch.arange(num_tokens, device=device)
    ones = np.ones_like(lengths)

    def step() -> Tensor:
        context = step_context(pool, model.config.num_attention_heads, tables, lengths, ones, [])
        hidden = model.model(ids, positions, context, wanted)
        drawn, _ = sample(model.lm_head(hidden), SamplingConfig(), noise)
        return drawn.cpu()  # waits for the device

    secs = []
    for _ in range(num_runs + 2):
        start = time.perf_counter()
        step()
        secs.append(time.perf_counter() - start)
    return 1000 * float(np.median(secs[2:]))  # the first steps warm up
