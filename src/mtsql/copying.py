"""Texts that can only be predicted by copying, for the pretraining of the embedded model.

A text names pairs of a value and a code of the embedded world several times, in another order each
time: `red C lima A ... lima A red C ...`. The codes are random, so only the text itself says which
code follows a value, as only a prompt or an observation does in an episode. A language model that
was pretrained on much text can copy so. A small one that starts from nothing learns it late in the
demonstrations, or not at all, and RL does not teach it (LOG.md, 2026-11-30).
"""

import random

from transformers import PreTrainedTokenizerBase

from mtsql.learner.packing import Sample
from mtsql.toyworld.databases import CODES
from mtsql.toyworld.words import CATEGORIES

TEXTS_PER_STEP = 16
NUM_PAIRS = (2, 8)
"""Bounds of the number of pairs of a text."""
NUM_PASSES = 3
"""How often a text names each pair."""


def copy_texts(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[Sample]:
    """The texts of one step, with a loss on each code that the text has shown before."""
    values = list(dict.fromkeys(value for values in CATEGORIES.values() for value in values))
    ids = {word: _ids(word, tokenizer) for word in (*values, *CODES)}
    return [_copy_text(values, ids, rng) for _ in range(TEXTS_PER_STEP)]


def _copy_text(values: list[str], ids: dict[str, list[int]], rng: random.Random) -> Sample:
    pairs = [(value, rng.choice(CODES)) for value in rng.sample(values, rng.randint(*NUM_PAIRS))]
    text: list[int] = []
    loss_mask: list[int] = []
    for number in range(NUM_PASSES):
        rng.shuffle(pairs)
        for value, code in pairs:
            text += ids[value] + ids[code]
            loss_mask += [0] * len(ids[value]) + [int(number > 0)] * len(ids[code])
    return Sample(text[:1], text[1:], loss_mask[1:])


def _ids(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
