"""Model folders are data: none of their code is run, nothing is unpickled or read outside them.

People download these folders. So each file is checked before a library reads it, and every fault
ends in one line that names the file.
"""

import codecs
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from mtsql.files import read_json, read_text
from mtsql.model.architectures import check_architecture
from mtsql.model.decoder import CausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
MODEL_FILES = ("config.json", "generation_config.json")
LFS_POINTER = b"version https://git-lfs"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OWN_WORDS = (OSError, ImportError, ValueError, StrictDataclassError)
"""Errors whose message is written for users. Of the others the type is shown as well."""
REFUSALS = (
    *OWN_WORDS,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    re.error,
    struct.error,
    SafetensorError,
)
"""Errors that the libraries raise for a file they cannot read. The tokenizers library also raises
`Exception` itself."""


class reading:
    """A context in which a library reads a file: its errors become a ValueError of one line that
    begins with `where`, and its own warnings and progress bars are off."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        self.verbosity = logging.get_verbosity()
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        logging.set_verbosity(self.verbosity)
        self.warnings.__exit__(kind, error, trace)
        if kind is not None and _is_refusal(kind):
            prefix = "" if issubclass(kind, OWN_WORDS) else f"{kind.__name__}: "
            raise ValueError(f"{self.where}: {prefix}{_first_line(error)}") from error


def _is_refusal(kind: type) -> bool:
    """A panic of a library in Rust is not an `Exception`, and its type cannot be imported."""
    return issubclass(kind, REFUSALS) or kind is Exception or kind.__name__ == "PanicException"


def _first_line(error: BaseException | None) -> str:
    """The first line of an error's message, with the second if the first ends in a colon."""
    lines = str(error).strip().splitlines() or ["no reason is given"]
    num = 2 if lines[0].endswith(":") else 1
    return " ".join(line.strip() for line in lines[:num])


def locate(path: str | None, what: str = "model.path") -> tuple[Path, dict[str, str]]:
    """The folder, and transformers' `gguf_file` argument where the path is a GGUF file.

    ValueError that begins with `what` and the path if there is no such folder, or no GGUF file.
    """
    if path is not None and path.endswith(".gguf") and Path(path).is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{what} {path}: not a GGUF file: it does not begin with GGUF")
        return Path(path).parent, {"gguf_file": Path(path).name}
    if path is None or not Path(path).is_dir():
        raise no_folder(path, what)
    return Path(path), {}


def no_folder(path: str | None, what: str = "model.path") -> ValueError:
    """The error for a path that names no model folder."""
    advice = "get one: hf download NAME --local-dir FOLDER"
    if path is not None and Path(path).name == "model":  # as a run calls its result
        advice = f"the run {Path(path).parent} writes it at its end"
    return ValueError(f"{what} {path}: no such folder ({advice})")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. ValueError that names the file otherwise."""
    require_inside(file)
    if file.exists() and not file.is_file():  # reading a pipe would wait forever
        raise ValueError(f"model.path {file}: not a file")
    value = read_json(file, "model.path")
    with open(file, "rb") as raw:
        if raw.read(3) == codecs.BOM_UTF8:
            raise ValueError(
                f"model.path {file}: begins with a byte order mark, which transformers cannot "
                "read: save it as UTF-8 without one"
            )
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"model.path {file}: holds a {kind}, not an object with keys")
    return value


def check_objects(folder: Path, names: tuple[str, ...]) -> None:
    """ValueError that names the first of these JSON files that exists and cannot be read."""
    for name in names:
        if (file := folder / name).exists() or file.is_symlink():
            read_object(file)


def require_inside(file: Path) -> None:
    """ValueError if a file is a link that leaves its folder, or the pointer that a git clone writes
    in place of a file in Git LFS. The links of a Hugging Face cache, from a snapshot to the blobs
    of the same model, are followed."""
    target, folder = file.resolve(), file.parent.resolve()
    is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if not is_blob and not target.is_relative_to(folder):
        raise ValueError(f"model.path {file}: a link that leaves the folder: copy {target} here")
    if file.is_file():
        with open(file, "rb") as raw:
            if raw.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"model.path {file}: only a pointer to the file, which is in Git LFS: run "
                    "git lfs pull in the folder, or get the model: hf download NAME --local-dir "
                    "FOLDER"
                )


def read_model_config(path: str) -> PreTrainedConfig:
    """The configuration of a model folder (no adapter) or a GGUF file, without its weights.

    ValueError that names the file and the key for one that is damaged, quantised, needs code of its
    own, or describes a model that our decoder does not compute.
    """
    folder, gguf = locate(path)
    where = f"model.path {path if gguf else folder / 'config.json'}"
    if not gguf:
        _check_config_file(folder, path)
    with reading(where):
        settings: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, **gguf, trust_remote_code=False, local_files_only=True
        )
        check_architecture(settings)
    return settings


def _check_config_file(folder: Path, path: str) -> None:
    file = folder / "config.json"
    if not file.is_file():
        adapters = sorted(p.parent.name for p in folder.glob(f"*/{ADAPTER}"))
        if adapters:
            names = ", ".join(str(folder / name) for name in adapters)
            raise ValueError(f"model.path {path}: holds several adapters, name one: {names}")
        raise ValueError(f"model.path {path}: no config.json in this folder")
    check_objects(folder, MODEL_FILES)
    config = read_object(file)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"model.path {file}: model_type is missing or no text")
    if kind not in CONFIG_MAPPING:
        has_code = "auto_map" in config
        hint = ", and code that a folder brings is not run" if has_code else ""
        raise ValueError(f"model.path {file}: model_type {kind!r} is unknown to transformers{hint}")
    if config.get("quantization_config"):
        raise ValueError(
            f"model.path {file}: quantization_config is set: quantised weights cannot be trained, "
            "name a folder with the model's full weights"
        )
    if "transformers_weights" in config:
        raise ValueError(
            f"model.path {file}: transformers_weights is not supported: remove this key and name "
            f"the weights {WEIGHTS}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. ValueError that names the file if there are none, if
    the index names others than safetensors files of this folder, or one that is not there."""
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (index := folder / INDEX).is_file():
        names = _shard_names(index)
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        hint = f": {pickled[0]} is not read, save it again as safetensors" if pickled else ""
        raise ValueError(f"model.path {folder}: no {WEIGHTS} in this folder{hint}")
    for name in names:
        require_inside(folder / name)
    return [folder / name for name in names]


