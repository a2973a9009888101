"""The model's reply as data. Total: any string gives a `Reply`, with a named error in it if it
cannot be acted on.

A reply is, in this order and each part optional: `<think>..</think>`,
`<exec_verify>..</exec_verify>`, `<memory_verify>..</memory_verify>`, then one
`<tool_call>{json}</tool_call>` or one `<answer_sql>..</answer_sql>`.

What models write instead is read, too: thoughts anywhere, tags inside a thought (they are thoughts,
not actions), tags named in a sentence, JSON with the slips that lenient.py mends, SQL in a Markdown
fence, several calls in one tag, a call without its closing tag, `parameters` for `arguments`, and
Llama 3.1's call, which is a JSON object without tags. Time is linear in the reply.
"""

import json
import re
from dataclasses import dataclass, field
from enum import Enum

from mtsql.agent.lenient import read_json_at, read_json_with_slips, without_fence


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
    """A well-formed call: the tool's name and its one argument."""

    name: str
    code: str


@dataclass(frozen=True)
class Reply:
    """One model reply. At most one of `tool_call`, `answer`, `error` is set; a missing verdict is
    None."""

    think: str = ""
    exec_verdict: Verdict | None = None
    memory_verdict: Verdict | None = None
    tool_call: ToolCall | None = None
    answer: str | None = None
    error: ParseError | None = None


def parse_reply(text: str) -> Reply:
    """Parse a reply.

    With both a tool call and an answer the call counts (the episode goes on, as in the paper); of
    several calls the first counts, of several answers the last. Actions that are not well formed
    count only if no other action is: then the first one is the reply's error. Half of a surrogate
    pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
    """
    parts = _take_apart(text)
    said = "".join(parts.outside)
    if not (parts.calls or parts.answers or parts.errors):
        _read_bare_call(said, parts)
    call = parts.calls[0] if parts.calls else None
    answer = parts.answers[-1] if parts.answers and call is None else None
    error = None
    if call is None and answer is None:
        nothing = ParseError.NO_ACTION if parts.is_closed else ParseError.UNCLOSED_THINK
        error = parts.errors[0] if parts.errors else nothing
    return Reply(
        think="\n".join(parts.thoughts),
        exec_verdict=_verdict(said, "exec_verify"),
        memory_verdict=_verdict(said, "memory_verify"),
        tool_call=call,
        answer=answer,
        error=error,
    )


def format_reply(reply: Reply) -> str:
    """The canonical text of a well-formed reply; `parse_reply` gives the reply back.

    It is what Qwen3's chat template writes for a message with `reasoning_content` (the thought),
    `content` (the verdicts, each on a line, or the answer after them) and `tool_calls`. Templates
    that write calls in another form or leave the thought out, as Llama 3.1's does beside a call,
    give this text only as `content`.
    """
    parts = []
    for tag, verdict in (
        ("exec_verify", reply.exec_verdict),
        ("memory_verify", reply.memory_verdict),
    ):
        if verdict is not None:
            parts.append(f"<{tag}>{verdict.value}</{tag}>")
    if reply.tool_call is not None:
        call = {"name": reply.tool_call.name, "arguments": {"code": reply.tool_call.code}}
        parts.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
    elif reply.answer is not None:
        parts.append(f"<answer_sql>{reply.answer}</answer_sql>")
    thought = f"<think>\n{reply.think}\n</think>\n\n" if reply.think else ""
    return thought + "\n".join(parts)


@dataclass
class _Parts:
    """What a reply consists of. `outside` is the text outside thoughts and actions."""

    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    errors: list[ParseError] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    is_closed: bool = True
    """Whether the last thought is."""

    def add_call(self, call: ToolCall | ParseError) -> None:
        (self.calls if isinstance(call, ToolCall) else self.errors).append(call)


_TAG = re.compile("<(think|tool_call|answer_sql)>|</think>")
MAX_ERRORS = 100
"""After so many actions that are not well formed a reply is not read on. Each costs as much time as
the reply is long."""


def _take_apart(text: str) -> _Parts:
    """A thought may stand anywhere but inside an action. The first one may have been opened by the
    prompt, as some templates do: then all that stands before its end is the thought."""
    parts, start = _Parts(), 0
    last_close = {tag: text.rfind(f"</{tag}>") for tag in ("tool_call", "answer_sql")}
    while len(parts.errors) < MAX_ERRORS and (found := _TAG.search(text, start)):
        parts.outside.append(text[start : found.start()])
        start = found.end()
        if found[0] == "</think>":
            if not parts.thoughts:
                parts = _Parts(thoughts=[text[: found.start()].strip()])
        elif found[1] == "think":
            end = text.find("</think>", start)
            parts.is_closed = end >= 0
            parts.thoughts.append((text[start:end] if parts.is_closed else text[start:]).strip())
            start = end + len("</think>") if parts.is_closed else len(text)
        else:
            read = _read_call if found[1] == "tool_call" else _read_answer
            start = read(text, start, last_close[found[1]] >= start, parts)
    parts.outside.append(text[start:])
    return parts


