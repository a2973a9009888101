"""The one attention function that generation and training share.

Hugging Face's decoder layers look their attention up by name. We register one function, "mtsql", that hands the
projected and rotated queries, keys and values to a *context*: an object passed down through
`model(..., attention_context=context)` that knows which token may see which. Training passes a `PackedContext`
(segments of a flat batch), generation a `PagedContext` (`kvcache.py`). Nothing else differs between the two.
"""

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "mtsql"


def _attend(module, query, key, value, attention_mask, scaling=None, attention_context=None, **_):
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D), weights None."""
    if attention_context is None:
        raise ValueError("this model was loaded with attention 'mtsql': call it with attention_context=...")
    return attention_context.attend(module.layer_idx, query, key, value, scaling), None


def register_attention() -> None:
    """Make "mtsql" known to transformers. No mask function is registered: the context replaces masks."""
    AttentionInterface.register(ATTENTION_NAME, _attend)
