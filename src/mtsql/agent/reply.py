"""The model's reply as data. Parsing is total: any string gives a `Reply`, whose action is a named
error if there is nothing to act on.

A reply is, in this order and each part optional: `<think>..</think>`,
`<exec_verify>..</exec_verify>`, `<memory_verify>..</memory_verify>`, then one
`<tool_call>{json}</tool_call>` or one `<answer_sql>..</answer_sql>`.

The parser also reads what models write instead: thoughts anywhere, tags inside a thought (they are
thoughts, not actions), tags named in a sentence, JSON with the slips that lenient.py repairs, SQL
in a Markdown fence, several calls in one tag, a call without its closing tag, `parameters` for
`arguments`, and Llama 3.1's call, which is a JSON object without tags. Time is linear in the reply.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mtsql.agent.lenient import read_json_at, read_json_with_slips, skip, without_fence
from mtsql.agent.protocol import (
    ANSWER_SQL,
    EXEC_VERIFY,
    MEMORY_VERIFY,
    THINK,
    TOOL_CALL,
    Parameter,
    code,
)

ToolParameters = Mapping[str, tuple[Parameter, ...]]
"""The parameters of each tool in use, by the tool's name."""
UNKNOWN_TOOL = code("")
"""What a call of any other tool must have. The environment then answers that there is no such
tool."""


class Verdict(Enum):
    """What the model says after looking at an observation."""

    PASS = "pass"
    NO_PASS = "no_pass"


class ParseError(Enum):
    """Why a reply cannot be acted on."""

    UNCLOSED_THINK = "unclosed_think"
    UNCLOSED_CALL = "unclosed_call"
    UNCLOSED_ANSWER = "unclosed_answer"
    BAD_JSON = "bad_json"
    NO_NAME = "no_name"
    BAD_ARGUMENTS = "bad_arguments"
    EMPTY_ANSWER = "empty_answer"
    NO_ACTION = "no_action"


@dataclass(frozen=True)
class ToolCall:
    """A well-formed call: `ToolCall("exec_sql", {"code": "SELECT 1"})`."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The query with which the model ends the episode."""

    sql: str


Action = ToolCall | Answer | ParseError


@dataclass(frozen=True)
class Reply:
    """One model reply: what it does, its thought and its verdicts. A missing verdict is None."""

    action: Action
    think: str = ""
    exec_verdict: Verdict | None = None
    memory_verdict: Verdict | None = None


def parse_reply(text: str, tools: ToolParameters | None = None) -> Reply:
    """Parse a reply to an environment with these `tools`.

    If there are a tool call and an answer, the call counts (the episode continues, as in the
    paper). Of several calls the first counts, of several answers the last. Malformed actions count
    only if no other action is well formed: then the first one is the reply's error. Half of a
    surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
    """
    tools = {} if tools is None else tools
    parts = _take_apart(text, tools)
    said = "".join(parts.outside)
    if not (parts.calls or parts.answers or parts.errors):
        _read_bare_call(said, parts, tools)
    return Reply(
        _action(parts),
        think="\n".join(parts.thoughts),
        exec_verdict=_verdict(said, EXEC_VERIFY),
        memory_verdict=_verdict(said, MEMORY_VERIFY),
    )


def format_reply(reply: Reply) -> str:
    """The canonical text of a well-formed reply. `parse_reply` turns the text into the same reply.

    It is what Qwen3's chat template writes for a message with `reasoning_content` (the thought),
    `content` (the verdicts, each on a line, or the answer after them) and `tool_calls`. Templates
    that write calls in another form or leave the thought out, as Llama 3.1's does beside a call,
    give this text only as `content`.
    """
    lines = []
    if reply.exec_verdict is not None:
        lines.append(f"<{EXEC_VERIFY}>{reply.exec_verdict.value}</{EXEC_VERIFY}>")
    if reply.memory_verdict is not None:
        lines.append(f"<{MEMORY_VERIFY}>{reply.memory_verdict.value}</{MEMORY_VERIFY}>")
    match reply.action:
        case ToolCall(name, arguments):
            call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            lines.append(f"<{TOOL_CALL}>\n{call}\n</{TOOL_CALL}>")
        case Answer(sql):
            lines.append(f"<{ANSWER_SQL}>{sql}</{ANSWER_SQL}>")
    thought = f"<{THINK}>\n{reply.think}\n</{THINK}>\n\n" if reply.think else ""
    return thought + "\n".join(lines)


