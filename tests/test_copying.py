"""The texts from which the embedded model learns to copy."""

import random
from collections import defaultdict

import pytest

from mtsql import copying
from mtsql.copying import copy_texts
from mtsql.toyworld.databases import CODES
from mtsql.toyworld.words import CATEGORIES

VALUES = {value for values in CATEGORIES.values() for value in values}


class CharacterTokenizer:
    """A token for each character, so values have several tokens and codes two (a space first)."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def drawn(seed):
    """The texts of a step: for each the words, and whether each word has a loss on all its tokens
    (True), on none (False) or on some (None)."""
    for text in copy_texts(CharacterTokenizer(), random.Random(seed)):
        characters = "".join(map(chr, (*text.prompt_ids, *text.ids)))
        mask = [0] * len(text.prompt_ids) + list(text.loss_mask)
        assert characters.startswith(" ") and len(characters) == len(mask)
        words = characters[1:].split(" ")
        is_trained, place = [], 0
        for word in words:
            losses = set(mask[place : place + 1 + len(word)])
            is_trained.append(bool(losses.pop()) if len(losses) == 1 else None)
            place += 1 + len(word)
        yield words, is_trained


def passes(words):
    """The pairs of value and code of a text, in its passes."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    size = len(pairs) // copying.NUM_PASSES
    return [pairs[first : first + size] for first in range(0, len(pairs), size)]


def test_the_loss_is_on_codes_that_the_text_has_shown():
    texts = list(drawn(0))
    assert len(texts) == copying.TEXTS_PER_STEP
    for words, is_trained in texts:
        shown = {}
        for place in range(0, len(words), 2):
            value, code = words[place : place + 2]
            assert value in VALUES and code in CODES and is_trained[place] is False
            assert is_trained[place + 1] is (value in shown)
            assert shown.setdefault(value, code) == code
        assert [sorted(pairs) for pairs in passes(words)] == [sorted(shown.items())] * 3


def test_only_the_text_itself_says_which_code_and_where():
    codes_in_step = defaultdict(set)
    for words, _ in drawn(0):
        for value, code in passes(words)[0]:
            codes_in_step[value].add(code)
    assert sum(len(codes) > 1 for codes in codes_in_step.values()) > len(VALUES) / 2
    orders = [passes(words) for words, _ in drawn(0)]
    assert sum(first != second for first, second, _ in orders) > len(orders) / 2
    assert sum(second != third for _, second, third in orders) > len(orders) / 2


def test_the_texts_have_all_values_all_codes_and_all_lengths():
    texts = [words for seed in range(20) for words, _ in drawn(seed)]
    assert {value for words in texts for value in words[::2]} == VALUES
    assert {code for words in texts for code in words[1::2]} == set(CODES)
    assert {len(passes(words)[0]) for words in texts} == set(range(2, 9))


def test_the_same_numbers_make_the_same_texts():
    assert list(drawn(3)) == list(drawn(3)) != list(drawn(4))


@pytest.mark.parametrize("seed", range(5))
def test_a_value_of_two_columns_has_one_code_in_a_text(seed, monkeypatch):
    few = {"color": tuple(f"value{n}" for n in range(8)), "mood": ("value1", "value2", "value3")}
    monkeypatch.setattr(copying, "CATEGORIES", few)
    for words, _ in drawn(seed):
        assert all(len(dict(pairs)) == len(pairs) for pairs in passes(words))
