"""The three architectures that `decoder.py` computes, and what of their configurations it takes.

The configuration is the object that transformers makes of `config.json`. Everything that would
change the result and that the decoder does not compute is refused here, by name.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> `architectures` in config.json, by which other tools find their own class."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose frequencies do not depend on the length of a sequence. With the others a
token's log-prob would depend on the sequences beside it in the batch."""


class Biases(NamedTuple):
    """Which linear layers of a decoder layer have a bias."""

    qkv: bool
    attention_output: bool
    mlp: bool


def check_architecture(config: PreTrainedConfig) -> None:
    """ValueError that names what of this configuration the decoder does not compute."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model type {config.model_type!r} is not supported: take one of {known}")
    layer_types = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        raise ValueError("sliding-window or linear attention is not supported, only full")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, only 'silu'")
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout is {config.attention_dropout}: it must be 0, because the learner "
            "has to score what was sampled"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise ValueError(
            f"rope_type {kind!r} is not supported, only {', '.join(STATIC_ROPE)}: with others "
            "a token's log-prob depends on the length of the sequences beside it"
        )


def biases(config: PreTrainedConfig) -> Biases:
    """Qwen2 fixes its biases, Llama and Qwen3 read them from the configuration."""
    if config.model_type == "qwen2":
        return Biases(qkv=True, attention_output=False, mlp=False)
    attention = config.attention_bias
    return Biases(attention, attention, mlp=getattr(config, "mlp_bias", False))


def has_query_key_norms(config: PreTrainedConfig) -> bool:
    """Whether queries and keys are normalised before they are rotated."""
    return config.model_type == "qwen3"


def head_size(config: PreTrainedConfig) -> int:
    """Width of a head: stated, or the hidden width divided among the query heads."""
    size: int | None = getattr(config, "head_dim", None)
    return int(config.hidden_size // config.num_attention_heads) if size is None else size


def rotary_frequencies(config: PreTrainedConfig) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotated pair (D/2,), in float32 on the CPU, and the factor of the
    cosines and sines."""
    kind = config.rope_parameters.get("rope_type", "default")
    with torch.device("cpu"):  # also where the model is made on the meta device
        size = head_size(config)
        if kind != "default":
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
            if 2 * len(frequencies) != size:
                raise ValueError("partial_rotary_factor is not supported: whole heads are rotated")
            return frequencies, factor
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size  # (D/2,)
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