@dataclass
class _Parts:
    """The parts of a reply."""

    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    errors: list[ParseError] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    """Text outside thoughts and actions."""
    is_closed: bool = True
    """Whether the last thought has its closing tag."""

    def add_call(self, call: ToolCall | ParseError) -> None:
        """Add a call, or the reason why it is none."""
        if isinstance(call, ToolCall):
            self.calls.append(call)
        else:
            self.errors.append(call)


def _action(parts: _Parts) -> Action:
    """The part that counts."""
    if parts.calls:
        return parts.calls[0]
    if parts.answers:
        return Answer(parts.answers[-1])
    if parts.errors:
        return parts.errors[0]
    return ParseError.NO_ACTION if parts.is_closed else ParseError.UNCLOSED_THINK


OPEN_THINK, CLOSE_THINK = f"<{THINK}>", f"</{THINK}>"
OPEN_CALL, CLOSE_CALL = f"<{TOOL_CALL}>", f"</{TOOL_CALL}>"
OPEN_ANSWER, CLOSE_ANSWER = f"<{ANSWER_SQL}>", f"</{ANSWER_SQL}>"
_TAG = re.compile(f"{OPEN_THINK}|{OPEN_CALL}|{OPEN_ANSWER}|{CLOSE_THINK}")
MAX_ERRORS = 100
"""After this many malformed actions the rest of a reply is not read. Each of them takes time in
proportion to the whole reply."""


def _take_apart(text: str, tools: ToolParameters) -> _Parts:
    """A thought may stand anywhere but inside an action. The first one may have been opened by the
    prompt, as some templates do: then all text before its end is the thought."""
    parts, start = _Parts(), 0
    last_close_call = text.rfind(CLOSE_CALL)
    last_close_answer = text.rfind(CLOSE_ANSWER)
    while len(parts.errors) < MAX_ERRORS and (found := _TAG.search(text, start)):
        parts.outside.append(text[start : found.start()])
        start = found.end()
        if found[0] == CLOSE_THINK:
            if not parts.thoughts:
                parts = _Parts(thoughts=[text[: found.start()].strip()])
        elif found[0] == OPEN_THINK:
            start = _read_thought(text, start, parts)
        elif found[0] == OPEN_CALL:
            start = _read_call(text, start, last_close_call >= start, parts, tools)
        else:
            start = _read_answer(text, start, last_close_answer >= start, parts)
    parts.outside.append(text[start:])
    return parts


def _read_thought(text: str, start: int, parts: _Parts) -> int:
    """Read the thought after an opening tag, and return where to read on. A thought without a
    closing tag is the rest of the reply."""
    end = text.find(CLOSE_THINK, start)
    parts.is_closed = end >= 0
    if not parts.is_closed:
        parts.thoughts.append(text[start:].strip())
        return len(text)
    parts.thoughts.append(text[start:end].strip())
    return end + len(CLOSE_THINK)


_BEFORE_CALL = re.compile(r"\s*(?:```\w*\s*)?")
_AFTER_CALL = re.compile(rf"\s*(?:```\s*)?(?:{CLOSE_CALL}|(?={OPEN_CALL})|(?:<\|\w+\|>\s*)*\Z)")


def _read_call(text: str, start: int, has_close: bool, parts: _Parts, tools: ToolParameters) -> int:
    """Read the call after an opening tag, and return where to read on. `has_close`: whether a
    closing tag follows somewhere.

    The JSON object says where the call ends, because an SQL literal may spell the closing tag.
    Therefore the closing tag may be missing where the reply ends or the next call begins. If no
    object follows, the tag was only named, and the parser reads on after it.
    """
    body = skip(_BEFORE_CALL, text, start)
    value, end = read_json_at(text, body)
    closing = None if value is None else _AFTER_CALL.match(text, end)
    if value is not None and closing is not None:
        call = _as_call(value, tools)
        if has_close or isinstance(call, ToolCall):
            parts.add_call(call)
            return closing.end()
    if not has_close:
        parts.errors.append(ParseError.UNCLOSED_CALL)
        return start if value is None else end
    if not text.startswith(("{", "["), body):
        parts.errors.append(ParseError.BAD_JSON)
        return start
    close = text.find(CLOSE_CALL, start)
    again = text.find(OPEN_CALL, body, close)
    value = read_json_with_slips(text[body : close if again < 0 else again])
    parts.add_call(ParseError.BAD_JSON if value is None else _as_call(value, tools))
    return close + len(CLOSE_CALL) if again < 0 else again


