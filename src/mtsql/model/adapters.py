"""Low-rank adapters by peft: fresh ones, and folders that peft and tools on top of it write.

A rollout computes with merged weights, the learner with the frozen weights and the adapters beside
them. So only adapters are accepted for which both compute the same function; every other option is
refused by name.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtsql.model.decoder import CausalLM
from mtsql.model.folders import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    read_object,
    read_tensors,
    reading,
    require_finite,
    stored_shapes,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel  # slow to import, and only adapters need it

DEFAULT_ALPHA = 32
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MERGE = "merge the adapter into its base model (merge_and_unload of peft) and name that folder"
COMPUTED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
)
"""Keys of adapter_config.json that may have any value that peft accepts."""
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Keys that are checked separately, or do not change what a loaded adapter computes."""
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the base model's own weights."""
ALL_LINEAR = "all-linear"
"""Value of target_modules: every linear layer but the output head."""


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters by peft."""

    rank: int = 0
    """Rank of the adapters. 0: all weights are trained, or the adapters that are in the folder."""
    alpha: int | None = None
    """Adapters are scaled by alpha / rank. null: 32, or what the adapter's folder says."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter. null: all of attention and MLP, or what the
    adapter's folder says."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.lora.rank is {self.rank}: set 0 (off) or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"model.lora.alpha is {self.alpha}: it must be above 0")

    def require_effect(self) -> None:
        """ValueError for a key that has no effect because no adapters are trained. Default values
        pass, because the configurations of older runs contain them."""
        if self.rank:
            return
        defaults = {"alpha": DEFAULT_ALPHA, "targets": DEFAULT_TARGETS}
        for key, default in defaults.items():
            if getattr(self, key) not in (None, default):
                raise ValueError(f"model.lora.{key} is set, but model.lora.rank is 0: set it too")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was checked."""

    file: Path
    """Its adapter_config.json."""
    saved: dict[str, Any]
    """The content of that file."""
    base: str
    """The folder of the base model."""


def read_adapter(folder: Path) -> Adapter | None:
    """The content of adapter_config.json, or None if the folder has none. ValueError that names the
    file and the key for an adapter that mtsql does not compute, and for a missing base model."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    saved = read_object(file)
    where = f"model.path {file}"
    kind = saved.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}, only LORA is supported: {MERGE}")
    task = saved.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{where}: task_type is {task!r}, only CAUSAL_LM is supported")
    rank = saved.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{where}: r is {rank!r}, but a rank is a whole number above 0")
    init = saved.get("init_lora_weights", True)
    # Texts are compared, the others by identity: 1 == True, but 1 is none of these values.
    keeps_base = init in KEEPS_BASE if isinstance(init, str) else any(init is v for v in KEEPS_BASE)
    if not keeps_base:
        raise ValueError(
            f"{where}: init_lora_weights is {init!r}, which changes the base model's own weights: "
            "save it as a plain LoRA (path_initial_model_for_weight_conversion of peft)"
        )
    if saved.get("bias", "none") != "none":
        raise ValueError(
            f"{where}: bias is {saved['bias']!r}, but trained biases are not supported: {MERGE}"
        )
    for key, value in saved.items():
        if key not in COMPUTED and key not in WITHOUT_EFFECT and value:
            shown = str(value) if len(str(value)) < 60 else f"{str(value)[:60]}..."
            raise ValueError(f"{where}: {key} is {shown}, which is not supported: {MERGE}")
    return Adapter(file, saved, _base_path(saved.get("base_model_name_or_path"), file))


def _base_path(named: Any, file: Path) -> str:
    """The absolute path of the base model. Its name may be relative to the working directory, to
    the adapter's folder or to the folder above that."""
    key = f"base_model_name_or_path in {file}"
    if not isinstance(named, str) or not named:
        raise ValueError(f"{key} is {named!r}: name the folder of the adapter's base model there")
    for start in (Path(), file.parent, file.parent.parent):
        path = start / named
        if path.is_dir() or (named.endswith(".gguf") and path.is_file()):
            break
    else:
        raise ValueError(
            f"the adapter's base model {named} is not a folder here (model.path {file.parent}): "
            f"correct {key}, or get the model: hf download NAME --local-dir FOLDER"
        )
    if (path / ADAPTER).is_file():
        raise ValueError(
            f"{key} is {named}, itself an adapter: merge that one into its base model first"
        )
    return os.path.abspath(path)


def require_same(settings: AdapterConfig, adapter: Adapter) -> None:
    """ValueError for a key of `model.lora` that contradicts the adapter's folder."""
    saved = adapter.saved
    folder = adapter.file.parent
    targets = saved.get("target_modules")  # a list of names, or a regular expression
    targets = sorted(targets) if isinstance(targets, list) else targets
    asked: list[str] | str | None = None
    if settings.targets is not None:
        asked = sorted(settings.targets)
    if isinstance(targets, str) and asked == [targets]:
        asked = targets
    pairs = {
        "rank": (settings.rank or None, saved["r"]),
        "alpha": (settings.alpha, saved.get("lora_alpha")),
        "targets": (asked, targets),
    }
    for key, (wanted, found) in pairs.items():
        if wanted is not None and wanted != found:
            raise ValueError(
                f"model.lora.{key} is {wanted}, but {folder} holds {key} {found}: leave the key "
                "out, an adapter is trained on as it is"
            )


