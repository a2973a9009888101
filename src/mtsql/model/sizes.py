"""Sizes that have to fit together: tokens and embeddings, sequences and positions.

The checks need only configurations, so they run before weights are loaded or anything is trained.
"""

from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from mtsql.model.policy import EmbeddedConfig

BUDGETS = "max_prompt_tokens + sampling.max_trajectory_tokens"


def max_positions(shape: "PreTrainedConfig | EmbeddedConfig") -> int | None:
    """Tokens of the longest sequence that a model was made for, or None if its configuration does
    not say. Rotary scaling by yarn extends the length that the model was pretrained for, and
    max_position_embeddings may not include this extension."""
    if not isinstance(shape, PreTrainedConfig):
        return shape.max_positions
    stated: int | None = getattr(shape, "max_position_embeddings", None)
    rope = getattr(shape, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if stated and factor and original and rope.get("rope_type") == "yarn":
        return max(stated, int(factor * original))
    return stated


def require_positions(
    shape: "PreTrainedConfig | EmbeddedConfig", max_tokens: int, what: str = BUDGETS
) -> None:
    """ValueError if a sequence of `max_tokens` tokens is longer than the model's positions. `what`
    names the sequence in the error."""
    positions = max_positions(shape)
    if positions is not None and max_tokens > positions:
        is_folder = isinstance(shape, PreTrainedConfig)
        key = "max_position_embeddings" if is_folder else "model.embedded.max_positions"
        raise ValueError(
            f"{what}: {max_tokens} tokens, but the model has only {positions} positions ({key}), "
            f"{max_tokens - positions} too few: allow fewer tokens, or take a model with more "
            "positions"
        )


def require_embeddings(
    shape: "PreTrainedConfig | EmbeddedConfig", tokenizer: PreTrainedTokenizerBase, path: str
) -> None:
    """ValueError if the tokenizer of folder `path` has a token for which the model has no
    embedding. More embeddings than tokens are allowed."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= shape.vocab_size:
        raise ValueError(
            f"model.path {path}: the tokenizer gives {token!r} the id {highest}, but the model has "
            f"only {shape.vocab_size} embeddings: resize them (resize_token_embeddings of "
            "transformers) and train them, or take the model's own tokenizer"
        )


def require_room_in_batch(
    key: str, max_batch_tokens: int, max_tokens: int, what: str = BUDGETS
) -> None:
    """ValueError that begins with `key` if the longest sample, of `max_tokens` tokens, does not fit
    into a micro-batch. `what` says where the sample comes from."""
    if max_batch_tokens < max_tokens:
        raise ValueError(
            f"{key} is {max_batch_tokens}, but one sample may have {max_tokens} tokens ({what}): "
            "raise it"
        )
