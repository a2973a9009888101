"""The environment of one episode: one question, one database, text in and text out.

`reset()` gives the opening messages. `step(reply)` gives an observation, or the `Outcome` that
ended the episode. The environment reads only replies: nothing in an observation, whatever a
database put there, is ever parsed. A tool that is not in use does not exist: no message names it,
and a call of it is answered like a call of any unknown tool.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from mtsql.agent import prompts
from mtsql.agent.horizon import implied as implied_by_horizon
from mtsql.agent.prompts import Horizon, PromptStyle
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, ParseError, Reply, ToolCall, parse_reply
from mtsql.agent.tools import Episode, ToolResult, bugs_of, tool_schemas, tools_named
from mtsql.choices import require_choices
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryConfig, QueryStatus
from mtsql.sql.schema import Database


class Outcome(Enum):
    """Every way an episode can end."""

    ANSWERED = "answered"
    NO_ACTION = "no_action"
    BAD_CALL = "bad_call"
    BAD_ANSWER = "bad_answer"
    UNCLOSED_THINK = "unclosed_think"
    MAX_REPLIES = "max_replies"
    REPLY_TOKENS = "reply_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"
    OBSERVATION_TOKENS = "observation_tokens"
    PROMPT_TOKENS = "prompt_tokens"


ENDS_WITH = {
    ParseError.NO_ACTION: Outcome.NO_ACTION,
    ParseError.UNCLOSED_THINK: Outcome.UNCLOSED_THINK,
    ParseError.EMPTY_ANSWER: Outcome.BAD_ANSWER,
    ParseError.UNCLOSED_ANSWER: Outcome.BAD_ANSWER,
    **{error: Outcome.BAD_CALL for error in prompts.MALFORMED_CALL},
}


@dataclass(frozen=True)
class EnvConfig:
    """Limits and switches of an episode."""

    horizon: Horizon = "long"
    """long: the model works in steps and calls tools. short: it answers at once, without tools, in
    one reply (the paper's short-horizon models). Where recipes or flags set short, it implies
    `env.tools` [], `env.max_replies` 1, a budget of 1,000 tokens and an outcome reward."""
    max_replies: int = 4
    """Maximum number of replies of the model in an episode (paper: 4)."""
    max_observation_rows: int = 10
    """Rows of a result that the model sees."""
    max_observation_chars: int = 400
    """Characters of a result that the model sees (released code: 200)."""
    preview_chars: int = 50
    """Characters of each earlier result that memory_retrieve shows (released code: 50)."""
    tools: tuple[str, ...] = (EXEC_SQL, MEMORY_RETRIEVE)
    """Names of the tools that the model may call (agent/tools.py), in the order in which it reads
    them. The paper's ablations take away one of the two."""
    memory_results: bool | None = None
    """Whether memory_retrieve runs queries and shows their results. null: only if exec_sql is in
    use. (The brief style shows the first row of each earlier result, and not that of the proposed
    query.)"""
    malformed_call: Literal["end", "observe"] = "end"
    """What happens after a call that cannot be read. end: the episode ends (paper). observe: the
    observation says what is wrong, and the reply counts. SQL errors are always observed, and so are
    calls of unknown tools that have the argument `code`."""
    answer_fallback: bool = False
    """If an episode ends without an answer, take the SQL of the last tool call, as the released
    code does."""
    query: QueryConfig = field(default_factory=QueryConfig)
    """Limits on each query, whoever runs it: tools, memory, rewards, guard, evaluation."""
    num_sql_workers: int = 0
    """Number of processes that run queries, for each rank. 0: its share of the processors."""

    implied = staticmethod(implied_by_horizon)

    def __post_init__(self) -> None:
        require_choices(self, "env")
        tools_named(self.tools)  # ValueError for an unknown name
        if self.max_replies < 1:
            raise ValueError("env.max_replies must be at least 1")
        for name in (
            "max_observation_rows",
            "max_observation_chars",
            "preview_chars",
            "num_sql_workers",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"env.{name} must not be negative")
        if self.horizon == "short":
            self._check_short()
        if self.memory_results is not None and MEMORY_RETRIEVE not in self.tools:
            raise ValueError("env.memory_results has no effect: env.tools has no memory_retrieve")

    def _check_short(self) -> None:
        """ValueError that names a key which has another value than a short horizon implies."""
        without_effect = {
            "tools": (self.tools != (), "it offers no tool"),
            "max_replies": (self.max_replies != 1, "an episode has one reply"),
            "malformed_call": (self.malformed_call != "end", "no tool is called"),
            "answer_fallback": (self.answer_fallback, "no tool is called"),
        }
        for name, (is_set, reason) in without_effect.items():
            if is_set:
                value = getattr(self, name)
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"env.{name} is {shown}, but env.horizon is short: {reason}; leave it out"
                )

    @property
    def has_memory_results(self) -> bool:
        """Whether memory_retrieve runs queries: `memory_results`, or by default whether exec_sql is
        in use, because an agent without execution must not see results through the memory."""
        return EXEC_SQL in self.tools if self.memory_results is None else self.memory_results