def _shard_names(index: Path) -> list[str]:
    content = read_object(index)
    shards = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict) or not isinstance(shards, dict):
        raise ValueError(f"model.path {index}: weight_map or metadata is no object with keys")
    for name in shards.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"model.path {index}: weight_map names {name!r}, no .safetensors file")
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"model.path {index}: weight_map names {name!r}, outside its folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"model.path {index}: weight_map names {name}, which is not there")
    if not shards:
        raise ValueError(f"model.path {index}: weight_map is empty")
    return sorted(set(shards.values()))


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in these safetensors files. Only the files' headers are read."""
    shapes = {}
    for file in files:
        with reading(f"model.path {file}"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. ValueError that names the file if it is damaged."""
    require_inside(file)
    with reading(str(file)):
        return load_file(file)


def require_shapes(settings: PreTrainedConfig, files: list[Path]) -> None:
    """ValueError that names the file and the tensor if the weights have other shapes than the
    configuration says. The model is made without memory."""
    where = f"model.path {files[0].parent}"
    stored = stored_shapes(files)
    layers = getattr(settings, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise ValueError(
            f"{where}/config.json: num_hidden_layers is {layers}, but the weights hold only "
            f"{len(stored)} tensors"
        )
    with reading(f"{where}/config.json"), torch.device("meta"):
        model = CausalLM(settings)
    for name, weight in model.named_parameters():
        if stored.get(name, tuple(weight.shape)) != tuple(weight.shape):
            raise ValueError(
                f"{where}: {name} is of shape {stored[name]} in the weights, but config.json says "
                f"{tuple(weight.shape)}"
            )


def require_all_weights(found: dict[str, Any], folder: Path) -> None:
    """ValueError that names a weight that is missing in the folder, or that is there although the
    model of its config.json has no such weight. `found` is transformers' report of the loading."""
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"model.path {folder}: the weight {name} is missing")
    for name in sorted(found["unexpected_keys"]):
        raise ValueError(
            f"model.path {folder}: holds the weight {name}, for which the model of its config.json "
            "has no place"
        )


def require_finite(name: str, weight: torch.Tensor, where: str) -> None:
    """ValueError that begins with `where` if a weight holds NaN or an infinity, as after training
    has diverged: no token could be sampled."""
    least, most = weight.aminmax()
    if not (least.isfinite() and most.isfinite()):
        raise ValueError(
            f"{where}: the weight {name} holds NaN or infinite values (the training that saved it "
            "has diverged, or the file is damaged): take an earlier checkpoint"
        )


def check_tokenizer(folder: Path) -> None:
    """ValueError that names a file of the tokenizer that cannot be read, or config.json, which
    transformers reads to find the tokenizer's class."""
    check_objects(folder, (*TOKENIZER_FILES, "config.json"))
    for name in ("chat_template.jinja", "merges.txt", "vocab.txt"):
        if (file := folder / name).exists() or file.is_symlink():
            require_inside(file)
            read_text(file, "model.path")


def blame_tokenizer(folder: Path) -> None:
    """ValueError that names tokenizer.json or config.json, if one of these is the reason why a
    tokenizer could not be loaded."""
    if (file := folder / "tokenizer.json").is_file():
        with reading(f"model.path {file}"):
            Tokenizer.from_file(str(file))
    if (file := folder / "config.json").is_file():
        with reading(f"model.path {file}"):
            AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)