def attach_adapter(base: CausalLM, adapter: Adapter) -> "PeftModel":
    """The base model with the adapter's weights, which training continues from. Dropout is set to
    0."""
    from peft import LoraConfig

    where = f"model.path {adapter.file}"
    # With dropout the learner would score other log-probs than those that were sampled.
    dropout = adapter.saved.get("lora_dropout")
    if dropout and os.environ.get("RANK", "0") == "0":
        print(f"{where}: lora_dropout is {dropout}: trained without dropout", file=sys.stderr)
    weights = adapter.file.parent / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ValueError(f"model.path {adapter.file.parent}: no {ADAPTER_WEIGHTS} beside {ADAPTER}")
    shapes = stored_shapes([weights])
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    if ranks and adapter.saved["r"] not in ranks and not adapter.saved.get("rank_pattern"):
        stored = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"{where}: r is {adapter.saved['r']}, but the weights have rank {stored}")
    keys = {key: adapter.saved[key] for key in COMPUTED if key in adapter.saved}
    if keys.get("target_modules") == ALL_LINEAR:
        keys["target_modules"] = _linear_layers(base)
    with reading(where):
        settings = LoraConfig(**keys, task_type="CAUSAL_LM")
    model = _with_adapters(base, settings, adapter.base, where)
    _load(model, weights)
    return model


def add_adapters(model: CausalLM, lora: AdapterConfig, path: str) -> "PeftModel":
    """The model of folder `path` with fresh adapters, which add nothing yet."""
    from peft import LoraConfig

    targets = list(lora.targets or DEFAULT_TARGETS)
    modules = model.named_modules()
    linear = {
        name.split(".")[-1] for name, module in modules if isinstance(module, torch.nn.Linear)
    }
    missing = [target for target in targets if target not in linear]
    if missing:
        known = ", ".join(sorted(linear))
        raise ValueError(f"model.lora.targets: {path} has no layer {missing[0]!r}, only {known}")
    alpha = DEFAULT_ALPHA if lora.alpha is None else lora.alpha
    settings = LoraConfig(
        r=lora.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    return _with_adapters(model, settings, os.path.abspath(path), "model.lora.targets")


def _linear_layers(model: CausalLM) -> list[str]:
    """Full names of the linear layers, without the output head."""
    modules = model.model.named_modules(prefix="model")
    return [name for name, module in modules if isinstance(module, torch.nn.Linear)]


def _with_adapters(model: CausalLM, settings: "LoraConfig", base: str, where: str) -> "PeftModel":
    """The model with its layers wrapped by peft. `PeftModel` itself is used, because its subclass
    for causal models needs transformers' `generate`."""
    from peft import PeftModel

    settings.base_model_name_or_path = base
    with reading(where):
        adapted = PeftModel(model, settings)
    if not isinstance(model.lm_head, torch.nn.Linear):
        raise ValueError(f"{where}: the output head cannot have an adapter: leave it out")
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        inner = layer.get_base_layer()
        is_linear = isinstance(inner, torch.nn.Linear)
        is_embedding = isinstance(inner, torch.nn.Embedding)
        if not is_linear and (not is_embedding or settings.use_dora):
            kind = "DoRA" if settings.use_dora else "an adapter"
            raise ValueError(f"{where}: {name}, a {type(inner).__name__}, cannot have {kind}")
    return adapted


def saved_name(name: str) -> str:
    """The name of a weight in the file that peft writes."""
    parts = [part for part in name.split(".") if part != "default"]
    if parts[-2:] == ["lora_magnitude_vector", "weight"]:
        parts.pop()
    return ".".join(parts)


@torch.no_grad()
def _load(model: "PeftModel", file: Path) -> None:
    """Set the adapters from a file of peft, which has to hold all of them and nothing else."""
    tensors = read_tensors(file)
    named = model.named_parameters(remove_duplicate=False)
    weights = {saved_name(name): weight for name, weight in named}
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    if missing := sorted(trained - tensors.keys()):
        raise ValueError(f"model.path {file}: the weight {missing[0]} is missing")
    for name, value in sorted(tensors.items()):
        weight = weights.get(name)
        if weight is None:
            raise ValueError(f"model.path {file}: holds {name}, which is no part of the adapter")
        if weight.shape != value.shape:
            raise ValueError(
                f"model.path {file}: {name} is of shape {tuple(value.shape)}, but the base model "
                f"makes it {tuple(weight.shape)}"
            )
        if name in trained:
            require_finite(name, value, f"model.path {file}")
            weight.copy_(value)
        elif not torch.equal(weight, value.to(weight)):  # peft may also write the embeddings
            raise ValueError(
                f"model.path {file}: {name} differs from the base model's, but only low-rank "
                f"adapters are supported: {MERGE}"
            )
