"""The environment of one episode: one question, one database, text in and text out.

`reset()` gives the opening messages; `step(reply)` gives an observation, or the `Outcome` that
ended the episode. The environment reads replies only: nothing in an observation, whatever a
database put there, is ever parsed. A tool that is not offered does not exist: no message names it,
and a call to it is answered like a call to any unknown tool.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from mtsql.agent import prompts
from mtsql.agent.memory import recall
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import ParseError, Reply, parse_reply
from mtsql.agent.tools import EXEC_SQL, MEMORY_RETRIEVE, tool_schemas
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryConfig, QueryStatus, run_query
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

    max_replies: int = 4
    """Model replies per episode (paper: 4)."""
    max_observation_rows: int = 10
    """Result rows shown to the model."""
    max_observation_chars: int = 400
    """Characters of a result shown to the model (released code: 200)."""
    preview_chars: int = 50
    """Characters of each earlier result shown by the memory (released code: 50)."""
    use_exec: bool = True
    """Offer exec_sql (paper ablation T3)."""
    use_memory: bool = True
    """Offer memory_retrieve (paper ablation T3)."""
    memory_results: bool | None = None
    """Whether memory_retrieve runs queries and shows their results. None: only if exec_sql is
    offered. (The brief style runs the proposed query but never shows a result.)"""
    malformed_call: Literal["end", "observe"] = "end"
    """What a call that cannot be read does. end: it ends the episode (paper). observe: the
    observation says what is wrong, and the reply counts as one of `max_replies`. Calls of tools
    that are not offered, and SQL errors, are always observed."""
    answer_fallback: bool = False
    """Take the last tool call's SQL when an episode ends without an answer, as the released code
    does."""
    query: QueryConfig = field(default_factory=QueryConfig)
    """Limits on each query, whoever runs it: tools, memory, rewards, guard, evaluation."""
    num_sql_workers: int = 0
    """Processes that run queries, for each rank (0: its share of the machine's processors)."""

    def __post_init__(self):
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
        if self.memory_results is not None and not self.use_memory:
            raise ValueError("env.memory_results has no effect without env.use_memory")

    @property
    def offered(self) -> tuple[str, ...]:
        """The names of the tools in use, in the order in which they are listed to the model."""
        used = {EXEC_SQL: self.use_exec, MEMORY_RETRIEVE: self.use_memory}
        return tuple(name for name, is_used in used.items() if is_used)

    @property
    def has_memory_results(self) -> bool:
        """Whether memory_retrieve runs queries: `memory_results`, or by default whether exec_sql is
        offered, because an agent without execution must not see results through the memory."""
        return self.use_exec if self.memory_results is None else self.memory_results


@dataclass(frozen=True)
class ReplyRecord:
    """One reply and what its action met. `status` is None unless SQL ran; `observation` is None at
    the end."""

    reply: Reply
    status: QueryStatus | None = None
    is_empty: bool = False
    observation: str | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the SQL ran without an error."""
        return self.status is QueryStatus.OK


class SqlEnv:
    """One episode. Not shared between threads at the same time; any number of episodes may run side
    by side."""

    def __init__(self, turn: Turn, database: Database, config: EnvConfig, style: PromptStyle):
        self.turn, self.database = turn, database
        self.config, self.style = config, style
        self.records: list[ReplyRecord] = []
        self.outcome: Outcome | None = None
        self.final_sql: str | None = None

    def reset(self) -> tuple[list[dict], list[dict]]:
        """(messages, tool schemas) that open the episode. The brief style names no tools: its model
        learns them."""
        offered = self.config.offered
        text = prompts.first_message(
            self.turn, self.database.schema, self.style, self.config.max_replies, offered
        )
        is_direct = self.style is PromptStyle.BRIEF or self.config.max_replies == 1
        tools = [] if is_direct else tool_schemas(offered)
        return [{"role": "user", "content": text}], tools

    def step(self, reply_text: str, meter: WorkMeter | None = None) -> str | Outcome:
        """Act on a reply: the observation to show next, or how the episode ended. RuntimeError
        after the end.

        `meter` is told what the queries cost while they run.
        """
        if self.outcome is not None:
            raise RuntimeError(
                f"the episode of turn {self.turn.turn_id} has ended: {self.outcome.value}"
            )
        reply = parse_reply(reply_text)
        record, ended = ReplyRecord(reply), None
        if reply.answer is not None:
            self.final_sql, ended = reply.answer, Outcome.ANSWERED
        elif reply.error is not None and not self._is_observed(reply.error):
            ended = ENDS_WITH[reply.error]
        else:
            record = self._call(reply, meter) if reply.error is None else self._complain(reply)
            ended = (
                Outcome.MAX_REPLIES if len(self.records) + 1 >= self.config.max_replies else None
            )
        self.records.append(record)
        return self.end(ended) if ended is not None else record.observation

    def end(self, outcome: Outcome) -> Outcome:
        """End the episode, also from outside (token budgets)."""
        self.outcome = outcome
        calls = [step.reply.tool_call for step in self.records if step.reply.tool_call is not None]
        calls = [call for call in calls if call.name in self.config.offered]
        if self.final_sql is None and self.config.answer_fallback and calls:
            self.final_sql = calls[-1].code
        return outcome

    def transcript(self) -> str:
        """The episode as readable text."""
        parts = [message["content"] for message in self.reset()[0]]
        for record in self.records:
            reply = record.reply
            action = reply.tool_call or reply.answer or reply.error
            verdicts = f"{reply.exec_verdict or ''} {reply.memory_verdict or ''}"
            parts.append(f"[model] {reply.think} {verdicts}\n  {action}")
            if record.observation is not None:
                parts.append(f"[observation] {record.observation}")
        ended = self.outcome.value if self.outcome else "running"
        return "\n".join([*parts, f"[{ended}] {self.final_sql}"])

    def _is_observed(self, error: ParseError) -> bool:
        return self.config.malformed_call == "observe" and error in prompts.MALFORMED_CALL

    def _complain(self, reply: Reply) -> ReplyRecord:
        """What a call that cannot be read gets back."""
        return ReplyRecord(reply, observation=prompts.malformed_call(reply.error))

    def _call(self, reply: Reply, meter: WorkMeter | None) -> ReplyRecord:
        """Run the one tool a reply calls. Calling a tool that is not offered is answered, not
        punished by an end."""
        call, limits, offered = reply.tool_call, self.config, self.config.offered
        if call.name not in offered:
            return ReplyRecord(reply, observation=prompts.unknown_tool(offered))
        is_exec = call.name == EXEC_SQL
        if not is_exec and not limits.has_memory_results:
            return ReplyRecord(reply, observation=self._remember(call.code, None, meter))
        result = run_query(self.database.path, call.code, limits.query, meter)
        shown = prompts.show_result(
            result, limits.max_observation_rows, limits.max_observation_chars, self.style
        )
        if is_exec:
            text = prompts.exec_observation(self.turn, call.code, shown, self.style, offered)
        else:
            text = self._remember(call.code, shown, meter)
        return ReplyRecord(reply, result.status, result.is_empty, text)

    def _remember(self, sql: str, shown: str | None, meter: WorkMeter | None) -> str:
        """What the memory returns about a proposed query. `shown` is the query's result as text, or
        None if the memory runs nothing."""
        limits = self.config
        with_results = shown is not None and self.style is PromptStyle.FULL
        memory = recall(self.turn, self.database.path, limits.query, with_results, meter)
        return prompts.memory_observation(
            self.turn, sql, shown, memory, self.style, limits.preview_chars, limits.offered
        )
