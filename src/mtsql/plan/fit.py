"""Whether a recipe's run fits, in which ways, and what would make it fit."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mtsql.model.adapters import DEFAULT_TARGETS
from mtsql.plan.memory import MARGIN, PHASES, Phase, peak_bytes, plan
from mtsql.plan.recipe import Recipe, with_flags

LORA_RANK = 16
LEAST_CACHE = 2 << 30
MORE_GPUS = (2, 4, 8, 16)
MAX_CHANGES = 3


@dataclass(frozen=True)
class Way:
    """A way to run on a number of GPUs."""

    name: str
    num_ranks: int
    is_sharded: bool


def ways(gpus: int) -> list[Way]:
    """The ways to run on so many GPUs."""
    if gpus == 1:
        return [Way("one GPU", 1, False)]
    return [Way("DDP", gpus, False), Way("FSDP2", gpus, True)]


def memory_of(recipe: Recipe, way: Way) -> dict[str, int]:
    """Bytes on each rank by part (plan/memory.py)."""
    config = recipe.config
    return plan(
        recipe.shape,
        num_ranks=way.num_ranks,
        is_sharded=way.is_sharded,
        dtype=recipe.dtype,
        lora_rank=config.model.lora.rank,
        lora_targets=config.model.lora.targets or DEFAULT_TARGETS,
        checkpointing=config.model.gradient_checkpointing,
        max_batch_tokens=recipe.learning.max_batch_tokens,
        cache_bytes=recipe.engine.cache_bytes if recipe.engine else 0,
        reference=recipe.reference,
        offload=recipe.optim.offload,
    )


def peak(parts: dict[str, int]) -> tuple[Phase, int]:
    """The phase that needs most, and its bytes."""
    peaks = {phase: peak_bytes(parts, phase) for phase in PHASES}
    largest = max(peaks, key=lambda phase: peaks[phase])
    return largest, peaks[largest]


def fits(parts: dict[str, int], gpu_bytes: int) -> bool:
    """Whether all phases leave the margin of a GPU's memory free."""
    return peak(parts)[1] <= gpu_bytes * (1 - MARGIN)


def changes_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What lowers the memory of a run, as flags, with the values of the keys; the cheapest first.
    What is set already is not among them."""
    sft = "" if recipe.stage == "rl" else "sft."
    config = recipe.config
    found: dict[str, dict[str, Any]] = {}
    if recipe.reference == "device":
        found["--reference host"] = {"reference": "host"}
    least = max(recipe.max_tokens, 1)
    if recipe.learning.max_batch_tokens > least:
        key = f"{sft}max_batch_tokens"
        found[f"--{key} {least}"] = {key: least}
    if not config.model.gradient_checkpointing:
        key = "model.gradient_checkpointing"
        found[f"--{key} true"] = {key: True}
    if recipe.engine and recipe.engine.cache_bytes > LEAST_CACHE:
        cache = max(LEAST_CACHE, recipe.engine.cache_bytes // 2)
        found[f"--engine.cache_bytes {cache >> 30}GiB"] = {"engine.cache_bytes": cache}
    if not recipe.optim.offload:
        key = f"{sft}optim.offload"
        found[f"--{key} true"] = {key: True}
    if not config.model.lora.rank:
        found[f"--model.lora.rank {LORA_RANK}"] = {"model.lora.rank": LORA_RANK}
    return found


def proposals(recipe: Recipe, gpus: int, gpu_bytes: int, most: int = 4) -> list[str]:
    """What would make the run fit: flags on the same GPUs, fewest first, then more GPUs."""
    changes = changes_of(recipe)
    way = ways(gpus)[-1]
    found: list[str] = []
    working: list[set[str]] = []
    for size in range(1, MAX_CHANGES + 1):
        for names in combinations(changes, size):
            if any(smaller <= set(names) for smaller in working):
                continue
            values = {key: value for name in names for key, value in changes[name].items()}
            if fits(memory_of(with_flags(recipe, values), way), gpu_bytes):
                working.append(set(names))
                found.append(f"{' '.join(names)} ({way.name})")
    found = found[:most]
    for more in MORE_GPUS:
        sharded = Way("FSDP2", more, True)
        if more > gpus and fits(memory_of(recipe, sharded), gpu_bytes):
            return [*found, f"--gpus {more} (FSDP2)"]
    return found
