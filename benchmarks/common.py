"""Code that several benchmarks share: they make the model, and measure time, memory and speed."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mtsql.model.decoder import CausalLM, from_transformers

HEAD_DIM = 64
DTYPES = {"float32": "no", "bfloat16": "bf16"}
"""Types of the computation (weights stay float32), and Accelerate's names for them."""


def make_model(
    path: str | None, num_layers: int, width: int, vocab: int, kind: Literal["ours", "sdpa"]
) -> CausalLM | PreTrainedModel:
    """Load the model in the folder `path`, or make one like SmolLM2 with seeded random weights.

    30 layers of width 576 and a vocabulary of 49,152 are SmolLM2-135M. Weights are float32. The
    decoder is ours, or transformers' with SDPA and the same weights.
    """
    model = _model(path, num_layers, width, vocab)
    return from_transformers(model) if kind == "ours" else model


def _model(path: str | None, num_layers: int, width: int, vocab: int) -> PreTrainedModel:
    if path:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        )
    if width < HEAD_DIM or width % HEAD_DIM:
        raise ValueError(
            f"--width is {width}: it must be a multiple of {HEAD_DIM}, the width of a head"
        )
    heads = width // HEAD_DIM
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def vocab_of(path: str | None, vocab: int) -> int:
    """The size of the vocabulary: that of the model in the folder `path`, or `vocab` without a
    folder. ValueError for a folder that holds no model."""
    if path and not (Path(path) / "config.json").is_file():
        raise ValueError(f"--model {path}: no config.json in this folder")
    return AutoConfig.from_pretrained(path).vocab_size if path else vocab


def autocast(dtype: str) -> torch.autocast:
    """A context that computes in `dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def matmul_speeds(dtype: str = "float32", secs: float = 1.5) -> list[float]:
    """Floating-point operations per second of each 2048-cube matmul in `dtype` that fits into
    `secs`.

    The median is the speed that the machine can sustain. A single matmul is often a fifth faster.
    """
    a = torch.randn(2048, 2048).to(getattr(torch, dtype))
    b = torch.randn(2048, 2048).to(getattr(torch, dtype))
    speeds: list[float] = []
    end = time.perf_counter() + secs
    while not speeds or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        speeds.append(2 * 2048**3 / (time.perf_counter() - start))
    return speeds


def resident(field: str) -> int:
    """Memory of this process in bytes (Linux). field: VmRSS (now) or VmHWM (the peak since
    `reset_peak`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Return freed memory to the system and restart VmHWM at what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Wall and processor time of this process since the stopwatch was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.cpu = time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "secs": time.perf_counter() - self.start,
            "cpu_secs": time.process_time() - self.cpu,
        }


class LargestTensor(TorchDispatchMode):
    """A context that remembers the largest tensor that an operator makes, in backward too.

    `elements` is the size of the largest tensor. `activation` is the size of the largest tensor
    that does not have the shape of a weight, as gradients and optimizer states have. The context is
    slow, so nothing inside it should be timed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.elements = 0
        self.activation = 0
        shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        self._weights = shapes | {shape[::-1] for shape in shapes}

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.numel()
                if 0 in tensor.stride():  # an expanded tensor stores fewer numbers
                    stored = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.elements = max(self.elements, stored)
                if tuple(tensor.shape) not in self._weights:
                    self.activation = max(self.activation, stored)
        return result
