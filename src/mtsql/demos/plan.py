"""Plans of demonstrations: which query goes to which tool, and what is thought on the way.

All demonstrations that the program makes have one of these shapes, those of the embedded world and
those from gold SQL. This module knows neither databases nor the tags of the protocol.

    direct    run, [ask the memory], answer
    mended    run a wrong query, run the right one, [ask the memory], answer
    looked_up [run a wrong query], look up a value, [run | ask the memory], answer
    recalled  run a wrong query, ask the memory, run the right one, answer;
              without execution: ask the memory about the wrong and the right one, answer
    reread    [run a query that finds nothing], ask the memory for an earlier result, [look up a
              value], run the right query, answer
    rerun     run an earlier turn's query again to see its result, ask the memory, answer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Action = Literal["exec_sql", "memory_retrieve", "answer"]


@dataclass(frozen=True)
class Act:
    """One reply of a plan. rejects: it judges what the tool returned before it as `no_pass`;
    otherwise the judgement is `pass`."""

    action: Action
    sql: str
    think: str = ""
    rejects: bool = False


Plan = list[Act]


def direct(gold: str, recalls: bool) -> Plan:
    """Run the right query and answer with it. recalls: the turn has a history, so ask the memory
    before the answer."""
    return [Act("exec_sql", gold), *_ending(gold, recalls)]


def mended(wrong: str, gold: str, recalls: bool) -> Plan:
    """The result of a wrong query shows what is wrong in it."""
    return [Act("exec_sql", wrong), Act("exec_sql", gold, rejects=True), *_ending(gold, recalls)]


def looked_up(wrong: str | None, look: str, gold: str, recalls: bool) -> Plan:
    """Look up a value that the query needs, at once or after a wrong query.

    At a later turn the memory runs the query, too, so it is not run before; that saves a reply.
    """
    first = [] if wrong is None else [Act("exec_sql", wrong)]
    then = [] if recalls else [Act("exec_sql", gold)]
    look_act = Act("exec_sql", look, rejects=wrong is not None)
    return [*first, look_act, *then, *_ending(gold, recalls)]


def recalled(wrong: str, gold: str, runs: bool = True) -> Plan:
    """The memory shows what a query that runs well keeps or drops wrongly. If the agent cannot run
    the right one (`runs`), it asks the memory again."""
    if not runs:
        again = Act("memory_retrieve", gold, rejects=True)
        return [Act("memory_retrieve", wrong), again, Act("answer", gold)]
    return [
        Act("exec_sql", wrong),
        Act("memory_retrieve", wrong),
        Act("exec_sql", gold, rejects=True),
        Act("answer", gold),
    ]


def reread(first: str, gold: str, runs_first: bool) -> Plan:
    """The memory shows a value that the query needs. `first` is the query with which the memory is
    asked; with `runs_first` it runs before and finds nothing."""
    run = [Act("exec_sql", first)] if runs_first else []
    return [
        *run,
        Act("memory_retrieve", first, rejects=runs_first),
        Act("exec_sql", gold, rejects=True),
        Act("answer", gold),
    ]


def reread_and_look(asked: str, look: str, gold: str) -> Plan:
    """The memory shows one value that the query needs, and another query the other one."""
    return [
        Act("memory_retrieve", asked),
        Act("exec_sql", look, rejects=True),
        Act("exec_sql", gold),
        Act("answer", gold),
    ]


def rerun(earlier: str, gold: str) -> Plan:
    """The result of an earlier turn's query, run once more, shows a value that the query needs."""
    return [Act("exec_sql", earlier), *_ending(gold, recalls=True)]


def _ending(gold: str, recalls: bool) -> Plan:
    answer = Act("answer", gold)
    return [Act("memory_retrieve", gold), answer] if recalls else [answer]


def thinking(plan: Plan, thoughts: Mapping[int, str]) -> Plan:
    """The plan with the thoughts of its replies, by their place."""
    return [replace(act, think=thoughts.get(place, "")) for place, act in enumerate(plan)]


def steps_of(plan: Sequence[Act]) -> list[dict[str, Any]]:
    """The plan as `steps` of demonstrations.jsonl. Each reply after a tool call has a verdict."""
    steps = []
    action_before = ""
    for act in plan:
        verdict = "no_pass" if act.rejects else "pass"
        step = {
            "think": act.think,
            "exec_verdict": verdict if action_before == "exec_sql" else None,
            "memory_verdict": verdict if action_before == "memory_retrieve" else None,
            "action": act.action,
            "sql": act.sql,
        }
        steps.append(step)
        action_before = act.action
    return steps


def shows_nothing(rows: Sequence[tuple]) -> bool:
    """Whether a result has no row or only NULLs, which shows that the query may be wrong."""
    return all(cell is None for row in rows for cell in row)
