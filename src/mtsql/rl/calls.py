"""The tool calls of an episode that count in rewards and abilities, each with its verdicts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from mtsql.agent.env import ReplyRecord
from mtsql.agent.reply import Answer, ToolCall, Verdict
from mtsql.sql.runnable import folded


@dataclass(frozen=True)
class ScoredCall:
    """A tool call, with the first verdict of each kind among the replies up to the next call that
    counts. None if they hold no such verdict."""

    tool: str
    record: ReplyRecord
    exec_verdict: Verdict | None = None
    memory_verdict: Verdict | None = None
    place: int = field(default=0, compare=False)
    """The index of the reply that holds the call."""
    exec_place: int = field(default=0, compare=False)
    """The index of the reply with which the execution verdict is settled: the one that holds it, or
    without one the last in which it was looked for."""
    memory_place: int = field(default=0, compare=False)
    """The same for the memory verdict."""

    @property
    def sql(self) -> str | None:
        """The query that the call proposed, if its tool takes one."""
        return self.record.sql


def calls_of(records: list[ReplyRecord], tools: tuple[str, ...]) -> list[ScoredCall]:
    """The calls of the tools in use, each different one once, at its first place.

    A call of another tool, a call that repeats an earlier one and a malformed call do not count:
    they neither add to a reward or an ability, nor take from it. Verdicts are looked for past such
    calls.
    """
    places = _places_that_count(records, tools)
    calls = []
    for number, place in enumerate(places):
        action = records[place].reply.action
        if not isinstance(action, ToolCall):
            continue
        is_last = number + 1 == len(places)
        end = len(records) if is_last else places[number + 1] + 1
        judging = [record.reply for record in records[place + 1 : end]]
        exec_verdict, exec_at = _first(reply.exec_verdict for reply in judging)
        memory_verdict, memory_at = _first(reply.memory_verdict for reply in judging)
        calls.append(
            ScoredCall(
                action.name,
                records[place],
                exec_verdict,
                memory_verdict,
                place,
                place + exec_at,
                place + memory_at,
            )
        )
    return calls


def _places_that_count(records: list[ReplyRecord], tools: tuple[str, ...]) -> list[int]:
    """The indices of the calls that count and of the answer."""
    places = []
    seen: set[tuple[str, str]] = set()
    for place, record in enumerate(records):
        match record.reply.action:
            case Answer():
                places.append(place)
            case ToolCall(name, arguments) if name in tools:
                # Two spellings of one query are the same call.
                sql = record.sql
                what = json.dumps(arguments, sort_keys=True) if sql is None else folded(sql)
                if (name, what) not in seen:
                    places.append(place)
                seen.add((name, what))
    return places


def _first(verdicts: Iterable[Verdict | None]) -> tuple[Verdict | None, int]:
    """The first verdict that is not None, and its number, counted from 1. Without one, the number
    of all."""
    number = 0
    for number, verdict in enumerate(verdicts, 1):
        if verdict is not None:
            return verdict, number
    return None, number
