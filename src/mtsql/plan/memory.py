"""How much memory a run needs on each GPU, part by part, before anything is loaded.

    parts = plan(policy_shape(config.model), num_ranks=8, is_sharded=True, ...)
    peak_bytes(parts, "learning")

Weights, gradients, averages, copies and the cache are counted exactly. What a micro-batch keeps for
backward is counted for attention by flash-attn, and working memory roughly; CUDA's own memory, CUDA
graphs and fragmentation are not counted. MARGIN is for these.

Legend: T tokens of a micro-batch, W hidden width, V vocabulary.
"""

import copy
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from mtsql.choices import ReferencePlace
from mtsql.engine.config import EngineConfig, ModelShape
from mtsql.learner.logprobs import CHUNK_LOGITS
from mtsql.learner.optimizer import OptimConfig
from mtsql.model.adapters import DEFAULT_TARGETS, read_adapter
from mtsql.model.architectures import has_query_key_norms, head_size
from mtsql.model.decoder import CausalLM
from mtsql.model.folders import locate
from mtsql.model.policy import EmbeddedConfig, ModelConfig, embedded_settings, policy_shape

Phase = Literal["rollout", "learning", "scoring"]

PHASES: dict[Phase, tuple[str, ...]] = {
    "rollout": ("weights", "adam", "ddp_buckets", "reference", "generation_copy", "cache"),
    "learning": (
        "weights",
        "gradients",
        "adam",
        "ddp_buckets",
        "reference",
        "gathered",
        "activations",
        "head",
    ),
    "scoring": (
        "weights",
        "adam",
        "ddp_buckets",
        "reference",
        "moved_reference",
        "gathered",
        "head",
    ),
}
"""The parts that are in memory at the same time. Scoring by the reference comes before learning,
which needs more unless the reference is kept in host memory."""
MARGIN = 0.08
"""The fraction of a GPU's free memory that a plan leaves for what it does not count."""


def plan(
    shape: ModelShape,
    *,
    num_ranks: int,
    is_sharded: bool,
    dtype: torch.dtype,
    lora_rank: int,
    checkpointing: bool,
    max_batch_tokens: int,
    cache_bytes: int,
    reference: ReferencePlace | None,
    offload: bool,
    lora_targets: tuple[str, ...] = DEFAULT_TARGETS,
) -> dict[str, int]:
    """Bytes on each rank by part, where one rank has one GPU.

    `dtype` is that of the computation. `lora_rank` is 0 if all weights are trained.
    `reference` says where a frozen copy is kept; None if there is none, as with fresh adapters.
    `cache_bytes` is 0 if nothing is generated.

    weights           the policy
    gradients         of the trained weights
    adam              its two averages; 0 if they are offloaded
    ddp_buckets       DDP's own copy of the gradients
    reference         the frozen copy of the policy
    moved_reference   the same if it is kept in host memory: on the GPU only while it scores
    generation_copy   the weights in the type and the place in which a rollout computes with them
    cache             keys and values of the engine
    gathered          sharded weights that are whole for a while, and their gradients
    activations       what a micro-batch keeps for backward, and working memory
    head              the chunk of logits, and the gradient of the head before it is rounded
    """
    settings = _settings(shape)
    size = dtype.itemsize
    counts = _count_weights(settings, lora_targets, lora_rank)
    is_adapted = lora_rank > 0
    num_trained = counts["adapters"] if is_adapted else counts["all"]
    # Plain weights stay in float32, and autocast casts those of the linear layers.
    is_cast = dtype is not torch.float32 and not is_adapted and not is_sharded
    shards = num_ranks if is_sharded else 1
    stored = size * counts["all"] + 4 * num_trained if is_adapted else 4 * counts["all"]
    copied = size * counts["all"]
    cast_copy = size * counts["linear"] + 4 * (counts["all"] - counts["linear"])
    frozen = _share(cast_copy if is_cast else copied, shards)
    parts = {
        "weights": _share(stored, shards),
        "gradients": _share(4 * num_trained, shards),
        "adam": 0 if offload else _share(8 * num_trained, shards),
        "ddp_buckets": 4 * num_trained if num_ranks > 1 and not is_sharded else 0,
        "reference": frozen if reference == "device" else 0,
        "moved_reference": frozen if reference == "host" else 0,
        "generation_copy": 0,
        "cache": cache_bytes,
        "gathered": 0,
        "activations": _activations(
            settings,
            max_batch_tokens,
            counts,
            size=size,
            is_cast=is_cast,
            is_adapted=is_adapted,
            checkpointing=checkpointing,
        ),
        "head": _head(settings, size, is_cast, is_adapted),
    }
    if cache_bytes and (is_adapted or is_sharded):
        parts["generation_copy"] = copied
    elif cache_bytes and is_cast:  # kept by autocast while the rollout lasts; the head included
        parts["generation_copy"] = size * (counts["linear"] + counts["tied_head"])
    if is_sharded:
        # The root's weights and those of two layers are whole at a time, and the gradients of the
        # root and of one layer, which are summed in float32.
        root, layer = counts["root"], counts["layer"]
        gradients = 0 if is_adapted else size * (root + layer) + 4 * max(root, layer)
        parts["gathered"] = size * (root + 2 * layer) + gradients
    return parts


