"""What the agent does, step by step, as data that a terminal, a web page and JSON can show.

An episode is a list of steps in their order. A reply that judges a result and proposes another
query gives three of them, and what its tool returns is a fourth:

    think     "nothing , look"
    verify    the result: no_pass
    correct   SELECT DISTINCT type FROM house WHERE type LIKE 'small%'
    execute   1 row
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mtsql.agent.env import Outcome, ReplyRecord, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, ParseError, Reply, ToolCall, Verdict
from mtsql.sql.runnable import folded
from mtsql.sql.sandbox import QueryResult, QueryStatus, run_query

StepName = Literal[
    "think",
    "propose",
    "correct",
    "execute",
    "verify",
    "recall",
    "remember",
    "call",
    "observe",
    "answer",
    "malformed",
    "truncated",
]

ENDINGS = {
    Outcome.ANSWERED: "answered",
    Outcome.NO_ACTION: "the reply calls no tool and gives no answer",
    Outcome.BAD_CALL: "the reply has a tool call that cannot be read",
    Outcome.BAD_ANSWER: "the reply has an answer that is empty or has no end",
    Outcome.UNCLOSED_THINK: "the reply has a thought without an end",
    Outcome.MAX_REPLIES: "no answer within env.max_replies",
    Outcome.REPLY_TOKENS: "a reply reached sampling.max_reply_tokens",
    Outcome.TRAJECTORY_TOKENS: "the episode reached sampling.max_trajectory_tokens",
    Outcome.OBSERVATION_TOKENS: "an observation does not fit into sampling.max_trajectory_tokens",
    Outcome.PROMPT_TOKENS: "the prompt is longer than max_prompt_tokens",
}
"""How an episode has ended, in words."""


@dataclass(frozen=True)
class Step:
    """One step of an episode.

    summary: what stands in one line where details are folded away. text: all of it, such as a
    thought or the observation that the model reads; it may be empty. sql: the query of the step, if
    it has one. is_good: whether a verdict says pass, or a query ran and returned something; None
    for other steps.
    """

    name: StepName
    summary: str
    text: str = ""
    sql: str | None = None
    is_good: bool | None = None


def steps_of_reply(reply: Reply, text: str, before: Sequence[str]) -> Iterator[Step]:
    """The steps of a complete reply with this text. `before` are the queries that the episode has
    proposed so far."""
    if reply.think:
        yield Step("think", _one_line(reply.think), reply.think)
    for verdict, about in ((reply.exec_verdict, "the result"), (reply.memory_verdict, "coherence")):
        if verdict is not None:
            is_good = verdict is Verdict.PASS
            yield Step("verify", f"{about}: {verdict.value}", is_good=is_good)
    match reply.action:
        case Answer(sql):
            yield Step("answer", _one_line(sql), sql=sql)
        case ParseError() as error:
            yield Step("malformed", error.value, text)
        case ToolCall(name, arguments):
            code = arguments.get("code")
            shown = code if isinstance(code, str) else str(arguments)
            yield Step(_name_of_call(name, shown, before), _one_line(shown), sql=shown)


def _name_of_call(tool: str, sql: str, before: Sequence[str]) -> StepName:
    """exec_sql proposes a query or, if it runs another one than the last, corrects it."""
    if tool == MEMORY_RETRIEVE:
        return "recall"
    if tool != EXEC_SQL:
        return "call"
    return "correct" if before and folded(before[-1]) != folded(sql) else "propose"


def step_of_observation(record: ReplyRecord, env: SqlEnv) -> Step | None:
    """What the environment has returned after a reply; None if the reply ended the episode."""
    observation = record.observation
    if observation is None:
        return None
    action = record.reply.action
    tool = action.name if isinstance(action, ToolCall) else ""
    if tool == EXEC_SQL and record.sql is not None:
        result = run_query(env.database.path, record.sql, env.config.query)  # it is cached
        is_good = result.is_ok and not result.is_empty
        return Step("execute", describe(result), observation, is_good=is_good)
    if tool == MEMORY_RETRIEVE and record.sql is not None:
        return Step("remember", counted(len(env.turn.history), "earlier turn"), observation)
    return Step("observe", _one_line(observation), observation)


def proposed(records: Sequence[ReplyRecord]) -> list[str]:
    """The queries that tool calls have proposed."""
    return [record.sql for record in records if record.sql is not None]


def describe(result: QueryResult) -> str:
    """A result in one line: how many rows, or why there are none."""
    if result.status is not QueryStatus.OK:
        return _one_line(f"{result.status.value}: {result.message}")
    if not result.rows:
        return "no rows"
    only_nulls = ", only NULL" if result.is_empty else ""
    return counted(len(result.rows), "row") + only_nulls


def counted(num: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,000 rows`."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
