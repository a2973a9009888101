"""The embedded model's tokenizer: tags are tokens, and a word is one token at any place."""

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.chat_models import TOOLS, USER
from mtsql.agent.protocol import TAGS
from mtsql.model.policy import load_tokenizer
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import CONTROL, train_tokenizer

TEXTS = ["SELECT name FROM singer WHERE city = 'New York' <think>", USER["content"]] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400, TAGS)


def test_control_tokens_have_the_first_ids_and_tags_the_last(tokenizer):
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(CONTROL)) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(range(size - len(TAGS), size))


@pytest.mark.parametrize(
    "text",
    ["singer(x)", "(singer", "a.singer", "the_singer", "'singer'", "\nsinger", "1singer"],
)
def test_a_word_is_the_same_token_at_any_place(tokenizer, text):
    (word,) = tokenizer.encode(" singer")
    assert word in Renderer(tokenizer).render_observation(text)


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    messages = [USER | {"content": "SELECT count(*) FROM été <think> ' ÿ"}]
    expected = Renderer(tokenizer).render_prompt(messages, TOOLS)
    assert Renderer(loaded).render_prompt(messages, TOOLS) == expected


def test_a_vocabulary_without_room_for_bytes_and_tags_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 270, but .* 12 tags need 271"):
        train_tokenizer([], 270, TAGS)
