"""Finished trajectories with their rewards, in groups."""

from dataclasses import dataclass

from mtsql.agent.env import Outcome
from mtsql.agent.reply import ParseError
from mtsql.rl.trajectory import Trajectory

BUDGETS = (
    Outcome.MAX_REPLIES,
    Outcome.REPLY_TOKENS,
    Outcome.TRAJECTORY_TOKENS,
    Outcome.OBSERVATION_TOKENS,
    Outcome.PROMPT_TOKENS,
)
"""Outcomes of truncated trajectories: they ended on a budget instead of an answer."""


@dataclass
class Scored:
    """A finished trajectory and its reward."""

    trajectory: Trajectory
    components: dict[str, float]
    reward: float
    kl: float = 0.0
    """Estimated KL to the reference policy as sampled; measured if `advantage.kl_coef` is set."""
    so_far: tuple[float, ...] = ()
    """The weighted process reward after each reply; for `advantage.credit=reply` only."""
    is_paid: bool | None = None
    """Whether that is part of the reward. None: it is, however the episode ends."""
    advantages: list[float] | None = None
    """What each reply is trained with. None before that is computed, and if it is not trained
    on."""

    @property
    def is_truncated(self) -> bool:
        """Whether the trajectory ended on a budget instead of an answer."""
        return self.trajectory.outcome in BUDGETS

    @property
    def is_malformed(self) -> bool:
        """Whether the trajectory has no well-formed tool call or answer."""
        records = self.trajectory.env.records
        return all(isinstance(record.reply.action, ParseError) for record in records)

    @property
    def is_right(self) -> bool:
        """Whether the answer is right in execution and in structure."""
        return bool(self.components["ex"] and self.components["em"])


Group = list[Scored]
"""The trajectories sampled from one prompt."""


def turn_of(group: Group) -> str:
    """The id of the turn that a group was sampled for."""
    return group[0].trajectory.turn.turn_id


def num_right(group: Group) -> int:
    """How many trajectories of the group are right."""
    return sum(scored.is_right for scored in group)


def rewards(group: Group) -> list[float]:
    """The rewards of the group's trajectories."""
    return [scored.reward for scored in group]
