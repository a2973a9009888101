"""The messages of a trajectory, whoever wrote them, as an opening, replies and observations.

These forms are read:

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": ".."}, ..],
     "tools": [..] or its JSON text}                                       OpenAI, TRL, mtsql
    {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation" | "system",
                        "value": ".."}, ..], "tools": ".."}                ShareGPT, LLaMA-Factory

An assistant message holds its thought in `reasoning_content` or as `<think>` in its content, and
its call in `tool_calls` or as `<tool_call>` in its content. Both become the text of one reply, in
the form of `format_reply`. A user message in `<tool_response>` tags is a tool result.
"""

import json
from dataclasses import dataclass
from typing import Any

from mtsql.agent.protocol import THINK, TOOL_CALL, TOOL_RESPONSE
from mtsql.files import parse_json

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}
ROLES = ("system", "user", "assistant", "tool")
SEVERAL = "several calls"
"""The role of an assistant message with more than one call: the environment answers one."""
OPEN_RESULT, CLOSE_RESULT = f"<{TOOL_RESPONSE}>", f"</{TOOL_RESPONSE}>"


@dataclass(frozen=True)
class Conversation:
    """One question and its episode. After `replies[k]` the model read `observations[k]`; there is
    one observation fewer than replies."""

    opening: list[dict[str, str]]
    """The system and user messages before the first reply."""
    tools: list[dict[str, Any]]
    replies: list[str]
    observations: list[str]


def read_conversation(record: dict[str, Any], where: str) -> Conversation | str:
    """The conversation of a record, or why it is not one question with replies and tool results by
    turns. ValueError that begins with `where` and names the key if the record is malformed."""
    messages = _messages(record, where)
    tools = _tools(record, where)
    opening: list[dict[str, str]] = []
    while messages and messages[0][0] in ("system", "user"):
        role, content = messages.pop(0)
        opening.append({"role": role, "content": content})
    if all(message["role"] != "user" for message in opening):
        return "has no question before its first reply"
    roles = [role for role, _ in messages]
    if SEVERAL in roles:
        return "has several calls in a reply"
    if "user" in roles:
        return "has several questions"
    if roles[::2] != ["assistant"] * len(roles[::2]) or roles[1::2] != ["tool"] * len(roles[1::2]):
        return "has several tool results or replies in a row"
    if len(roles) % 2 == 0:
        return "does not end with a reply"
    texts = [content for _, content in messages]
    return Conversation(opening, tools, replies=texts[::2], observations=texts[1::2])


def _messages(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(role, content) of each message; the role is one of `ROLES`, or `SEVERAL`."""
    is_sharegpt = "messages" not in record and "conversations" in record
    name = "conversations" if is_sharegpt else "messages"
    entries = record.get(name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: {name}: expected a list of messages, found {entries!r:.80}")
    messages = []
    for number, entry in enumerate(entries):
        place = f"{where}: {name}[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected an object, found {entry!r:.80}")
        role, content = _sharegpt(entry, place) if is_sharegpt else _openai(entry, place)
        is_result = content.startswith(OPEN_RESULT) and content.endswith(CLOSE_RESULT)
        if role == "user" and is_result:
            role, content = "tool", content[len(OPEN_RESULT) : -len(CLOSE_RESULT)].strip("\n")
        messages.append((role, content))
    return messages


def _openai(entry: dict[str, Any], where: str) -> tuple[str, str]:
    role = entry.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: role: expected one of {', '.join(ROLES)}, found {role!r:.80}")
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls: expected a list, found {calls!r:.80}")
    is_bare = role == "assistant" and calls  # then the content may be null
    content = entry.get("content")
    if content is None and is_bare:
        content = ""
    if isinstance(content, list):  # [{"type": "text", "text": ".."}, ..]
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(_text(part, f"{where}: content[{i}]") for i, part in enumerate(parts))
    content = _text(content, f"{where}: content")
    if role != "assistant":
        return role, content
    written = [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]
    role = SEVERAL if len(calls) > 1 else role
    reply = "\n".join([*([content] if content else []), *written])
    thought = entry.get("reasoning_content") or ""
    if not thought:
        return role, reply
    thought = _text(thought, f"{where}: reasoning_content").strip("\n")
    return role, f"<{THINK}>\n{thought}\n</{THINK}>\n\n{reply}"


def _sharegpt(entry: dict[str, Any], where: str) -> tuple[str, str]:
    role = SHAREGPT_ROLES.get(str(entry.get("from")))
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"{where}: from: expected one of {known}, found {entry.get('from')!r:.80}")
    content = _text(entry.get("value"), f"{where}: value")
    if role != "call":
        return role, content
    thought, tag, rest = content.rpartition(f"</{THINK}>")
    calls = parse_json(rest, f"{where}: value")
    calls = calls if isinstance(calls, list) else [calls]
    written = [_call(call, f"{where}: value[{i}]") for i, call in enumerate(calls)]
    role = SEVERAL if len(calls) > 1 else "assistant"
    return role, (f"{thought}{tag}\n\n" if tag else "") + "\n".join(written)


def _call(call: object, where: str) -> str:
    """A structured call as the text of a reply."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"{where}: expected an object, found {call!r:.80}")
    name = _text(function.get("name"), f"{where}: name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: arguments: expected an object, found {arguments!r:.80}")
    given = {key: value for key, value in arguments.items() if value is not None}
    text = json.dumps({"name": name, "arguments": given}, ensure_ascii=False)
    return f"<{TOOL_CALL}>\n{text}\n</{TOOL_CALL}>"


def _tools(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The schemas of the tools, however they are written; empty without any."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools") if tools.strip() else []
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools: expected a list of objects, found {tools!r:.80}")
    return tools


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, found {value!r:.80}")
    return value
