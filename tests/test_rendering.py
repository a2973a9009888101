"""Ids and masks by hand; agreement with chat templates; data never becomes a control id."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.chat_models import LIKE_SMOLLM, SYSTEM, TOOLS, USER, byte_tokenizer, chars
from mtsql.agent.protocol import TAGS
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import CHAT_TEMPLATE, CONTROL, train_tokenizer
from mtsql.rl.trajectory_text import marked_text

ANY_TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("ÿĠ \n\t\"'(_aA1"))
) | st.lists(
    st.sampled_from([*CONTROL, *TAGS, "<tools>", " word", "word", "_", "1", "é", "\n", "  "])
).map("".join)


@pytest.fixture(scope="module")
def embedded() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        ["SELECT name FROM singer WHERE city = 'New York'", USER["content"]] * 3, 400, TAGS
    )


@pytest.fixture(scope="module")
def renderer(embedded) -> Renderer:
    return Renderer(embedded)


def test_ids_and_mask_of_two_steps_by_hand():
    """Id 256 starts a message, 257 ends it, 258 and 259 are the tags <t> and </t>."""
    renderer = Renderer(
        byte_tokenizer(["<|im_start|>", "<|im_end|>"], ["<t>", "</t>"], CHAT_TEMPLATE)
    )
    start, end, tag, untag = 256, 257, 258, 259
    prompt = renderer.render_prompt([{"role": "user", "content": "N?"}], [])
    first = renderer.render_reply("<t>a</t>")
    second = renderer.render_reply("b c")
    observation = renderer.render_observation("4")
    ids = prompt + first + observation + second
    mask = [0] * len(prompt) + [1] * len(first) + [0] * len(observation) + [1] * len(second)

    assert renderer.stop_ids == (end,)
    assert prompt == [start, *chars("user\nN?"), end, 198, start, *chars("assistant\n")]
    assert first == [tag, 64, untag, end]
    assert observation == [
        198,
        start,
        *chars("user\n<tool_response>\n4\n</tool_response>"),
        end,
        198,
        start,
        *chars("assistant\n"),
    ]
    assert second == [65, 220, 66, end]
    assert [i for i, m in enumerate(mask) if m] == [21, 22, 23, 24, 79, 80, 81, 82]
    assert marked_text(ids, mask, renderer.text) == (
        "<|im_start|>user\nN?<|im_end|>\n"
        "<|im_start|>assistant\n[[<t>a</t><|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[b c<|im_end|>]]"
    )
    assert renderer.decode(first) == "<t>a</t>"
    assert renderer.decode(second[:-1]) == "b c"
    assert second[:-1] + renderer.close_reply() == second


@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [SYSTEM | {"content": "It ends.\n"}, USER]]
)
@pytest.mark.parametrize("tools", [[], TOOLS, TOOLS * 2])
def test_first_prompt_equals_the_template(embedded, renderer, messages, tools):
    theirs = embedded.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert renderer.render_prompt(messages, tools) == theirs


def test_tool_tags_of_the_template_are_ids(embedded, renderer):
    ids = renderer.render_prompt([USER], TOOLS)
    opening = embedded.convert_tokens_to_ids("<tool_call>")
    assert ids.count(opening) == 2  # "within <tool_call></tool_call> XML tags" and the example
    assert json.dumps(TOOLS[0], ensure_ascii=False) in renderer.text(ids)


@settings(max_examples=60, deadline=None)
@given(question=ANY_TEXT, steps=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=3))
def test_dialogue_only_grows_and_reads_like_the_template(embedded, renderer, question, steps):
    messages = [SYSTEM, {"role": "user", "content": question}]
    ids = renderer.render_prompt(messages, TOOLS)
    for reply, observation in steps:
        ids = ids + renderer.render_reply(reply) + renderer.render_observation(observation)
        messages += [
            {"role": "assistant", "content": reply},
            {"role": "tool", "content": observation},
        ]
    full = embedded.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    assert renderer.text(ids) == full
    start, end = embedded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == 3 + 2 * len(steps)
    assert ids.count(end) == 2 + 2 * len(steps)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_data_has_no_added_token_and_is_decoded_unchanged(embedded, renderer, text):
    empty = renderer.render_observation("")
    ids = renderer.render_observation(text)
    added = set(embedded.added_tokens_decoder)
    assert [i for i in ids if i in added] == [i for i in empty if i in added]
    assert renderer.text(ids) == renderer.text(empty).replace("\n\n</tool", f"\n{text}\n</tool")


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_replies_keep_tags_as_ids_but_never_control_tokens(embedded, renderer, text):
    ids = renderer.render_reply(text)
    assert renderer.decode(ids) == text
    assert not set(ids[:-1]) & set(embedded.convert_tokens_to_ids(list(CONTROL)))
    for tag in TAGS:
        assert ids.count(embedded.convert_tokens_to_ids(tag)) == text.count(tag)


LLAMA_TEMPLATE = """{{- '<|begin_of_text|>' }}{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
LLAMA_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def test_llama3_has_the_ids_written_by_hand():
    renderer = Renderer(byte_tokenizer(LLAMA_CONTROL, [], LLAMA_TEMPLATE))
    begin, end_of_text, header, end_header, stop = range(256, 261)
    to_reply = [header, *chars("assistant"), end_header, 198, 198]
    assert renderer.stop_ids == (stop, end_of_text)
    assert renderer.render_prompt([{"role": "user", "content": "N?"}], []) == [
        *[begin, header, *chars("user"), end_header, 198, 198, *chars("N?"), stop],
        *to_reply,
    ]
    assert renderer.render_observation("<|eot_id|>") == [
        *[header, *chars("ipython"), end_header, 198, 198, *chars("<|eot_id|>"), stop],
        *to_reply,
    ]
    assert renderer.decode([*chars("hi"), end_of_text]) == "hi"


def test_the_default_system_message_of_a_template_is_kept():
    renderer = Renderer(byte_tokenizer(["<|im_start|>", "<|im_end|>"], [], LIKE_SMOLLM))
    without = renderer.render_prompt([USER], TOOLS)
    given = renderer.render_prompt([SYSTEM, USER], TOOLS)
    assert renderer.text(without).startswith(
        "<|im_start|>system\nI help.<|im_end|>\n<|im_start|>user"
    )
    assert renderer.text(given).startswith("<|im_start|>system\nBe brief.<|im_end|>")


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_chat_template_is_refused_by_name(template):
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], [], template)
    tokenizer.name_or_path = "some/folder"
    with pytest.raises(ValueError, match="model.path some/folder: .*no chat template.*instruct"):
        Renderer(tokenizer)


def test_a_prompt_with_a_reply_is_refused(renderer):
    with pytest.raises(ValueError, match="'assistant'"):
        renderer.render_prompt([USER, {"role": "assistant", "content": "x"}], [])
