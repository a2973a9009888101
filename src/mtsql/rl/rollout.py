"""Environments meet the engine: every trajectory advances on its own.

A row that stops goes to its environment in a thread pool while the other rows decode; its
observation joins a later scheduling step, and a finished trajectory is judged while others decode.
Tokens depend on (seed, update, turn, sample, position) alone, so it does not matter when SQL
returns. Their log-probs do, in the last bits: sums round by which rows are computed together. Hence
an observation joins a number of steps after its reply that depends on the work of its queries and
not on the clock, and two rollouts of the same weights are equal bit for bit.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.engine.engine import Completion, Engine, StopReason
from mtsql.model.rendering import Renderer
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.worker_pool import query_threads

T = TypeVar("T")

CUT = {
    StopReason.REPLY_TOKENS: Outcome.REPLY_TOKENS,
    StopReason.TRAJECTORY_TOKENS: Outcome.TRAJECTORY_TOKENS,
}
SQL_STEPS = 2
"""An observation joins so many engine steps after its reply, plus one step for each tick (a million
virtual-machine steps) of its queries. If the queries are not done by then, the engine waits."""
NUM_ACTORS = 16
"""Threads in which environments act. They mostly wait for SQL workers, which serve them first."""
NUM_JUDGES = 2
"""Threads that judge finished trajectories. More would take the interpreter from the decoding
thread."""


def turn_key(turn_id: str) -> int:
    """A stable 63-bit number for a turn id, the same on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(turn_id.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class _Acting:
    """An environment at work on a reply that was complete at engine step `since`."""

    since: int
    handle: int
    meter: WorkMeter
    future: Future

    def is_due(self, step: int) -> bool:
        """Whether the observation joins by this step. Waits until the queries are done or have used
        more ticks than that."""
        num_ticks = step - self.since - SQL_STEPS
        return num_ticks >= 0 and self.meter.is_done_within(num_ticks)


def rollout(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    *,
    num_samples: int,
    seed: int,
    update: int,
    max_prompt_tokens: int,
    judge: Callable[[Trajectory], T] = lambda trajectory: trajectory,
) -> list[T]:
    """Play `num_samples` episodes of each turn with the engine's current weights.

    Returns what `judge` makes of each finished trajectory, itself by default; it runs in threads
    while other rows decode. Grouped by turn: those of `turns[i]` stand at `i * num_samples : (i +
    1) * num_samples`, with `sample` counting from 0. A prompt over `max_prompt_tokens` ends its
    whole group with `Outcome.PROMPT_TOKENS`.
    """
    with query_threads(NUM_ACTORS, "act") as actors, query_threads(NUM_JUDGES, "judge") as judges:
        judged: list[Future[T] | None] = [None] * (len(turns) * num_samples)
        live: dict[int, tuple[int, Trajectory]] = {}  # handle -> (place in `judged`, trajectory)
        for number, turn in enumerate(turns):
            envs = [make_env(turn) for _ in range(num_samples)]
            prompts = [renderer.render_prompt(*env.reset()) for env in envs]
            budget = engine.sampling.max_trajectory_tokens
            group = [
                Trajectory(turn, i, prompts[0], env, max_tokens=budget)
                for i, env in enumerate(envs)
            ]
            places = range(number * num_samples, (number + 1) * num_samples)
            if len(prompts[0]) > max_prompt_tokens:
                for place, trajectory in zip(places, group, strict=True):
                    trajectory.env.end(Outcome.PROMPT_TOKENS)
                    judged[place] = judges.submit(judge, trajectory)
                continue
            keys = [(seed, update, turn_key(turn.turn_id), i) for i in range(num_samples)]
            handles = engine.open_group(prompts[0], keys)
            live.update(zip(handles, zip(places, group, strict=True), strict=True))

        def finish(handle: int) -> None:
            engine.close(handle)
            place, trajectory = live.pop(handle)
            judged[place] = judges.submit(judge, trajectory)

        acting: list[_Acting] = []  # in the order of their replies
        step = 0
        while live:
            step += 1
            for completion in engine.step() if engine.has_work else []:
                _, trajectory = live[completion.handle]
                meter = WorkMeter()
                if future := _act(completion, trajectory, renderer, actors, finish, meter):
                    acting.append(_Acting(step, completion.handle, meter, future))
            for one in [one for one in acting if one.is_due(step)]:
                acting.remove(one)
                _, trajectory = live[one.handle]
                _observe(one.future.result(), one.handle, trajectory, renderer, engine, finish)
        return [future.result() for future in judged]


def _act(
    completion: Completion,
    trajectory: Trajectory,
    renderer: Renderer,
    actors: ThreadPoolExecutor,
    finish: Callable[[int], None],
    meter: WorkMeter,
) -> Future | None:
    """A reply is complete: keep its tokens and hand its text to the environment, unless a budget
    cut it."""
    trajectory.add_sampled(completion.ids, completion.logprobs)
    if completion.reason in CUT:
        trajectory.env.end(CUT[completion.reason])
        finish(completion.handle)
        return None
    future = actors.submit(trajectory.env.step, renderer.decode(completion.ids), meter)
    future.add_done_callback(lambda _: meter.finish())
    return future


def _observe(
    observed: str | Outcome, handle: int, trajectory: Trajectory, renderer, engine: Engine, finish
) -> None:
    """The environment answered: append its observation, or end the episode."""
    if isinstance(observed, Outcome):
        finish(handle)
        return
    ids = renderer.render_observation(observed)
    if len(trajectory.ids) + len(ids) >= engine.sampling.max_trajectory_tokens:
        trajectory.env.end(Outcome.OBSERVATION_TOKENS)
        finish(handle)
        return
    trajectory.add_context(ids)
    engine.extend(handle, ids)
