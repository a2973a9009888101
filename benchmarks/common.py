"""What several benchmarks share: the model, memory and speed of this process, contestants in processes of their own."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

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
"""What is computed with (weights stay fp32), and Accelerate's name for it."""
SOURCES = Path(__file__).resolve().parents[1] / "src"


def make_model(
    path: str | None, num_layers: int, width: int, vocab: int, kind: Literal["ours", "sdpa"]
) -> CausalLM | PreTrainedModel:
    """The model in the folder `path`, or one of SmolLM2's kind with seeded random weights (30
    layers of width 576 and a vocabulary of 49,152 are SmolLM2-135M); fp32. It is our decoder, or
    transformers' with SDPA, with the same weights."""
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
    """The vocabulary of the model in the folder `path`, else `vocab`. ValueError for a folder that
    holds no model."""
    if path and not (Path(path) / "config.json").is_file():
        raise ValueError(f"--model {path}: no config.json in this folder")
    return AutoConfig.from_pretrained(path).vocab_size if path else vocab


def autocast(dtype: str) -> torch.autocast:
    """Computes in `dtype` inside."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def matmul_speeds(secs: float = 1.5) -> list[float]:
    """Floating-point operations per second of 2048-cube products, each of those that fit into
    `secs`. One alone says little: bursts of a fifth above what the machine keeps up are common. The
    median is what it keeps up."""
    a, b, speeds = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    end = time.perf_counter() + secs
    while not speeds or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        speeds.append(2 * 2048**3 / (time.perf_counter() - start))
    return speeds


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak since `reset_peak`) of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Give freed memory back and start VmHWM at what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Wall and processor time of this process since it was made."""

    def __init__(self):
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "secs": time.perf_counter() - self.start,
            "cpu_secs": time.process_time() - self.cpu,
        }


class LargestTensor(TorchDispatchMode):
    """Inside it, the results of all operators, backward's included, are looked at; the largest are
    remembered.

    `elements`: of the largest tensor. `activation`: of the largest that is neither a weight nor
    shaped like one (a gradient, an optimizer state). Slow: nothing inside it should be timed.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.elements, self.activation = 0, 0
        self._weights = {
            size for p in model.parameters() for size in (tuple(p.shape), tuple(p.shape)[::-1])
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.numel()
                if 0 in tensor.stride():  # expanded: fewer numbers are stored than seen
                    stored = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.elements = max(self.elements, stored)
                if tuple(tensor.shape) not in self._weights:
                    self.activation = max(self.activation, stored)
        return result


def make_parser(
    description: str, sizes: dict[str, int], contestants: tuple[str, ...]
) -> argparse.ArgumentParser:
    """The flags that benchmarks with contestants share; `sizes` are its own whole numbers with
    their defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {**sizes, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", help="a Hugging Face folder instead of random weights")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what is computed with; weights stay fp32",
    )
    parser.add_argument("--who", choices=contestants, help="run this one only, in this process")
    parser.add_argument("--trl_python", default=sys.executable, help="the interpreter that has TRL")
    return parser


def print_result(parser: argparse.ArgumentParser, contest: Callable, compared: Callable) -> None:
    """Parse the flags and print one JSON object: of `contest(args)` with --who, else of
    `compared(args)`, which starts this file again for each contestant. The user's mistakes
    (ValueError) end in one line."""
    args = parser.parse_args()
    try:
        print(
            json.dumps(
                contest(args) if args.who else compared(args), indent=None if args.who else 2
            )
        )
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


def used_settings(args: argparse.Namespace, shape: tuple[str, ...]) -> dict:
    """All flags; those of the random model's `shape` are left out where a folder was given."""
    return {name: value for name, value in vars(args).items() if not (args.model and name in shape)}


def trl_version(python: str) -> str:
    """The version of TRL that interpreter `python` has, without importing it. ValueError, naming
    the flag, if it has none: asked before anything slow runs."""
    question = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    try:
        return subprocess.run(
            [python, "-c", question], check=True, capture_output=True, text=True
        ).stdout.strip()
    except OSError as error:
        raise ValueError(f"--trl_python {python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"TRL is not installed for {python}: install it there (pip install trl), or name an interpreter that has "
            "it with --trl_python"
        ) from error


def run_contestant(python: str, script: str, flags: list[str]) -> dict:
    """Run `script` in a process of its own; the JSON object on the last line it prints. ValueError
    with its last words if it fails."""
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, script, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **offline},
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise ValueError(f"{Path(script).name} {' '.join(flags)}: {words}")
    return json.loads(done.stdout.strip().splitlines()[-1])