def peak_bytes(parts: dict[str, int], phase: Phase) -> int:
    """Bytes that are in use at the same time in this phase of an update."""
    return sum(parts[name] for name in PHASES[phase])


def _share(num_bytes: int, shards: int) -> int:
    return -(-num_bytes // shards)


def _settings(shape: ModelShape) -> PreTrainedConfig:
    if isinstance(shape, EmbeddedConfig):
        return embedded_settings(shape, shape.vocab_size)
    return shape


def _count_weights(
    settings: PreTrainedConfig, targets: tuple[str, ...], lora_rank: int
) -> dict[str, int]:
    """Numbers of parameters: all (a tied weight once), those of linear layers that share no weight,
    a head that shares its weight, those outside of the layers (the root of FSDP2), of one layer,
    and of the adapters."""
    one_layer = copy.copy(settings)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        model = CausalLM(one_layer)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    num_layers: int = settings.num_hidden_layers
    layer = list(model.model.layers[0].modules())
    linear = 0
    adapters = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        times = num_layers if module in layer else 1
        if module is not model.lm_head or not is_tied:
            linear += times * sum(p.numel() for p in module.parameters())
        if name.split(".")[-1] in targets:
            adapters += times * lora_rank * (module.in_features + module.out_features)
    num_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - num_layer
    return {
        "all": root + num_layers * num_layer,
        "linear": linear,
        "tied_head": model.lm_head.weight.numel() if is_tied else 0,
        "layer": num_layer,
        "root": root,
        "adapters": adapters,
    }


def _activations(
    settings: PreTrainedConfig,
    num_tokens: int,
    counts: dict[str, int],
    *,
    size: int,
    is_cast: bool,
    is_adapted: bool,
    checkpointing: bool,
) -> int:
    """Bytes that a micro-batch keeps for backward, and what is beside them at the worst moment. In
    backward that is a layer that is computed again, with the gradients of its MLP. At the end of
    the forward pass it is the cast weights of the linear layers, which autocast keeps until then.
    """
    layer = num_tokens * kept_in_layer(settings, size=size, is_cast=is_cast, is_adapted=is_adapted)
    stream = num_tokens * settings.hidden_size * (4 if is_cast else size)
    mlp_gradients: int = num_tokens * 4 * size * settings.intermediate_size
    num_layers: int = settings.num_hidden_layers
    kept = num_layers * (stream if checkpointing else layer)
    in_backward = mlp_gradients + (layer if checkpointing else 0)
    casts = size * counts["linear"] if is_cast else 0
    return kept + max(in_backward, casts)


def kept_in_layer(settings: PreTrainedConfig, *, size: int, is_cast: bool, is_adapted: bool) -> int:
    """Bytes that a decoder layer keeps for backward, for each token, without checkpointing.

    `size` is that of a number of the computation. Under autocast (`is_cast`) the residual stream is
    in float32. With adapters each linear layer keeps a copy of its own input.
    """
    width: int = settings.hidden_size
    heads: int = settings.num_attention_heads
    key_heads: int = settings.num_key_value_heads
    inner: int = settings.intermediate_size
    queries = heads * head_size(settings)
    keys = key_heads * head_size(settings)
    has_norms = has_query_key_norms(settings)
    streams = 2 * width * (4 if is_cast else size)  # the inputs of both norms
    copies = 3 if is_adapted else 1  # of the first norm's result
    projected = (queries + keys) * (2 if has_norms else 1) + keys  # norm's inputs; q, k, v
    attended = queries * (2 if is_adapted else 1)
    mlp = 2 * inner + (2 * width + inner if is_adapted else 0)  # the fused MLP keeps gate and up
    statistics = 4 * (2 + heads + (heads + key_heads) * has_norms)
    return streams + size * (copies * width + projected + attended + mlp) + statistics


def _head(settings: PreTrainedConfig, size: int, is_cast: bool, is_adapted: bool) -> int:
    """Bytes of two chunks of logits in float32, the cast head, and the head's gradient."""
    weight: int = settings.vocab_size * settings.hidden_size
    gradient = 0 if is_adapted else 4 * weight
    return 2 * 4 * CHUNK_LOGITS["cuda"] + gradient + (size * weight if is_cast else 0)


class LearningConfig(Protocol):
    """What the configurations of both stages say of learning."""

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def max_batch_tokens(self) -> int: ...


def require_memory(
    model: ModelConfig,
    learning: LearningConfig,
    accelerator: Accelerator,
    engine: EngineConfig | None,
    reference: ReferencePlace | None = None,
    key: str = "",
) -> None:
    """ValueError, before anything is loaded, if this rank's GPU has too little free memory.

    `engine` is None if nothing is generated. `key` stands before the names of the flags of
    `learning`. Without a GPU nothing is checked: there attention keeps other tensors, and all ranks
    share the memory.
    """
    if accelerator.device.type != "cuda":
        return
    is_sharded = accelerator.is_fsdp2
    adapter = None
    if model.path:
        folder, gguf = locate(model.path)
        adapter = None if gguf else read_adapter(folder)
    rank = adapter.saved["r"] if adapter else model.lora.rank
    parts = plan(
        policy_shape(model),
        num_ranks=accelerator.num_processes,
        is_sharded=is_sharded,
        dtype=model.compute_dtype,
        lora_rank=rank,
        lora_targets=model.lora.targets or DEFAULT_TARGETS,
        checkpointing=model.gradient_checkpointing,
        max_batch_tokens=learning.max_batch_tokens,
        cache_bytes=engine.cache_bytes if engine else 0,
        reference=reference if rank == 0 or adapter is not None else None,
        offload=learning.optim.offload,
    )
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    require_fit(parts, free, advice(key, model, learning.optim, is_sharded, rank, reference))


def advice(
    key: str,
    model: ModelConfig,
    optim: OptimConfig,
    is_sharded: bool,
    lora_rank: int,
    reference: ReferencePlace | None,
) -> dict[Phase, str]:
    """What lowers the memory of each phase and is not yet set."""
    both = []
    if reference == "device" and not lora_rank:
        both.append("reference host")
    if not optim.offload:
        both.append(f"{key}optim.offload true")
    if not lora_rank:
        both.append("model.lora.rank 16")
    both.append("more processes" if is_sharded else "--use_fsdp --fsdp_version 2 on several GPUs")
    learning = [f"a lower {key}max_batch_tokens"]
    if not model.gradient_checkpointing:
        learning.append("model.gradient_checkpointing true")
    return {
        "learning": ", ".join([*learning, *both]),
        "rollout": ", ".join(["a lower engine.cache_bytes", *both]),
        "scoring": ", ".join(both[1:] if reference == "device" and not lora_rank else both),
    }


def require_fit(parts: dict[str, int], free: int, advice: dict[Phase, str]) -> None:
    """ValueError that lists the parts and the keys to change, if a phase needs more than `free`
    bytes without MARGIN."""
    usable = round(free * (1 - MARGIN))
    for phase, names in PHASES.items():
        needed = peak_bytes(parts, phase)
        if needed <= usable:
            continue
        largest = sorted(names, key=lambda name: -parts[name])
        listed = ", ".join(f"{n.replace('_', ' ')} {_gb(parts[n])}" for n in largest if parts[n])
        raise ValueError(
            f"memory: {phase} needs about {_gb(needed)} GB on each GPU, and {_gb(usable)} of "
            f"{_gb(free)} GB can be used ({listed}): try {advice[phase]}"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"
