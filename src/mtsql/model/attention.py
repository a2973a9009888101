"""The interface between the decoder and attention, which generation and training share.

The decoder projects and rotates queries, keys and values. Which token may see which is not its
concern: a new *context* for each forward pass computes the attention.
`learner/packed_attention.py` implements it for training (samples that share a prompt, in a flat
batch) and `engine/paged_attention.py` for generation (keys and values in a paged cache).
"""

from typing import Protocol

import torch


class AttentionContext(Protocol):
    """Attention over the T tokens of one forward pass.

    H query heads, K key and value heads (H is a multiple of K), D head size.
    """

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D).

        `layer` is the index of the decoder layer, by which a cache finds its keys and values.
        `scale` multiplies the scores before the softmax. Under autocast the three may have
        different dtypes, because norms widen queries and keys; the result has that of `value`.
        """
        ...
