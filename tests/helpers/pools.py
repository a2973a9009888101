"""Trajectories and their records, for tests of pools."""

from helpers.episodes import answer, call
from mtsql.agent.env import SqlEnv
from mtsql.agent.reply import Verdict
from mtsql.model.rendering import Renderer
from mtsql.rl.replay import replay
from mtsql.rl.trajectory import Trajectory

SCRIPT = (
    call("SELECT 'a  b', 'é 😀' -- [1, 2]", think="Who is old?\nWe look."),
    call("SELECT 1", "memory_retrieve", ran=Verdict.PASS),
    answer("SELECT 1", fits=Verdict.NO_PASS, think="Done."),
)
"""Three replies, one of them without a thought."""


def trajectory_of(env: SqlEnv, renderer: Renderer) -> Trajectory:
    """The `SCRIPT` as a policy would have sampled it."""
    return replay(env.turn, list(SCRIPT), env, renderer)
