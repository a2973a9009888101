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


class PackedContext:
    """Attention over a flat training batch: a sample sees its group's prompt and, causally, its own tokens.

    A group's prompt is computed once and each of its samples attends to it, so the gradient through the prompt is the
    sum over samples. On the CPU: prompts are one padded causal SDPA, samples one padded SDPA over [prompt; own]. A
    prompt with a single sample is one sequence. Padding never reaches a real token: it stands to the right of a causal
    row, or is masked.
    """

    def __init__(self, spans: tuple[tuple[int, int, int, int], ...], device: torch.device):
        """spans: (prompt start, prompt end, start, end) of each sample in the flat batch."""
        sharers: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for prompt_start, prompt_end, start, end in spans:
            sharers.setdefault((prompt_start, prompt_end), []).append((start, end))
        whole, shared = [], []
        for prompt, samples in sharers.items():
            if len(samples) == 1 and samples[0][0] == prompt[1]:
                whole.append((prompt[0], samples[0][1]))
            else:
                whole.append(prompt)
                shared += [(prompt, sample) for sample in samples]
        self.causal = _padded([range(a, b) for a, b in whole]).to(device)  # (R, L)
        order = [i for a, b in whole for i in range(a, b)]
        cells = [r * self.causal.shape[1] + c for r, (a, b) in enumerate(whole) for c in range(b - a)]
        self.shared = None
        if shared:
            own = _padded([range(*sample) for _, sample in shared])  # (N, L)
            past = _padded([range(*prompt) for prompt, _ in shared])  # (N, Lp)
            lengths = torch.tensor([prompt[1] - prompt[0] for prompt, _ in shared])
            sees_past = (torch.arange(past.shape[1]) < lengths[:, None])[:, None, :].expand(-1, own.shape[1], -1)
            sees_own = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril().expand(len(shared), -1, -1)
            self.shared = (own.to(device), torch.cat([past, own], dim=1).to(device))
            self.mask = torch.cat([sees_past, sees_own], dim=2)[:, None].to(device)  # (N, 1, L, Lp + L)
            order += [i for _, sample in shared for i in range(*sample)]
            offset, width = self.causal.numel(), own.shape[1]
            cells += [offset + r * width + c for r, (_, (a, b)) in enumerate(shared) for c in range(b - a)]
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.tensor(cells)
        self.back = back.to(device)  # (T,) padded cell of each flat token

    def attend(self, layer_idx, query, key, value, scaling):
        """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D)."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        out = [_sdpa(query[self.causal], key[self.causal], value[self.causal], scaling, None)]
        if self.shared is not None:
            own, seen = self.shared
            out.append(_sdpa(query[own], key[seen], value[seen], scaling, self.mask))
        return torch.cat([x.flatten(0, 1) for x in out])[self.back][None]


def _sdpa(query, key, value, scaling, mask):
    """query (R, L, H, D), key and value (R, S, Hkv, D) -> (R, L, H, D); causal where there is no mask."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)  # fmt: skip


def _padded(rows: list[range]) -> torch.Tensor:
    """(R, L) flat indices, short rows filled with their own first index."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [row.start] * (width - len(row)) for row in rows])
