"""The texts from which the embedded model learns to copy."""

import random

from mtsql import copying
from mtsql.copying import copy_texts
from mtsql.toyworld.databases import CODES
from mtsql.toyworld.words import CATEGORIES


class WordTokenizer:
    """A token for each word, in the order in which they come."""

    def __init__(self):
        self.words = []

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return {"input_ids": ids}


def test_the_loss_is_on_codes_that_the_text_has_shown():
    tokenizer = WordTokenizer()
    texts = copy_texts(tokenizer, random.Random(0))
    assert len(texts) == copying.TEXTS_PER_STEP
    values = {value for values in CATEGORIES.values() for value in values}
    for text in texts:
        words = [tokenizer.words[token] for token in (*text.prompt_ids, *text.ids)]
        is_trained = [0] * len(text.prompt_ids) + list(text.loss_mask)
        shown = {}
        for place in range(0, len(words), 2):
            value, code = words[place : place + 2]
            assert value in values and code in CODES and not is_trained[place]
            assert is_trained[place + 1] == (value in shown)
            assert shown.setdefault(value, code) == code
        assert len(words) == 2 * copying.NUM_PASSES * len(shown)
        assert copying.NUM_PAIRS[0] <= len(shown) <= copying.NUM_PAIRS[1]


def test_the_same_numbers_make_the_same_texts_and_codes_differ_between_texts():
    tokenizer = WordTokenizer()
    first, again = (copy_texts(tokenizer, random.Random(3)) for _ in range(2))
    assert first == again != copy_texts(tokenizer, random.Random(4))
    codes = {text.ids[place] for text in first for place in range(0, len(text.ids), 2)}
    assert len(codes) == len(CODES)
