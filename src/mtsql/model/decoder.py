"""The model: a decoder for Llama, Qwen2 and Qwen3, with the parameter names of their checkpoints.

    ids -> embedding -> layers -> norm -> hidden states -> head -> logits
    a layer: x += attention(norm(x));  x += mlp(norm(x))

The decoder gets a flat batch: the T tokens of all sequences stand in one row, `positions` says
where each token stands in its own sequence, and `context` (see `attention.py`) knows which token
sees which. Norm, rotation and MLP are the functions of `layers.py`.

Legend: T tokens, P wanted positions, V vocabulary, W hidden width, H query heads, K key and value
heads, D head size.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mtsql.model.architectures import (
    biases,
    check_architecture,
    has_query_key_norms,
    head_size,
    rotary_frequencies,
)
from mtsql.model.attention import AttentionContext
from mtsql.model.layers import cast_for_matmuls, linear, normed_mlp, rms_norm, rotate


class Linear(nn.Linear):
    """A linear layer that is fast for few rows on every CPU."""

    few_rows: int | None = None
    """See `CausalLM.set_few_rows`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., inputs) -> (..., outputs)."""
        return linear(x, self.weight, self.bias, self.few_rows)


class Norm(nn.Module):
    """Division by the root mean square, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., width) -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections and rotation; the context does the rest."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_size = head_size(config)
        has_bias = biases(config)
        width = config.hidden_size
        query_width = config.num_attention_heads * self.head_size
        key_width = config.num_key_value_heads * self.head_size
        self.q_proj = Linear(width, query_width, bias=has_bias.qkv)
        self.k_proj = Linear(width, key_width, bias=has_bias.qkv)
        self.v_proj = Linear(width, key_width, bias=has_bias.qkv)
        self.o_proj = Linear(query_width, width, bias=has_bias.attention_output)
        self.has_norms = has_query_key_norms(config)
        if self.has_norms:
            self.q_norm = Norm(self.head_size, config.rms_norm_eps)
            self.k_norm = Norm(self.head_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """x (1, T, W), cos and sin (1, T, D) -> (1, T, W)."""
        x = cast_for_matmuls(x)
        query = self.q_proj(x).unflatten(-1, (-1, self.head_size))  # (1, T, H, D)
        key = self.k_proj(x).unflatten(-1, (-1, self.head_size))  # (1, T, K, D)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_size))  # (1, T, K, D)
        if self.has_norms:
            query = self.q_norm(query)
            key = self.k_norm(key)
        query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        scale = self.head_size**-0.5
        out = context.attend(self.index, query, key, value.transpose(1, 2), scale)  # (1, T, H, D)
        return self.o_proj(out.flatten(2))


class Mlp(nn.Module):
    """The weights of a gated MLP; `normed_mlp` computes with them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        has_bias = biases(config).mlp
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=has_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=has_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=has_bias)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: AttentionContext,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (1, T, W) -> (1, T, W), or (1, P, W) at the positions `wanted` (P,). After the last
        attention no token sees another, so the last MLP is computed at these positions only."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        if wanted is not None:
            x = x[:, wanted]
        return x + normed_mlp(x, self.post_attention_layernorm, self.mlp)


class Decoder(nn.Module):
    """All of the model but its head."""

    inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        # The embedding of the padding token gets no gradient, as in transformers.
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        layers = [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        frequencies, self.rotary_scale = rotary_frequencies(config)
        # On the CPU even if the model is made on the meta device; a checkpoint does not hold it.
        self.register_buffer("inv_freq", frequencies, persistent=False)  # (D/2,)
        self.gradient_checkpointing = False

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids and positions (T,) -> last hidden states (T, W), or (P, W) at the indices `wanted`
        (P,) of the flat batch."""
        x = self.embed_tokens(ids[None])  # (1, T, W)
        cos, sin = self._rotary_tables(positions, x.dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            inputs = (x, cos, sin, context, wanted if index == last else None)
            if self.gradient_checkpointing and self.training:
                # No layer draws random numbers, so their state need not be kept.
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        return self.norm(x)[0]

    def _rotary_tables(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (1, T, D) of each position's angles. Computed in float32: angles of
        thousands of radians would lose their fraction in bfloat16."""
        angles = positions[None, :, None].float() * self.inv_freq.float()  # (1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # both halves of a pair turn by one angle
        cos = angles.cos() * self.rotary_scale
        sin = angles.sin() * self.rotary_scale
        return cos.to(dtype), sin.to(dtype)


class CausalLM(nn.Module):
    """A decoder with its language-model head. `config` and `generation_config` are transformers'
    and are saved with the weights."""

    _no_split_modules = ["DecoderLayer"]
    """Accelerate reads here which classes FSDP2 shards one by one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        check_architecture(config)
        self.config = config
        self.generation_config: GenerationConfig | None = None
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_few_rows(self, few_rows: int | None) -> None:
        """Set `ModelConfig.few_rows` in all linear layers. None: by the processor."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.few_rows = few_rows

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """ids and positions (T,) -> logits (T, V)."""
        return self.lm_head(self.model(ids, positions, context))


def from_transformers(theirs: PreTrainedModel) -> CausalLM:
    """Our decoder with the weights of transformers' model; the two share the tensors."""
    with torch.device("meta"):
        ours = CausalLM(theirs.config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.tie_weights()
    ours.generation_config = theirs.generation_config
    return ours.train(theirs.training)
