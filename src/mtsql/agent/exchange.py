"""A made-up episode of real sentences, with which a model's chat template is checked."""

from mtsql.agent.env import SqlEnv
from mtsql.agent.prompts import exec_observation, unknown_tool
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply

Step = tuple[str, str]
"""A reply and the observation after it."""


def sample_exchange(env: SqlEnv) -> tuple[list[dict], list[dict], list[Step]]:
    """Returns (opening messages, tool schemas, steps) of an episode that is made up to compare the
    renderer with a chat template. No query runs."""
    messages, schemas = env.reset()
    offered = env.config.tools
    if not offered:
        return messages, schemas, []
    sql = env.turn.sql
    call = ToolCall(offered[0], {"code": sql})
    first = format_reply(Reply(call, think="What is asked?"))
    second = format_reply(Reply(call, think="It runs.", exec_verdict=Verdict.PASS))
    steps = [
        (first, exec_observation(env.turn, sql, "no rows", env.style, offered)),
        (second, unknown_tool(offered)),
    ]
    return messages, schemas, steps
