"""The model's reply as data. Total: any string gives a `Reply`, with a named error in it if it
cannot be acted on.

A reply is, in this order and each part optional: `<think>..</think>`,
`<exec_verify>..</exec_verify>`, `<memory_verify>..</memory_verify>`, then one
`<tool_call>{json}</tool_call>` or one `<answer_sql>..</answer_sql>`. Tags inside a thought are
thoughts, not actions, and there may be several thoughts. Time is linear in the reply.
"""

import json
import re
from dataclasses import dataclass
from enum import Enum


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
    """Parse a reply. With both a tool call and an answer the call counts (the episode goes on, as
    in the paper); of several calls the first counts, of several answers the last."""
    thoughts, rest, is_closed = _split_thoughts(text)
    think = "\n".join(thoughts)
    verdicts = {
        "exec_verdict": _verdict(rest, "exec_verify"),
        "memory_verdict": _verdict(rest, "memory_verify"),
    }
    call, answer = None, None
    error = ParseError.NO_ACTION if is_closed else ParseError.UNCLOSED_THINK
    if "<tool_call>" in rest:
        body = _inside(rest, "tool_call", last=False)
        call, error = _parse_call(body) if body is not None else (None, ParseError.UNCLOSED_CALL)
    elif "<answer_sql>" in rest:
        body = _inside(rest, "answer_sql", last=True)
        answer, error = (body, None) if body else (None, ParseError.EMPTY_ANSWER)
        if body is None:
            error = ParseError.UNCLOSED_ANSWER
    return Reply(think=think, **verdicts, tool_call=call, answer=answer, error=error)


_OPENING = re.compile("<(think|tool_call|answer_sql)>")


def _split_thoughts(text: str) -> tuple[list[str], str, bool]:
    """-> (thoughts, the text without them, whether the last thought is closed).

    A thought may stand anywhere but inside an action. The first one may have been opened by the
    prompt, as some templates do.
    """
    thoughts, kept, start = [], [], 0
    end, opening = text.find("</think>"), text.find("<think>")
    if 0 <= end and not 0 <= opening < end:
        thoughts, start = [text[:end].strip()], end + len("</think>")
    while found := _OPENING.search(text, start):
        closing = f"</{found[1]}>"
        end = text.find(closing, found.end())
        if found[1] == "think":
            kept.append(text[start : found.start()])
            if end < 0:
                thoughts.append(text[found.end() :].strip())
                return thoughts, "".join(kept), False
            thoughts.append(text[found.end() : end].strip())
        elif end < 0:
            break
        else:
            kept.append(text[start : end + len(closing)])
        start = end + len(closing)
    return thoughts, "".join([*kept, text[start:]]), True


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


def _inside(text: str, tag: str, last: bool) -> str | None:
    """Stripped text between the first (or last) opening tag and the close after it; None if it is
    not closed."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = (text.rfind(opening) if last else text.find(opening)) + len(opening)
    end = text.find(closing, start)
    return None if end < 0 else text[start:end].strip()


def _verdict(text: str, tag: str) -> Verdict | None:
    """The first verdict of a tag; None if it is missing or says anything else."""
    if f"<{tag}>" not in text:
        return None
    body = _inside(text, tag, last=False)
    return {"pass": Verdict.PASS, "no_pass": Verdict.NO_PASS}.get(body or "")


def _parse_call(body: str) -> tuple[ToolCall | None, ParseError | None]:
    """A Hermes call: a JSON object with `name` and `arguments` (an object, or that object as a JSON
    string)."""
    try:
        call = json.loads(body)
        arguments = call.get("arguments") if isinstance(call, dict) else None
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None, ParseError.BAD_JSON
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, ParseError.NO_NAME
    if not isinstance(arguments, dict) or not isinstance(arguments.get("code"), str):
        return None, ParseError.BAD_ARGUMENTS
    return ToolCall(call["name"], arguments["code"]), None
