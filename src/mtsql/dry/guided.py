"""The environment of a dry run: in some episodes it acts on the gold query.

A random model gets nothing right, so nothing could be selected, and no group of rewards would
differ. In a share of the episodes this environment therefore reads the gold query in place of what
the model wrote: a call of each tool, then the answer. Tools, memory, rewards and guard are the real
ones. The tokens of the trajectory stay those that the model sampled.
"""

import hashlib

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import (
    Answer,
    ParseError,
    Reply,
    ToolCall,
    Verdict,
    format_reply,
    parse_reply,
)
from mtsql.sql.meter import WorkMeter

GUIDED_FRAC = 0.4
"""Share of the episodes that are guided."""


class GuidedEnv(SqlEnv):
    """An episode in which replies without an action may be replaced. Whether they are depends on
    the turn and the text of the first reply only."""

    guide: list[Reply] | None = None
    """The replies that are still to come. None: not decided yet."""

    def step(self, reply_text: str, meter: WorkMeter | None = None) -> str | Outcome:
        """Act on the reply or, in a guided episode, on the next one of the guide."""
        parameters = {tool.name: tool.parameters for tool in self.tools}
        if not isinstance(parse_reply(reply_text, parameters).action, ParseError):
            return super().step(reply_text, meter)
        if self.guide is None:
            self.guide = gold_replies(self) if is_guided(self.turn.turn_id, reply_text) else []
        if self.guide:
            reply_text = format_reply(self.guide.pop(0))
        return super().step(reply_text, meter)


def is_guided(turn_id: str, reply_text: str) -> bool:
    """Whether the episode of this turn that begins with this reply is guided."""
    code = hashlib.blake2b(f"{turn_id} {reply_text}".encode(), digest_size=4).digest()
    return int.from_bytes(code) < GUIDED_FRAC * 2**32


def gold_replies(env: SqlEnv) -> list[Reply]:
    """The replies of an episode that calls each tool of the paper once, as far as it is in use and
    replies are left, and answers with the gold query."""
    sql = env.turn.sql
    replies = []
    if EXEC_SQL in env.config.tools:
        replies.append(Reply(ToolCall(EXEC_SQL, {"code": sql})))
    if MEMORY_RETRIEVE in env.config.tools and env.turn.history:
        replies.append(
            Reply(
                ToolCall(MEMORY_RETRIEVE, {"code": sql}),
                exec_verdict=Verdict.PASS if replies else None,
            )
        )
    replies = replies[: env.config.max_replies - 1]
    last = replies[-1].action if replies else None
    called = last.name if isinstance(last, ToolCall) else ""
    answer = Reply(
        Answer(sql),
        exec_verdict=Verdict.PASS if called == EXEC_SQL else None,
        memory_verdict=Verdict.PASS if called == MEMORY_RETRIEVE else None,
    )
    return [*replies, answer]
