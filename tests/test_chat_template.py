"""Prompts and exchanges have the ids of the model's own chat template, for many templates."""

import json
import re
import time
from datetime import datetime
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.chat_models import (
    CHATML,
    HERMES_TAGS,
    KINDS,
    LIKE_LLAMA,
    LIKE_QWEN,
    LIKE_SMOLLM,
    SYSTEM,
    TOOLS,
    USER,
    byte_tokenizer,
    stand_in,
)
from helpers.models import EMBEDDED
from mtsql import workbench
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.exchange import sample_exchange
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply
from mtsql.model import chat_template
from mtsql.model.chat_template import TEMPLATE_DATE, on_fixed_date
from mtsql.model.policy import ModelConfig
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Column, Database, Schema, Table

SCHEMA = Schema("shop", (Table("singer", (Column("name", "text"), Column("age", "integer"))),))
TURN = Turn("t:0:1", 1, "shop", "how old ?", "SELECT age", (("who ?", "SELECT name"),))
RENDERERS = {kind: Renderer(stand_in(kind)) for kind in KINDS}
DIRTY = st.text(st.sampled_from(" \n\t\"'\\é中{}a1:"), max_size=12)


def theirs(renderer, messages, tools):
    """The ids of the tokenizer's own template, on the fixed date."""
    tokenizer = renderer.tokenizer
    return tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        add_generation_prompt=True,
        return_dict=False,
        chat_template=on_fixed_date(tokenizer.chat_template),
    )


def sample_episode(style, **limits):
    return sample_exchange(SqlEnv(TURN, Database(SCHEMA, None), EnvConfig(**limits), style))


def play(renderer, messages, tools, steps):
    """The ids of the whole exchange, and the same exchange as messages."""
    ids = renderer.render_prompt(messages, tools)
    conversation = list(messages)
    role = renderer._template.result_role
    for reply, result in steps:
        ids = ids + renderer.render_reply(reply) + renderer.render_observation(result)
        conversation.append({"role": "assistant", "content": reply})
        conversation.append({"role": role, "content": result})
    return ids, conversation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", get_args(PromptStyle))
@pytest.mark.parametrize("limits", [{}, {"tools": ("memory_retrieve",)}, {"max_replies": 1}])
def test_an_episode_has_the_ids_of_the_template(kind, style, limits):
    renderer = RENDERERS[kind]
    messages, tools, steps = sample_episode(style, **limits)
    ids, conversation = play(renderer, messages, tools, steps)
    assert renderer.render_prompt(messages, tools) == theirs(renderer, messages, tools)
    assert ids == theirs(renderer, conversation, tools)
    assert renderer.template_difference(messages, tools, steps) is None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), DIRTY, DIRTY, st.booleans(), st.lists(st.tuples(DIRTY, DIRTY)))
def test_contents_are_changed_as_the_template_changes_them(kind, system, question, offers, steps):
    """White space at the ends, quotes and backslashes are trimmed, escaped or kept."""
    renderer = RENDERERS[kind]
    tools = TOOLS if offers else []
    messages = [USER | {"content": question}]
    if system and kind != "gemma":
        messages.insert(0, {"role": "system", "content": system})
    steps = [(f"<think>\nSo.\n</think>\n\n{reply.strip()}x", result) for reply, result in steps]
    ids, conversation = play(renderer, messages, tools, steps)
    assert ids == theirs(renderer, conversation, tools)


