"""The model's own chat template, split into its parts once, so that it does not run while episodes
are played.

A template is rendered with a stand-in for each message's content, and the text is split at the
stand-ins. The text between them is the template's markup: headers, end tokens, tool schemas, a
default system message. A second rendering, with a content that has spaces, quotes and line breaks,
shows what the template does to a content: nothing, trim it, or write it as a JSON string.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Part = tuple[str, bool]
"""A stretch of text, and whether it is ours (the template's markup or a prompt's words). Added
tokens are recognised in text that is ours and never in data."""

TEMPLATE_DATE = date(2024, 7, 26)
"""The date for templates that write today's date (Llama 3.2, SmolLM3): the same in every run,
resume and evaluation. It is the date that Llama 3.1's template has as its default."""
DATE_CODES = "aAbBdHIjmMpSUwWyYcxXZ"
MAX_RENDER_SECS = 20
"""A template that runs longer is refused as one that does not end."""
TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    ImportError,
)
"""What a broken template raises; RuntimeError includes endless recursion."""
RESULT_ROLES = ("tool", "user")
"""Roles of a message with a tool result; the first one that the template accepts is used."""
SAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {}},
    },
}
"""A tool to offer while a tool result is rendered: some tokenizers have a template for tools."""
PROBE = ' \n"é {} é\\\t \n'
"""A content with all characters that templates are known to change; the stand-in goes in the
middle."""


@dataclass(frozen=True)
class Content:
    """The place of a message's content in a template, and what the template does to the content."""

    message: int
    """Index of the message."""
    is_trimmed: bool = False
    """Whether white space at both ends of the content is removed."""
    is_json: bool = False
    """Whether the content is written as the inside of a JSON string."""

    def place(self, parts: list[Part]) -> list[Part]:
        """The content `parts` as the template writes it."""
        if self.is_trimmed:
            parts = _trim(parts)
        if self.is_json:
            parts = [(json.dumps(text, ensure_ascii=False)[1:-1], ours) for text, ours in parts]
        return parts


Layout = list[Part | Content]
"""A rendered template: its markup and the places of the contents, in order."""


def text_of(item: Part | Content) -> str:
    """The text of a piece of markup; empty for the place of a content."""
    return "" if isinstance(item, Content) else item[0]


def place_contents(layout: Layout, contents: list[list[Part]]) -> list[Part]:
    """The text of a layout with these contents, one for each message."""
    parts: list[Part] = []
    for item in layout:
        if isinstance(item, Content):
            parts += item.place(contents[item.message])
        else:
            parts.append(item)
    return parts


