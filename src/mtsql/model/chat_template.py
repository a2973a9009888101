"""The model's own chat template, cut apart once, so that none runs while episodes are played.

A template is rendered with a stand-in for each message's content, and the text is cut where the
stand-ins are. What stands between them is the template's markup: headers, end tokens, tool schemas,
a default system message. A second rendering, with a content that has spaces, quotes and line
breaks, shows what the template does to a content: nothing, trim it, or write it as a JSON string.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from typing import TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Part = tuple[str, bool]
"""A stretch of text, and whether it is ours: markup, in which added tokens are recognised. In data
none is."""

TEMPLATE_DATE = date(2024, 7, 26)
"""The date for templates that write today's date (Llama 3.2, SmolLM3): the same in every run,
resume and evaluation. It is the date that Llama 3.1's template has as its default."""
DATE_CODES = "aAbBdHIjmMpSUwWyYcxXZ"
MAX_RENDER_SECS = 20
"""A template that has not ended by then is taken for one that never does."""
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
"""Roles under which a tool result is shown: the first one that the template takes."""
SAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {}},
    },
}
"""What is offered when a tool result is rendered: some tokenizers have a template for that."""
PROBE = ' \n"é {} é\\\t \n'
"""A content with all that templates are known to change; the stand-in goes in the middle."""


@dataclass(frozen=True)
class Content:
    """The place of a message's content in a cut template, and what the template does to it."""

    message: int
    """Index of the message."""
    is_trimmed: bool = False
    """Whether white space at both ends is taken off."""
    is_json: bool = False
    """Whether it is written as the inside of a JSON string."""

    def place(self, parts: list[Part]) -> list[Part]:
        """The content as the template writes it."""
        if self.is_trimmed:
            parts = _trim(parts)
        if self.is_json:
            parts = [(json.dumps(text, ensure_ascii=False)[1:-1], ours) for text, ours in parts]
        return parts


Cut = list[Part | Content]
"""A rendered template as its markup and the places of the contents, in order."""


def place_contents(cut: Cut, contents: list[list[Part]]) -> list[Part]:
    """The parts of a cut template with these contents, one for each message."""
    parts: list[Part] = []
    for piece in cut:
        parts += piece.place(contents[piece.message]) if isinstance(piece, Content) else [piece]
    return parts


class ChatTemplate:
    """The chat template of one tokenizer.

    Every method raises a one-line ValueError that begins with `where` for a template that cannot be
    cut apart, raises, recurses or does not end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str):
        self._tokenizer = tokenizer
        self._where = where
        self._prompts: dict[tuple, Cut] = {}
        self.result_role = RESULT_ROLES[0]
        """The role under which the template takes tool results."""

    def prompt(self, roles: tuple[str, ...], tools: list[dict]) -> Cut:
        """The opening messages of these roles with the generation prompt, cut; cached."""
        key = roles, json.dumps(tools)
        if key not in self._prompts:
            self._prompts[key] = self._cut(roles, tools)
        return self._prompts[key]

    def between_replies(self) -> Cut:
        """All that stands between a reply and the next one, the end token of the reply included,
        with the tool result as the content of message 0."""
        cut = self._exchange()
        places = {piece.message: i for i, piece in enumerate(cut) if isinstance(piece, Content)}
        if places[1] > places[2]:
            raise self._error("a reply stands after its tool result")
        after = cut[places[1] + 1 :]
        return [replace(p, message=0) if isinstance(p, Content) else p for p in after]

    @property
    def opened(self) -> str:
        """What the generation prompt has already written of a reply: some templates open its
        thought."""
        end = self.prompt(("user",), [])[-1][0]
        return next((tag for tag in ("<think>\n", "<think>") if end.endswith(tag)), "")

    def render(
        self, messages: list[dict], tools: list[dict], tokenize: bool = False
    ) -> str | list[int]:
        """What `apply_chat_template` gives, generation prompt included, on `TEMPLATE_DATE`."""

        def apply() -> str | list[int]:
            template = self._tokenizer.get_chat_template(tools=tools or None)
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
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

    def _exchange(self) -> Cut:
        """A question, a reply, a tool result and the generation prompt, cut. ValueError, about the
        first way of showing a result, if the template takes none."""
        errors = []
        for role, tools in product(RESULT_ROLES, ([SAMPLE_TOOL], [])):
            self.result_role = role
            try:
                return self._cut(("user", "assistant", role), tools)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def _cut(self, roles: tuple[str, ...], tools: list[dict]) -> Cut:
        marks = [f"content{number}standin" for number in range(len(roles))]
        text = self._render_contents(roles, marks, tools)
        for role, mark in zip(roles, marks, strict=True):
            if text.count(mark) != 1:
                raise self._error(
                    f"it writes the text of a {role} message {text.count(mark)} times"
                )
        cut, end = [], 0
        for number in sorted(range(len(roles)), key=lambda i: text.index(marks[i])):
            start = text.index(marks[number])
            is_reply = roles[number] == "assistant"  # cut at, but never rendered by the template
            place = Content(number) if is_reply else self._probe(roles, marks, number, tools, text)
            cut += [(text[end:start], True), place]
            end = start + len(marks[number])
        return [*cut, (text[end:], True)]

    def _probe(
        self, roles: tuple[str, ...], marks: list[str], number: int, tools: list[dict], text: str
    ) -> Content:
        """What the template does to the content of message `number`."""
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
        pairs = zip(roles, contents, strict=True)
        return self.render([{"role": role, "content": content} for role, content in pairs], tools)

    def _error(self, why: str) -> ValueError:
        return ValueError(
            f"{self._where}: its chat template cannot be used: {why}; use an instruct model whose "
            "template takes system, user, assistant and tool messages and writes them as they are"
        )


def on_fixed_date(template: str) -> str:
    """The template with `strftime_now` on `TEMPLATE_DATE`, everything else unchanged."""
    if "strftime_now" not in template:
        return template
    codes = "".join(
        f" | replace('%{code}', '{TEMPLATE_DATE.strftime('%' + code)}')"
        for code in [*DATE_CODES, "-d", "-m"]
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n{template}"


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
    """What the call returns or raises, or TimeoutError after so many seconds. Its thread cannot be
    stopped, but does not keep the process alive."""
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