@pytest.mark.parametrize("tools", [[], TOOLS, TOOLS * 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma"])
def test_prompts_of_different_roles_and_tools_do_not_mix(kind, tools):
    renderer = RENDERERS[kind]
    again = USER | {"content": "And?"}
    for messages in ([USER], [SYSTEM, USER], [USER, again], [SYSTEM, USER, again], [USER]):
        assert renderer.render_prompt(messages, tools) == theirs(renderer, messages, tools)


REPLIES = [
    Reply(ToolCall("exec_sql", {"code": "SELECT \"a\"\n, 'é'"}), "Let me look."),
    Reply(ToolCall("memory_retrieve", {"code": "SELECT 1"}), "It runs.", Verdict.PASS),
    Reply(ToolCall("exec_sql", {"code": "SELECT 2"}), "Both.", Verdict.PASS, Verdict.NO_PASS),
    Reply(ToolCall("exec_sql", {"code": "SELECT 3"}), memory_verdict=Verdict.NO_PASS),
    Reply(ToolCall("exec_sql", {"code": "SELECT 4"}), "Two\nlines."),
]


def as_message(reply: Reply) -> dict:
    """The reply as a message with thought, content and a call in separate fields."""
    verdicts = (("exec_verify", reply.exec_verdict), ("memory_verify", reply.memory_verdict))
    content = [f"<{tag}>{verdict.value}</{tag}>" for tag, verdict in verdicts if verdict]
    call = {"name": reply.action.name, "arguments": reply.action.arguments}
    return {
        "role": "assistant",
        "content": "\n".join(content) or None,
        "reasoning_content": reply.think or None,
        "tool_calls": [{"type": "function", "function": call}],
    }


@pytest.mark.parametrize(
    ("kind", "as_string"), [("qwen", False), ("embedded", False), ("embedded", True)]
)
def test_a_reply_has_the_ids_of_a_message_with_thought_content_and_calls(kind, as_string):
    """This holds for templates in the Hermes form. The embedded model's template also takes
    arguments as a string."""
    embedded = train_tokenizer(["SELECT name FROM singer"], 400, TAGS)
    renderer = RENDERERS["qwen"] if kind == "qwen" else Renderer(embedded)
    ids, conversation = renderer.render_prompt([USER], TOOLS), [USER]
    for reply in REPLIES:
        message = as_message(reply)
        if as_string:
            call = message["tool_calls"][0]["function"]
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        ids += renderer.render_reply(format_reply(reply)) + renderer.render_observation("(1,)")
        conversation += [message, {"role": "tool", "content": "(1,)"}]
        assert ids == theirs(renderer, conversation, TOOLS)


def test_the_embedded_template_takes_several_calls_and_a_missing_content():
    tokenizer = train_tokenizer(["SELECT name FROM singer"], 400, TAGS)
    call = {"name": 'a"b', "arguments": {"code": "x"}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}, call]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    written = '<tool_call>\n{"name": "a\\"b", "arguments": {"code": "x"}}\n</tool_call>'
    assert text.endswith(f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n")
    messages[1] = {"role": "assistant", "reasoning_content": "\nHm.\n", "content": "Yes."}
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")
    messages[1] = {"role": "assistant", "content": None}
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith(
        "assistant\n<|im_end|>\n"
    )
    for nothing in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        messages[1]["tool_calls"] = [{"function": {"name": "a", **nothing}}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert '{"name": "a", "arguments": {}}\n</tool_call>' in text


def test_a_reply_continues_the_thought_that_the_prompt_has_opened():
    renderer = RENDERERS["opened"]
    assert renderer.text(renderer.render_prompt([USER], [])).endswith("assistant\n<think>\n")
    spoken = renderer.decode(renderer.render_reply("<think>\nHm.\n</think>\n\nYes."))
    assert spoken == "Hm.\n</think>\n\nYes."
    assert renderer.decode(renderer.render_reply("Yes.")) == "\n</think>\n\nYes."


def test_the_date_is_fixed_and_everything_else_of_the_template_stays():
    renderer = RENDERERS["llama"]
    text = renderer.text(renderer.render_prompt([USER], []))
    assert f"Today is {TEMPLATE_DATE.strftime('%d %b %Y')}." in text
    template = (
        "{%- set a = strftime_now('%Y-%m-%d %B %-d %a') %}\n  {% if true %}[{{ a }}]{% endif %}"
    )
    for start in ("", "\n", "  ", "x\n"):
        for text in (
            f"{start}{template}",
            f"{start}{{# strftime_now #}}{{{{ messages[0].content }}}}",
        ):
            tokenizer = byte_tokenizer(CHATML, [], text)
            usual = tokenizer.apply_chat_template([USER], tokenize=False)
            fixed = tokenizer.apply_chat_template(
                [USER], tokenize=False, chat_template=on_fixed_date(text)
            )
            now = datetime.now().strftime("%Y-%m-%d %B %-d %a")
            assert fixed == usual.replace(now, TEMPLATE_DATE.strftime("%Y-%m-%d %B %-d %a"))


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_tools():
    tokenizer = byte_tokenizer(CHATML, HERMES_TAGS, {"default": LIKE_SMOLLM, "tool_use": LIKE_QWEN})
    renderer = Renderer(tokenizer)
    assert renderer.render_prompt([USER], TOOLS) == tokenizer.apply_chat_template(
        [USER], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert "I help." in renderer.text(renderer.render_prompt([USER], []))


def test_a_template_that_changes_contents_is_reported():
    template = LIKE_SMOLLM.replace("+ m['content']", "+ m['content'].replace('many', 'few')")
    renderer = Renderer(byte_tokenizer(CHATML, [], template))
    assert renderer.template_difference([USER], []) is None
    said = renderer.template_difference([USER | {"content": "How many?"}], [])
    assert re.search(r"differ from token \d+ of a first prompt: the template has 'few", said)
    said = renderer.template_difference([USER], [], [("Yes.", "4"), ("So.", "many")])
    assert re.search(r"differ from token \d+ of an exchange: .* we write 'many<", said)


def test_data_that_spells_a_token_is_not_reported_as_a_difference():
    renderer = RENDERERS["qwen"]
    evil = USER | {"content": "What is <think> or <|im_end|> ?"}
    assert renderer.render_prompt([evil], []) != theirs(renderer, [evil], [])
    assert renderer.template_difference([evil], []) is None


TURN_TEXT = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
TURNS = "{% for m in messages %}" + TURN_TEXT + "{% endfor %}"
BROKEN = {
    "{{ messages[0].content": "TemplateSyntaxError",
    "{{ raise_exception('only one message') }}": "TemplateError: only one message",
    "{{ nowhere.content }}": "UndefinedError",
    "{{ messages[9].content + 1 }}": "Undefined",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% include 'x' %}": "TypeError: no loader",
    "fixed text": "writes the text of a user message 0 times",
    "{{ messages[0].content }}{{ messages[0].content }}": "text of a user message 2 times",
    "{{ messages[0].content | upper }}": "writes the text of a user message 0 times",
    "{{ messages[0].content | replace('\\n', ' ') }}": "changes the text of a user message",
    "{{ messages[0].content }}": "writes the text of a assistant message 0 times",
    TURNS.replace("<|im_end|>", ".</s>"): "ends a reply with '.</s><|im_start|>too'",
    TURNS.replace("messages %", "messages[::-1] %"): "a reply stands after its tool result",
}


@pytest.mark.parametrize("template", BROKEN)
def test_templates_that_cannot_be_used_are_refused_in_one_line(template):
    tokenizer = byte_tokenizer(CHATML, [], template)
    tokenizer.name_or_path = "some/folder"
    with pytest.raises(ValueError) as caught:
        Renderer(tokenizer)
    said = str(caught.value)
    assert said.startswith("model.path some/folder: its chat template")
    assert BROKEN[template] in said and "use an instruct model" in said and "\n" not in said


def test_a_template_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(ValueError, match="did not end within 0.3 seconds"):
        Renderer(byte_tokenizer(CHATML, [], loops))
    assert time.monotonic() - start < 10


def test_a_template_does_not_run_again_once_it_is_split(monkeypatch):
    renderer = Renderer(byte_tokenizer(*KINDS["llama"][:2], LIKE_LLAMA))
    first = renderer.render_prompt([USER], TOOLS), renderer.render_observation("4")
    monkeypatch.setattr(renderer.tokenizer, "apply_chat_template", None)
    assert first == (renderer.render_prompt([USER], TOOLS), renderer.render_observation("4"))


def test_a_run_compares_its_own_first_turn_with_the_template(tmp_path, monkeypatch, small_world):
    compared = []

    def difference(renderer, messages, tools, steps):
        compared.append(Renderer.template_difference(renderer, messages, tools, steps))
        assert messages[0]["content"].parts and tools and len(steps) == 2
        return "they differ"

    noticing = type("Noticing", (Renderer,), {"template_difference": difference})
    monkeypatch.setattr(workbench, "Renderer", noticing)
    data, splits = DataConfig(toy_folder=str(tmp_path / "world")), ("train",)
    with pytest.warns(UserWarning, match="^they differ$"):
        workbench.set_up(ModelConfig(embedded=EMBEDDED), data, EnvConfig(), "full", splits, 0)
    assert compared == [None]
