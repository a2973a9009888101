"""What is shown while the agent works on a question."""

from dataclasses import dataclass

from mtsql.agent.env import Outcome
from mtsql.chat.conversation import ChatTurn
from mtsql.chat.steps import Step


@dataclass(frozen=True)
class Reading:
    """The model reads a prompt or an observation: `num_done` of `num_all` tokens."""

    num_done: int
    num_all: int


@dataclass(frozen=True)
class Sampled:
    """The next piece of the reply's text, as it was sampled."""

    text: str


@dataclass(frozen=True)
class Did:
    """A step is complete. The first one of a reply ends the text of its `Sampled`."""

    step: Step


@dataclass(frozen=True)
class Played:
    """An episode that has ended.

    sql: the answer; None without one. steps: all of them, also that of a reply which a budget
    truncated. num_prompt: tokens of the prompt. num_sampled: tokens that the model sampled.
    """

    sql: str | None
    outcome: Outcome
    steps: tuple[Step, ...]
    num_prompt: int
    num_sampled: int
    secs: float


@dataclass(frozen=True)
class Ended:
    """The question of an episode that has ended has joined the conversation."""

    turn: ChatTurn


Event = Reading | Sampled | Did | Ended
