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
    exec_place: int | None = field(default=None, compare=False)
    """The index of the reply with which the execution verdict is settled: the one that holds it, or
    without one that of the next call that counts. None: it is settled when the episode ends."""
    memory_place: int | None = field(default=None, compare=False)
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
        following = places[number + 1] if number + 1 < len(places) else None
        end = len(records) if following is None else following + 1
        judging = [(at, records[at].reply) for at in range(place + 1, end)]
        exec_verdict, exec_place = _first([(at, reply.exec_verdict) for at, reply in judging])
        memory_verdict, memory_place = _first([(at, reply.memory_verdict) for at, reply in judging])
        calls.append(
            ScoredCall(
                action.name,
                records[place],
                exec_verdict,
                memory_verdict,
                place,
                following if exec_place is None else exec_place,
                following if memory_place is None else memory_place,
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


def _first(verdicts: Iterable[tuple[int, Verdict | None]]) -> tuple[Verdict | None, int | None]:
    """The first verdict that is not None, with the index of its reply."""
    found = ((verdict, at) for at, verdict in verdicts if verdict is not None)
    return next(found, (None, None))