_BEFORE_CALL = re.compile(r"\s*(?:```\w*\s*)?")
_AFTER_CALL = re.compile(r"\s*(?:```\s*)?(?:</tool_call>|(?=<tool_call>)|(?:<\|\w+\|>\s*)*\Z)")


def _read_call(text: str, start: int, has_close: bool, parts: _Parts) -> int:
    """Read the call after an opening tag, and return where to read on. `has_close`: whether a
    closing tag follows somewhere.

    The JSON object says where the call ends, because an SQL literal may spell the closing tag. So
    the closing tag may be missing where the reply ends or the next call begins. If no object
    follows, the tag was only named, and what stands after it is read on.
    """
    body = _BEFORE_CALL.match(text, start).end()
    value, end = read_json_at(text, body)
    closing = None if value is None else _AFTER_CALL.match(text, end)
    if closing is not None and (has_close or isinstance(_as_call(value), ToolCall)):
        parts.add_call(_as_call(value))
        return closing.end()
    if not has_close:
        parts.errors.append(ParseError.UNCLOSED_CALL)
        return start if value is None else end
    if not text.startswith(("{", "["), body):
        parts.errors.append(ParseError.BAD_JSON)
        return start
    close = text.find("</tool_call>", start)
    again = text.find("<tool_call>", body, close)
    value = read_json_with_slips(text[body : close if again < 0 else again])
    parts.add_call(ParseError.BAD_JSON if value is None else _as_call(value))
    return close + len("</tool_call>") if again < 0 else again


def _as_call(value: dict | list) -> ToolCall | ParseError:
    """A Hermes call is a JSON object with `name` and `arguments` (an object, or that object as a
    JSON string). Llama 3.1 writes `parameters` instead, and OpenAI's format has the object under
    `function`. Of a list of calls the first counts."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ParseError.NO_NAME
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments, _ = read_json_at(arguments, 0)
    if not isinstance(arguments, dict) or not isinstance(arguments.get("code"), str):
        return ParseError.BAD_ARGUMENTS
    return ToolCall(_whole(value["name"]), without_fence(_whole(arguments["code"])))


_BEFORE_BARE_CALL = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?:```\w*\s*)?")


def _read_bare_call(said: str, parts: _Parts) -> None:
    """Add the call of a reply that is a JSON object without tags, as Llama 3.1 writes it."""
    text = _VERDICT.sub("", said)
    text = text[_BEFORE_BARE_CALL.match(text).end() :]
    value = read_json_with_slips(text) if text.startswith(("{", "[")) else None
    if value is not None and (call := _as_call(value)) is not ParseError.NO_NAME:
        parts.add_call(call)


_ANSWER_TAG = re.compile("""(?<![a-wyzA-WYZ])'(?:[^']|'')*'|"(?:[^"]|"")*"|</?answer_sql>""")
"""A literal, or a tag. An apostrophe inside a word opens no literal."""


def _read_answer(text: str, start: int, has_close: bool, parts: _Parts) -> int:
    """Read the answer after an opening tag, and return where to read on. `has_close`: as above.

    A tag inside an SQL literal is a part of the answer. If the opening tag comes again before the
    closing one, the earlier one was only named.
    """
    if not has_close:
        parts.errors.append(ParseError.UNCLOSED_ANSWER)
        return start
    at, close = start, -1
    for found in _ANSWER_TAG.finditer(text, start):
        if found[0] == "<answer_sql>":
            at = found.end()
        elif found[0] == "</answer_sql>":
            close = found.start()
            break
    first = text.find("</answer_sql>", start)
    if close < 0:  # an odd quote is no literal
        at, close = text.rfind("<answer_sql>", start, first), first
        at = start if at < 0 else at + len("<answer_sql>")
    sql = without_fence(text[at:close].strip())
    if sql:
        parts.answers.append(sql)
    else:
        parts.errors.append(ParseError.EMPTY_ANSWER)
    return close + len("</answer_sql>")


_VERDICT = re.compile(
    r"<(exec_verify|memory_verify)>\s*(?:(pass)|no[_ -]pass)\s*</\1>", re.IGNORECASE
)


def _verdict(said: str, tag: str) -> Verdict | None:
    """The first verdict of a tag; None if there is none that says pass or no_pass."""
    for found in _VERDICT.finditer(said):
        if found[1].lower() == tag:
            return Verdict.PASS if found[2] else Verdict.NO_PASS
    return None


def _whole(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no file and no tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
