"""A made-up episode of real sentences, with which a model's chat template is checked."""

from mtsql.agent.env import SqlEnv
from mtsql.agent.prompts import exec_observation, unknown_tool
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply


def sample_exchange(env: SqlEnv) -> tuple[list[dict], list[dict], list[tuple[str, str]]]:
    """-> (opening messages, tool schemas, steps) of an episode that is made up to compare the
    renderer with a chat template. A step is a reply and the observation after it. No query runs."""
    messages, tools = env.reset()
    turn, offered = env.turn, env.config.offered
    if not offered:
        return messages, tools, []
    call = ToolCall(offered[0], turn.sql)
    replies = [
        Reply("What is asked?", tool_call=call),
        Reply("It runs.", Verdict.PASS, tool_call=call),
    ]
    seen = [exec_observation(turn, turn.sql, "no rows", env.style, offered), unknown_tool(offered)]
    return messages, tools, list(zip(map(format_reply, replies), seen, strict=True))
