"""A model that costs nothing and shows every wrong entry of the cache.

The key of a token holds its id and its position. The next token hangs on what the cache holds for
the trajectory: often on the last two ids, so that text repeats itself, else on all of them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from helpers.engine import VOCAB
from mtsql.engine import engine as engine_module
from mtsql.engine.engine import Engine
from mtsql.engine.paged_attention import _new_places
from mtsql.model.decoder import CausalLM

CONFIG = Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=2,
    intermediate_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    pad_token_id=0,
)
MODEL = CausalLM(CONFIG).to(torch.float64).eval()
"""Only its shape is used."""
WEIGHTS = np.random.default_rng(0).integers(1, 1 << 30, 4096)
FREQUENCIES = torch.from_numpy(np.random.default_rng(1).random(VOCAB))


def read_content(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Let an engine of `MODEL` compute with the content of its cache."""
    patch.setattr(engine_module, "step_context", _context)
    engine.decoder = _decode
    engine.head = _Head(2, VOCAB, dtype=torch.float64)


def _context(pool, num_heads, tables, lengths, num_new, chunks) -> SimpleNamespace:
    sequences = [*zip(tables, lengths.tolist(), num_new.tolist(), strict=True)]
    sequences += [(chunk.blocks, chunk.length, chunk.stop - chunk.start) for chunk in chunks]
    places = _new_places(pool, tables, lengths, num_new, chunks)
    return SimpleNamespace(pool=pool, sequences=sequences, places=places)


def _decode(ids: Tensor, positions: Tensor, context: SimpleNamespace, wanted: Tensor) -> Tensor:
    """-> (P, 2): a number of the last two ids, and one of all ids."""
    pool = context.pool
    keys = pool.keys[0].numpy()[:, 0]  # (num_blocks, S, 2)
    blocks, offsets = context.places
    keys[blocks, offsets] = torch.stack((ids, positions), dim=1).numpy()
    hidden = []
    for table, length, num_new in context.sequences:
        held = keys[table[: pool.blocks_for(length)]].reshape(-1, 2)[:length].astype(np.int64)
        assert held[:, 1].tolist() == list(range(length))
        all_ids = (held[:, 0] * WEIGHTS[:length]).cumsum() % (1 << 40)
        before = np.concatenate(([0], held[:-1, 0]))
        hidden.append(np.stack((held[:, 0] * VOCAB + before, all_ids), axis=1)[-num_new:])
    return torch.from_numpy(np.concatenate(hidden)).double()[wanted]


class _Head(nn.Linear):
    """Gives each number logits of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(P, 2) -> (P, V)."""
        pair, all_ids = hidden.unbind(1)
        number = torch.where(all_ids % 5 == 0, all_ids % 10007, pair)
        return 6 * torch.sin(number[:, None] * FREQUENCIES)
