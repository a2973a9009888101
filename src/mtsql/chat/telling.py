"""The environment of training, which tells of each step of its episode."""

from collections.abc import Callable

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.agent.reply import parse_reply
from mtsql.chat.events import Did, Event
from mtsql.chat.steps import proposed, step_of_observation, steps_of_reply
from mtsql.sql.meter import WorkMeter

Tell = Callable[[Event], None]
"""Takes an event, in the thread in which it happens."""


class TellingEnv(SqlEnv):
    """An episode that tells of each reply before its tool runs, and of what the tool returns."""

    tell: Tell

    def step(self, reply_text: str, meter: WorkMeter | None = None) -> str | Outcome:
        """Act on a reply as the environment does."""
        parameters = {tool.name: tool.parameters for tool in self.tools}
        reply = parse_reply(reply_text, parameters)
        for step in steps_of_reply(reply, reply_text, proposed(self.records)):
            self.tell(Did(step))
        observed = super().step(reply_text, meter)
        seen = step_of_observation(self.records[-1], self)
        if seen is not None:
            self.tell(Did(seen))
        return observed