@dataclass(frozen=True)
class ReplyRecord:
    """One reply and what followed it."""

    reply: Reply
    observation: str | None = None
    """What the environment wrote; None if the reply itself ended the episode."""
    sql: str | None = None
    """The query that a tool call proposed; None if the reply called no tool in use, or one that
    takes no query."""
    status: QueryStatus | None = None
    """How that query ended; None unless it ran."""
    is_empty: bool = False
    """Whether its result had no row or only NULLs."""

    @property
    def is_ok(self) -> bool:
        """Whether the SQL ran without an error."""
        return self.status is QueryStatus.OK


class SqlEnv:
    """One episode. Several threads may run episodes side by side, but only one thread at a time may
    use this one."""

    def __init__(
        self, turn: Turn, database: Database, config: EnvConfig, style: PromptStyle
    ) -> None:
        if style not in get_args(PromptStyle):
            raise ValueError(f"style is {style!r}: expected one of full, brief")
        self.turn = turn
        self.database = database
        self.config = config
        self.style = style
        self.tools = tools_named(config.tools)
        self.records: list[ReplyRecord] = []
        self.outcome: Outcome | None = None
        self.final_sql: str | None = None

    def reset(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(messages, tool schemas) that open the episode. The brief style names no tools: its model
        learns them."""
        max_replies = self.config.max_replies
        text = prompts.first_message(
            self.turn,
            self.database.schema,
            self.style,
            max_replies,
            self.tools,
            self.config.horizon,
        )
        has_schemas = self.style == "full" and max_replies > 1
        schemas = tool_schemas(self.tools) if has_schemas else []
        return [{"role": "user", "content": text}], schemas

    def step(self, reply_text: str, meter: WorkMeter | None = None) -> str | Outcome:
        """Act on a reply: the observation to show next, or how the episode ended. RuntimeError
        after the end.

        `meter` counts what the queries cost while they run.
        """
        if self.outcome is not None:
            raise RuntimeError(
                f"the episode of turn {self.turn.turn_id} has ended: {self.outcome.value}"
            )
        parameters = {tool.name: tool.parameters for tool in self.tools}
        reply = parse_reply(reply_text, parameters)
        match reply.action:
            case Answer(sql):
                self.final_sql = sql
                return self._end_with(reply, Outcome.ANSWERED)
            case ParseError() as error:
                if error not in prompts.MALFORMED_CALL or self.config.malformed_call == "end":
                    return self._end_with(reply, ENDS_WITH[error])
                result = ToolResult(prompts.malformed_call(error, self.tools))
            case ToolCall() as call:
                result = self._call(call, meter)
        self.records.append(
            ReplyRecord(reply, result.observation, result.sql, result.status, result.is_empty)
        )
        if len(self.records) >= self.config.max_replies:
            return self.end(Outcome.MAX_REPLIES)
        return result.observation

    def end(self, outcome: Outcome) -> Outcome:
        """End the episode. The rollout calls this, too, when a token budget is spent."""
        self.outcome = outcome
        proposed = [record.sql for record in self.records if record.sql is not None]
        if self.final_sql is None and self.config.answer_fallback and proposed:
            self.final_sql = proposed[-1]
        return outcome

    def _end_with(self, reply: Reply, outcome: Outcome) -> Outcome:
        """Record a reply that ends the episode."""
        self.records.append(ReplyRecord(reply))
        return self.end(outcome)

    def _call(self, call: ToolCall, meter: WorkMeter | None) -> ToolResult:
        """Run the tool that a reply calls. A call of an unknown tool gets an observation and does
        not end the episode."""
        for tool in self.tools:
            if tool.name == call.name:
                episode = Episode(self.turn, self.database, self.config, self.style, meter)
                with bugs_of(f"the tool {tool.name}"):
                    return tool.run(episode, call.arguments)
        return ToolResult(prompts.unknown_tool(self.config.tools))
