"""What this machine multiplies well: the type to compute in, and matmuls of few rows on a CPU.

The rules are plain functions of a processor's maker and instruction sets and of a model's width.
Their results are written into a run's configuration, so that a resumed run computes as before on
another machine too. `mtsql measure` measures what the rules assume.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AMPERE = (8, 0)
"""The first compute capability of NVIDIA's GPUs that multiplies bfloat16."""
MIN_BFLOAT16_WIDTH = 384
"""Width of the residual stream from which bfloat16 is faster on a CPU. In narrower models
the small operators between the matmuls take most of the time, and these are no faster."""
MAX_FEW_ROWS = 64
AMD_FEW_ROWS = 8


@dataclass(frozen=True)
class Processor:
    """A CPU, as far as the rules ask."""

    maker: Literal["Intel", "AMD", "other"] = "other"
    flags: frozenset[str] = frozenset()
    """Instruction sets by the names of `torch.cpu.get_capabilities`, such as avx512_f."""


@cache
def this_processor() -> Processor:
    """The CPU of this machine. What cannot be found out counts as missing."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.13 has it
    found = dict(ask()) if ask is not None else {}
    flags = frozenset(name for name, value in found.items() if value is True)
    return Processor(_maker(str(found.get("cpu_name", ""))), flags)


def _maker(name: str) -> Literal["Intel", "AMD", "other"]:
    """Who made the CPU that torch gives this name. Linux knows it of unnamed CPUs too."""
    cpuinfo = Path("/proc/cpuinfo")
    try:
        known = f"{name} {cpuinfo.read_text()}" if cpuinfo.is_file() else name
    except OSError:
        known = name
    if "Intel" in known:
        return "Intel"
    return "AMD" if "AMD" in known else "other"


def pick_dtype(capability: tuple[int, int] | None, processor: Processor, width: int) -> Dtype:
    """What `model.dtype` auto means: the type that this machine computes a model of this width in.

    `capability` is the compute capability of the GPU that computes, None without a GPU. GPUs before
    Ampere have no fast bfloat16. Measured: Xeons with AMX and an AMD with AVX512-BF16 are faster in
    it if the model is wide, CPUs without such instructions are slower; others were not measured.
    """
    if capability is not None:
        return "bfloat16" if capability >= AMPERE else "float32"
    is_fast = "amx_bf16" in processor.flags or (
        processor.maker == "AMD" and "avx512_bf16" in processor.flags
    )
    return "bfloat16" if is_fast and width >= MIN_BFLOAT16_WIDTH else "float32"


def pick_few_rows(dtype: torch.dtype, processor: Processor) -> int:
    """What `model.few_rows` null means: decode matmuls of at most this many rows are faster on this
    CPU with the weight as the left operand. 0: none is.

    In float32 the matmuls are MKL's. Measured: an EPYC with AVX2, where up to 64 rows gain; an
    AMD with AVX-512, where 2 and 4 rows gain and 16 do not; a Xeon with AVX-512, where most lose.
    In bfloat16 they are oneDNN's. Measured: a Xeon with AMX, where 2 to 64 rows gain.
    """
    flags = processor.flags
    if dtype is torch.bfloat16:
        return MAX_FEW_ROWS if "amx_bf16" in flags else 0
    if dtype is not torch.float32 or "avx2" not in flags:
        return 0
    if "avx512_f" not in flags:
        return MAX_FEW_ROWS
    return AMD_FEW_ROWS if processor.maker == "AMD" else 0


@cache
def default_few_rows(dtype: torch.dtype) -> int:
    """`pick_few_rows` for the CPU of this machine."""
    return pick_few_rows(dtype, this_processor())


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU. None without a GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
