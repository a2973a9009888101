"""Change a demonstration into what an agent with fewer tools would do.

A demonstration is the list of replies that answers one turn: tool calls, then the answer. It was
written for an agent with both of the paper's tools. `fit` removes the calls of a tool that is not
in use, and what only makes sense because of them: their verdicts, thoughts about what they showed,
and calls that were given up only because of them.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict
from mtsql.sql.dialogues import Turn

VERDICT_ON = {EXEC_SQL: "exec_verdict", MEMORY_RETRIEVE: "memory_verdict"}
"""The field of a reply that judges what a tool returned, by the tool's name."""


LITERAL = re.compile(r"'([^']+)'|\b(\d+(?:\.\d+)?)\b")
"""A text or number in a query."""


def fit(replies: list[Reply], offered: Collection[str], turn: Turn) -> list[Reply]:
    """The replies of an agent that has only the tools `offered`.

    A verdict or a thought of a removed reply moves to the next reply that is kept, if it still
    holds there. If both tools are offered, the replies are returned unchanged.
    """
    missing = VERDICT_ON.keys() - set(offered)
    if not missing:
        return replies
    removed = _removed(replies, missing)
    fitted: list[Reply] = []
    thoughts: list[str] = []
    verdicts: dict[str, Verdict] = {}
    for index, reply in enumerate(replies):
        if reply.think and _still_holds(replies, index, removed, missing, turn):
            thoughts.append(reply.think)
        for tool in VERDICT_ON.keys() - missing:
            verdict = getattr(reply, VERDICT_ON[tool])
            if verdict is not None and _last_call(replies, index, tool) not in removed:
                verdicts[VERDICT_ON[tool]] = verdict
        if index not in removed:
            judged: dict[str, Any] = {field: verdicts.get(field) for field in VERDICT_ON.values()}
            fitted.append(replace(reply, think="\n".join(thoughts), **judged))
            thoughts, verdicts = [], {}
    return fitted


def _removed(replies: list[Reply], missing: Collection[str]) -> set[int]:
    """The indices of the replies to remove: all calls of a missing tool, and earlier calls with the
    same query if it was given up and only a missing tool had found fault with it."""
    removed = {index for index, reply in enumerate(replies) if _tool(reply) in missing}
    for index in sorted(removed):
        query = _query(replies[index])
        is_given_up = _is_refused(replies, index) and query != _query(replies[-1])
        if not is_given_up:
            continue
        for earlier in range(index):
            if _query(replies[earlier]) == query and not _is_refused(replies, earlier):
                removed.add(earlier)
    return removed


def _still_holds(
    replies: list[Reply], index: int, removed: set[int], missing: Collection[str], turn: Turn
) -> bool:
    """Whether the thought of a reply makes sense to an agent without the missing tools.

    A thought describes the observation before it, so it is removed together with the call that led
    to that observation. The exception is a thought that refuses a query as incoherent: it is about
    the conversation, which the agent sees in any case, unless it names a value of the answer that
    only the memory has shown. The first thought is about the query that
    follows, so it is kept only if the first reply that is kept gives that query. A thought that
    names a missing tool is always removed.
    """
    reply = replies[index]
    if any(tool in reply.think for tool in missing):
        return False
    if index == 0:
        staying = [other for place, other in enumerate(replies) if place not in removed]
        return bool(staying) and _query(staying[0]) == _query(reply)
    if index - 1 not in removed:
        return True
    return reply.memory_verdict is Verdict.NO_PASS and not _names_unsaid(
        reply.think, _query(replies[-1]), turn
    )


def _names_unsaid(think: str, gold: str, turn: Turn) -> bool:
    """Whether a thought names a literal of the answer that the conversation does not say."""
    said = " ".join([turn.question, *(text for pair in turn.history for text in pair)]).lower()
    literals = [text or number for text, number in LITERAL.findall(gold.lower())]
    return any(value in think.lower() and value not in said for value in literals)


def _is_refused(replies: list[Reply], call: int) -> bool:
    """Whether the verdict on the call at this index, if there is one, is no_pass."""
    tool = _tool(replies[call])
    if tool not in VERDICT_ON:
        return False
    for index in range(call + 1, len(replies)):
        verdict = getattr(replies[index], VERDICT_ON[tool])
        if verdict is not None:
            return verdict is Verdict.NO_PASS
        if _tool(replies[index]) == tool:
            break
    return False


def _last_call(replies: list[Reply], before: int, tool: str) -> int | None:
    """The index of the last call of a tool before a reply."""
    calls = [index for index in range(before) if _tool(replies[index]) == tool]
    return calls[-1] if calls else None


def _tool(reply: Reply) -> str | None:
    """The name of the tool that a reply calls."""
    return reply.action.name if isinstance(reply.action, ToolCall) else None


def _query(reply: Reply) -> str:
    """The query that a reply calls a tool with or answers with, with single spaces."""
    query = ""
    match reply.action:
        case ToolCall(arguments={"code": str(code)}):
            query = code
        case Answer(sql):
            query = sql
    return " ".join(query.split())