class ChatTemplate:
    """The chat template of one tokenizer.

    Every method raises a one-line ValueError that begins with `where` for a template that cannot be
    split, raises an error, recurses or does not end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str):
        self._tokenizer = tokenizer
        self._where = where
        self._prompts: dict[tuple[tuple[str, ...], str], Layout] = {}
        self.result_role = RESULT_ROLES[0]
        """The role under which the template accepts tool results."""

    def prompt(self, roles: tuple[str, ...], tools: list[dict]) -> Layout:
        """The layout of opening messages of these roles with the generation prompt; cached."""
        key = (roles, json.dumps(tools))
        if key not in self._prompts:
            self._prompts[key] = self._split(roles, tools)
        return self._prompts[key]

    def between_replies(self) -> Layout:
        """Everything between a reply and the next one, beginning with the reply's end token. The
        tool result is the content of message 0."""
        exchange = self._exchange()
        places = {item.message: i for i, item in enumerate(exchange) if isinstance(item, Content)}
        reply, result = places[1], places[2]
        if reply > result:
            raise self._error("a reply stands after its tool result")
        layout: Layout = []
        for item in exchange[reply + 1 :]:
            layout.append(replace(item, message=0) if isinstance(item, Content) else item)
        return layout

    @property
    def opened(self) -> str:
        """The beginning of a reply that the generation prompt has already written: some templates
        open its thought."""
        end = text_of(self.prompt(("user",), [])[-1])
        for tag in ("<think>\n", "<think>"):
            if end.endswith(tag):
                return tag
        return ""

    def text(self, messages: list[dict], tools: list[dict]) -> str:
        """What the template makes of these messages, generation prompt included."""
        text: str = self._apply(messages, tools, tokenize=False)
        return text

    def ids(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """The same as the tokenizer's own ids."""
        ids: list[int] = self._apply(messages, tools, tokenize=True)
        return ids

    def _apply(self, messages: list[dict], tools: list[dict], tokenize: bool) -> Any:
        """What `apply_chat_template` returns on `TEMPLATE_DATE`."""

        def apply() -> Any:
            template = self._tokenizer.get_chat_template(tools=tools or None)
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[*tools] or None,
                chat_template=on_fixed_date(template),
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
            )

        try:
            return _within(MAX_RENDER_SECS, apply)
        except TimeoutError:
            raise self._error(f"it did not end within {MAX_RENDER_SECS} seconds") from None
        except TEMPLATE_ERRORS as error:
            said = (str(error).splitlines() or [""])[0][:200]
            raise self._error(f"{type(error).__name__}: {said}") from error

    def _exchange(self) -> Layout:
        """The layout of a question, a reply, a tool result and the generation prompt. ValueError,
        about the first way of showing a result, if the template accepts none."""
        errors = []
        for role, tools in product(RESULT_ROLES, ([SAMPLE_TOOL], [])):
            self.result_role = role
            try:
                return self._split(("user", "assistant", role), tools)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def _split(self, roles: tuple[str, ...], tools: list[dict]) -> Layout:
        """Render messages of these roles and split the text at their contents."""
        marks = [f"content{number}standin" for number in range(len(roles))]
        text = self._render_contents(roles, marks, tools)
        for role, mark in zip(roles, marks, strict=True):
            if text.count(mark) != 1:
                raise self._error(
                    f"it writes the text of a {role} message {text.count(mark)} times"
                )
        layout: Layout = []
        end = 0
        for number in sorted(range(len(roles)), key=lambda i: text.index(marks[i])):
            start = text.index(marks[number])
            layout.append((text[end:start], True))
            if roles[number] == "assistant":  # only its place matters: a policy writes the reply
                layout.append(Content(number))
            else:
                layout.append(self._probe(roles, marks, number, tools, text))
            end = start + len(marks[number])
        layout.append((text[end:], True))
        return layout

    def _probe(
        self, roles: tuple[str, ...], marks: list[str], number: int, tools: list[dict], text: str
    ) -> Content:
        """What the template does to the content of message `number`. `text` is the rendering with
        the stand-ins `marks` as contents."""
        mark = marks[number]
        content = PROBE.format(mark)
        probed = [content if i == number else mark for i, mark in enumerate(marks)]
        seen = self._render_contents(roles, probed, tools)
        for is_trimmed, is_json in product((False, True), repeat=2):
            place = Content(number, is_trimmed, is_json)
            written = "".join(part for part, _ in place.place([(content, False)]))
            if seen == text.replace(mark, written):
                return place
        raise self._error(f"it changes the text of a {roles[number]} message")

    def _render_contents(
        self, roles: tuple[str, ...], contents: list[str], tools: list[dict]
    ) -> str:
        messages = []
        for role, content in zip(roles, contents, strict=True):
            messages.append({"role": role, "content": content})
        return self.text(messages, tools)

    def _error(self, why: str) -> ValueError:
        return ValueError(
            f"{self._where}: its chat template cannot be used: {why}; use an instruct model whose "
            "template takes system, user, assistant and tool messages and writes them as they are"
        )


def on_fixed_date(template: str) -> str:
    """The template with `strftime_now` fixed to `TEMPLATE_DATE`; everything else is unchanged."""
    if "strftime_now" not in template:
        return template
    filters = ""
    for code in [*DATE_CODES, "-d", "-m"]:
        filters += f" | replace('%{code}', '{TEMPLATE_DATE.strftime('%' + code)}')"
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}"
    return f"{macro}\n{template}"


def _trim(parts: list[Part]) -> list[Part]:
    """The parts without white space at the two ends of their text."""
    parts = list(parts)
    while parts and not parts[0][0].strip():
        parts.pop(0)
    while parts and not parts[-1][0].strip():
        parts.pop()
    if parts:
        parts[0] = (parts[0][0].lstrip(), parts[0][1])
        parts[-1] = (parts[-1][0].rstrip(), parts[-1][1])
    return parts


def _within(secs: float, call: Callable[[], T]) -> T:
    """What the call returns or raises, or TimeoutError after `secs` seconds. Its thread cannot be
    stopped, but it does not keep the process alive."""
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except TEMPLATE_ERRORS as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(secs)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
