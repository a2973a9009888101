"""A sentence-embedding model from a folder, by transformers: texts to vectors.

The folder holds config.json, a fast tokenizer and safetensors weights. The file
`1_Pooling/config.json`, which sentence-transformers writes, says how the vectors of a text's tokens
become one: their mean (also without this file), the first, or the last (Qwen3-Embedding).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from mtsql.files import read_json
from mtsql.model.folders import reading

Pooling = Literal["mean", "cls", "lasttoken"]
POOLING_FILE = Path("1_Pooling") / "config.json"
TEXTS_AT_ONCE = 16
MAX_WINDOW = 8192
"""Most tokens of a text that are encoded at once, whatever the model's positions."""
SPARE_POSITIONS = 2
"""Positions that RoBERTa's models have and cannot use."""


def check_encoder(path: str, flag: str) -> None:
    """ValueError of one line that begins with `flag` and the path if the folder cannot be used.
    Weights are not read."""
    folder = Path(path)
    where = f"{flag} {path}"
    if not folder.is_dir():
        raise ValueError(f"{where}: no such folder")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{where}: no {name} in this folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{where}: no .safetensors file in this folder")
    with reading(where):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if type(config) not in MODEL_MAPPING:
            raise ValueError(f"{config.model_type} is no model that turns text into vectors")
        tokenizer = _tokenizer(path)
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no fast version: convert it to a tokenizer.json")
    read_pooling(folder, flag)


def read_pooling(folder: Path, flag: str) -> Pooling:
    """How the vectors of a text's tokens become one. ValueError that names the file if it asks for
    another way."""
    file = folder / POOLING_FILE
    if not file.is_file():
        return "mean"
    settings = read_json(file, flag)
    if isinstance(settings, dict):
        known: dict[str, Pooling] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "lasttoken",
        }
        asked = [key for key, value in settings.items() if value is True and key[:7] == "pooling"]
        if len(asked) == 1 and asked[0] in known:
            return known[asked[0]]
    raise ValueError(f"{flag} {file}: expected one of mean, cls and last token to be true")


def load_encoder(path: str, device: torch.device, flag: str) -> "SentenceEncoder":
    """The encoder of a folder, on `device` in float32. ValueError like `check_encoder`, and for a
    weight that is missing."""
    check_encoder(path, flag)
    with reading(f"{flag} {path}"):
        model, found = AutoModel.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        missing = [name for name in sorted(found["missing_keys"]) if "pooler" not in name]
        if missing:
            raise ValueError(f"the weight {missing[0]} is missing")
    return SentenceEncoder(
        model.to(device).eval(), _tokenizer(path), read_pooling(Path(path), flag)
    )


class SentenceEncoder:
    """Texts to vectors of length 1. A text that is longer than the model's positions is read in
    windows, and its vector is the mean of theirs."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, pooling: Pooling) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        positions = getattr(model.config, "max_position_embeddings", None) or MAX_WINDOW
        self.window = min(
            tokenizer.model_max_length, max(8, positions - SPARE_POSITIONS), MAX_WINDOW
        )

    @torch.no_grad()
    def encode(self, texts: list[str]) -> np.ndarray:
        """(N texts, W) in float32, each row of length 1."""
        encoded = self.tokenizer(
            texts, truncation=True, max_length=self.window, return_overflowing_tokens=True
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        sums = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        for start in range(0, len(owners), TEXTS_AT_ONCE):
            part = slice(start, start + TEXTS_AT_ONCE)
            windows = {key: values[part] for key, values in encoded.items()}
            vectors = self._pooled(windows)
            for owner, vector in zip(owners[part], vectors, strict=True):
                sums[owner] += vector
        lengths = np.sqrt((sums**2).sum(1, keepdims=True))
        scaled: np.ndarray = sums / np.where(lengths > 0, lengths, 1)
        return scaled

    def _pooled(self, windows: dict[str, list[list[int]]]) -> np.ndarray:
        """A vector of length 1 for each window."""
        device = next(self.model.parameters()).device
        padded = self.tokenizer.pad(windows, padding_side="right", return_tensors="pt").to(device)
        hidden = self.model(**padded).last_hidden_state  # (windows, tokens, W)
        mask = padded["attention_mask"][..., None].to(hidden.dtype)  # (windows, tokens, 1)
        if self.pooling == "mean":
            vectors = (hidden * mask).sum(1) / mask.sum(1)
        elif self.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            last = padded["attention_mask"].sum(1) - 1
            vectors = hidden[torch.arange(len(hidden), device=device), last]
        scaled: np.ndarray = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return scaled


def _tokenizer(path: str) -> Any:
    """The tokenizer of a folder. One without a padding token, as those of many language models,
    gets any: the attention mask leaves it out."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
