"""The flags that benchmarks share, and contestants that run in processes of their own.

A benchmark is a file with a dataclass of flags. `--help` lists them, `--num_layers 4` sets one,
and a mistake ends in one line, as in the scripts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mtsql.run.config import parse_config

SOURCES = Path(__file__).resolve().parents[1] / "src"


@dataclass(frozen=True)
class ModelFlags:
    """A model of SmolLM2's kind with seeded random weights; the defaults are SmolLM2-135M."""

    num_layers: int = 30
    """Decoder layers."""
    width: int = 576
    """Width of the residual stream, a multiple of 64 (the width of a head)."""
    vocab: int = 49152
    """Size of the vocabulary."""
    threads: int = 2
    """Threads that torch may use."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; weights stay float32."""


@dataclass(frozen=True)
class FolderFlags(ModelFlags):
    """The same model, or one in a folder."""

    model: str | None = None
    """A Hugging Face folder. null: random weights of the given shape."""


@dataclass(frozen=True)
class PeerFlags:
    """Whether TRL is compared too."""

    with_trl: bool = False
    """Compare TRL's GRPOTrainer too."""
    trl_python: str = sys.executable
    """The interpreter that has TRL."""


def run_benchmark(kind: type, description: str, main: Callable) -> None:
    """Parse the flags `kind` and call `main(flags)`. The user's mistakes (ValueError) end the
    process with one line."""
    try:
        main(parse_config(kind, sys.argv[1:], description))
    except ValueError as error:
        sys.exit(f"error: {error}")


def print_json(result: dict, is_one_line: bool = False) -> None:
    """Print a result; on one line if another process reads it."""
    print(json.dumps(result, indent=None if is_one_line else 2))


def as_words(flags: dict) -> list[str]:
    """Write flags as words of a command line. Values are JSON, which the parser reads."""
    words = []
    for name, value in flags.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--{name}={text}")
    return words


def settings(flags: FolderFlags) -> dict:
    """All flags, as they are printed with a result. If a model folder is given, the shape of the
    random model has no effect and is left out."""
    values = asdict(flags)
    if flags.model:
        for name in ("num_layers", "width", "vocab"):
            del values[name]
    return values


def trl_version(python: str) -> str:
    """The version of TRL that the interpreter `python` has, without importing it.

    Benchmarks call this before anything slow. ValueError that names the flag if TRL is missing.
    """
    question = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    try:
        done = subprocess.run([python, "-c", question], check=True, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--trl_python {python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"TRL is not installed for {python}: install it there (pip install trl), or name an "
            "interpreter that has it with --trl_python"
        ) from error
    return done.stdout.strip()


def run_contestant(python: str, script: str | Path, words: list[str]) -> dict:
    """Run a script in a process of its own. Returns the JSON object on the last line it prints.

    ValueError with the last line of its standard error if it fails.
    """
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        message = lines[-1].removeprefix("error: ")
        raise ValueError(f"{Path(script).name} {' '.join(words)}: {message}")
    return json.loads(done.stdout.strip().splitlines()[-1])