def _as_call(value: dict | list, tools: ToolParameters) -> ToolCall | ParseError:
    """A Hermes call is a JSON object with `name` and `arguments` (an object, or that object as a
    JSON string). Llama 3.1 writes `parameters` instead, and OpenAI's format has the object under
    `function`. Of a list of calls the first counts."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ParseError.NO_NAME
    name = _without_surrogates(value["name"])
    given = value.get("arguments", value.get("parameters"))
    if given is None or given == "":  # no arguments, as a tool without required ones may be called
        given = {}
    elif isinstance(given, str):
        given, _ = read_json_at(given, 0)
    if not isinstance(given, dict):
        return ParseError.BAD_ARGUMENTS
    arguments = _fitting(given, tools.get(name, UNKNOWN_TOOL))
    return ParseError.BAD_ARGUMENTS if arguments is None else ToolCall(name, arguments)


def _fitting(given: dict[str, Any], parameters: tuple[Parameter, ...]) -> dict[str, Any] | None:
    """The arguments that a tool declares; others are left out. None if a required one is missing
    or one has another type. An optional argument may be null instead of missing."""
    arguments = {}
    for parameter in parameters:
        value = given.get(parameter.name)
        if value is None and not parameter.is_required:
            continue
        if not parameter.accepts(value):
            return None
        try:
            value = _without_surrogates(value)
        except RecursionError:  # nested hundreds of levels deep
            return None
        arguments[parameter.name] = without_fence(value) if parameter.type == "sql" else value
    return arguments


_BEFORE_BARE_CALL = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?:```\w*\s*)?")


def _read_bare_call(said: str, parts: _Parts, tools: ToolParameters) -> None:
    """Add the call of a reply that is a JSON object without tags, as Llama 3.1 writes it."""
    text = _VERDICT.sub("", said)
    text = text[skip(_BEFORE_BARE_CALL, text, 0) :]
    if not text.startswith(("{", "[")):
        return
    value = read_json_with_slips(text)
    call = ParseError.NO_NAME if value is None else _as_call(value, tools)
    if call is not ParseError.NO_NAME:
        parts.add_call(call)


_ANSWER_TAG = re.compile(
    rf"""(?<![a-wyzA-WYZ])'(?:[^']|'')*'|"(?:[^"]|"")*"|{OPEN_ANSWER}|{CLOSE_ANSWER}"""
)
"""A literal, or a tag. An apostrophe inside a word opens no literal; after an x it does, because
X'00' is a BLOB."""


def _read_answer(text: str, start: int, has_close: bool, parts: _Parts) -> int:
    """Read the answer after an opening tag, and return where to read on. `has_close`: whether a
    closing tag follows somewhere.

    A tag inside an SQL literal is a part of the answer. If the opening tag comes again before the
    closing one, the earlier one was only named.
    """
    if not has_close:
        parts.errors.append(ParseError.UNCLOSED_ANSWER)
        return start
    begin, close = start, -1
    for found in _ANSWER_TAG.finditer(text, start):
        if found[0] == OPEN_ANSWER:
            begin = found.end()
        elif found[0] == CLOSE_ANSWER:
            close = found.start()
            break
    if close < 0:
        # Every closing tag seems to stand in a literal, so an odd quote is no literal's beginning.
        close = text.find(CLOSE_ANSWER, start)
        again = text.rfind(OPEN_ANSWER, start, close)
        begin = start if again < 0 else again + len(OPEN_ANSWER)
    sql = without_fence(text[begin:close].strip())
    if sql:
        parts.answers.append(sql)
    else:
        parts.errors.append(ParseError.EMPTY_ANSWER)
    return close + len(CLOSE_ANSWER)


_VERDICT = re.compile(
    rf"<({EXEC_VERIFY}|{MEMORY_VERIFY})>\s*(?:(pass)|no[_ -]pass)\s*</\1>", re.IGNORECASE
)


def _verdict(said: str, tag: str) -> Verdict | None:
    """The first verdict of a tag; None if there is none that says pass or no_pass."""
    for found in _VERDICT.finditer(said):
        if found[1].lower() == tag:
            return Verdict.PASS if found[2] else Verdict.NO_PASS
    return None


def _without_surrogates(value: Any) -> Any:
    """A JSON value with U+FFFD for each lone surrogate, which no file and no tokenizer takes."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value
