"""Which operators compute attention. Engine and learner ask here, so both have the same answer.

| device and dtype | generation | learning |
| --- | --- | --- |
| GPU, 16 bits, flash-attn | `flash` | `flash` |
| GPU, 16 bits, no flash-attn | `gathered` | `varlen`, which is part of torch |
| GPU before Ampere, or float32 | `gathered` | `padded` |
| CPU | `visits` | `parts` |

The contexts in `engine/paged_attention.py` and `learner/packed_attention.py` say how each of them
computes.
"""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import torch

VARIABLE = "MTSQL_FLASH_ATTN"
"""With the value `off` in the environment, flash-attn is not used although it is installed."""
FLASH_BLOCK = 256
"""flash-attn reads a paged cache whose block size is a multiple of this."""
PLAIN_BLOCK = 32
"""Block size elsewhere: a row wastes half a block on average."""
AMPERE = (8, 0)
"""The smallest compute capability that flash-attn and torch's varlen attention support."""


class FlashInstall(NamedTuple):
    """What importing flash-attn gave."""

    state: Literal["works", "missing", "broken", "off", "unclear"]
    """unclear: the environment variable has a value other than `off`."""
    version: str = ""
    error: str = ""
    """Why the import failed, if `state` is `broken`; the value, if it is `unclear`."""


class AttentionPath(NamedTuple):
    """The operators for one device and dtype."""

    generation: Literal["flash", "gathered", "visits"]
    learning: Literal["flash", "varlen", "padded", "parts"]
    reason: str
    """Why it is not flash-attn; the version of flash-attn if it is."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache, if the user names no number."""
        return FLASH_BLOCK if self.generation == "flash" else PLAIN_BLOCK


def choose_path(
    device_type: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    flash: FlashInstall,
) -> AttentionPath:
    """Choose the operators. `capability` is that of the GPU; None where there is no CUDA.

    ValueError if flash-attn could be used here, is installed, and cannot be imported: training
    would take several times as long, and nobody would know. Also if the environment variable has
    another value than `off`.
    """
    if device_type == "cpu":
        return AttentionPath("visits", "parts", "flash-attn needs a GPU")
    if dtype not in (torch.float16, torch.bfloat16):
        return AttentionPath("gathered", "padded", f"flash-attn cannot compute in {name_of(dtype)}")
    if capability is None:
        return AttentionPath("gathered", "padded", f"flash-attn does not run on {device_type}")
    if capability < AMPERE:
        has = ".".join(map(str, capability))
        reason = f"flash-attn needs compute capability 8.0 and this GPU has {has}"
        return AttentionPath("gathered", "padded", reason)
    if flash.state == "broken":
        raise ValueError(
            f"flash-attn {flash.version} is installed but cannot be imported ({flash.error}): "
            f"install it again for this torch (docs/install.md), or set {VARIABLE}=off in the "
            "environment to run without it"
        )
    if flash.state == "unclear":
        raise ValueError(f"{VARIABLE} is {flash.error!r}: the only value it may have is off")
    if flash.state == "works":
        return AttentionPath("flash", "flash", f"flash-attn {flash.version}")
    why = f"{VARIABLE} is off" if flash.state == "off" else "flash-attn is not installed"
    return AttentionPath("gathered", "varlen", why)


@cache
def path_for(device: torch.device, dtype: torch.dtype) -> AttentionPath:
    """`choose_path` for this machine: `dtype` is that of keys and values on `device`."""
    capability = None
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    return choose_path(device.type, dtype, capability, FLASH_INSTALL)


def main_device() -> torch.device:
    """A GPU, if torch sees one, or else the CPU: where models are run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_path(path: AttentionPath, dtype: torch.dtype, block_size: int | None = None) -> str:
    """One line for the user. `block_size`: that of `engine`, if it is set."""
    setting = f"({name_of(dtype)}, blocks of {block_size or path.block_size} tokens)"
    if path.generation == "flash":
        return f"attention: {path.reason} {setting}"
    operators = {
        "varlen": "torch's varlen_attn to learn, gathered blocks to generate",
        "padded": "padded rows to learn, gathered blocks to generate",
        "parts": "torch's operators for CPUs",
    }
    return f"attention: {operators[path.learning]} {setting}, because {path.reason}"


def name_of(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def import_flash() -> tuple[Any, FlashInstall]:
    """flash-attn's varlen function, None if it cannot be used, and what importing it gave."""
    value = os.environ.get(VARIABLE)
    if value == "off":
        return None, FlashInstall("off")
    if value:  # an error, where a GPU could use flash-attn
        return None, FlashInstall("unclear", error=value)
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that is not there
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return None, FlashInstall("missing")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return None, FlashInstall("broken", _flash_version(), reason)
    return flash_attn_varlen_func, FlashInstall("works", _flash_version())


def _flash_version() -> str:
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return "of unknown version"


flash_attn_varlen_func, FLASH_INSTALL = import_flash()
