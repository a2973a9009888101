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
from mtsql.llm.engine import Completion, Engine, StopReason
from mtsql.llm.rendering import Renderer
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.cache import WorkMeter
from mtsql.sql.worker_pool import stop_queries

T = TypeVar("T")

CUT = {
    StopReason.STEP_TOKENS: Outcome.STEP_TOKENS,
    StopReason.TRAJECTORY_TOKENS: Outcome.TRAJECTORY_TOKENS,
}
SQL_STEPS = 2
"""Engine steps from a reply to its observation, and one more for each tick (a million
virtual-machine steps) of its
queries: other rows wait for SQL only where so much work takes longer than that many steps."""
NUM_THREADS = 16
"""For environments, and as many for judging. They mostly wait for SQL workers."""


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
        """Whether the observation joins by this step. Waits until the work done so far tells."""
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
    trajectories: list[Trajectory] = []
    live: dict[int, Trajectory] = {}
    for turn in turns:
        envs = [make_env(turn) for _ in range(num_samples)]
        prompts = [renderer.render_prompt(*env.reset()) for env in envs]
        group = [Trajectory(turn, i, prompts[0], env) for i, env in enumerate(envs)]
        trajectories += group
        if len(prompts[0]) > max_prompt_tokens:
            for trajectory in group:
                trajectory.env.end(Outcome.PROMPT_TOKENS)
            continue
        keys = [(seed, update, turn_key(turn.turn_id), i) for i in range(num_samples)]
        live.update(zip(engine.open_group(prompts[0], keys), group, strict=True))

    # Acting goes first: a row waits for it. Hence two pools of threads.
    actors, judges = (
        ThreadPoolExecutor(NUM_THREADS, "act"),
        ThreadPoolExecutor(NUM_THREADS, "judge"),
    )
    acting: list[_Acting] = []  # in the order of their replies
    judged: dict[int, Future[T]] = {}  # by id() of the trajectory

    def finish(handle: int) -> None:
        engine.close(handle)
        trajectory = live.pop(handle)
        judged[id(trajectory)] = judges.submit(judge, trajectory)

    is_complete = False
    try:
        step = 0
        while live:
            step += 1
            for completion in engine.step() if engine.has_work else []:
                meter = WorkMeter()
                if future := _take(
                    completion, live[completion.handle], renderer, actors, finish, meter
                ):
                    acting.append(_Acting(step, completion.handle, meter, future))
            for one in [one for one in acting if one.is_due(step)]:
                acting.remove(one)
                _observe(
                    one.future.result(), one.handle, live[one.handle], renderer, engine, finish
                )
        results = [judged[id(t)].result() if id(t) in judged else judge(t) for t in trajectories]
        is_complete = True
    finally:
        if not is_complete:  # a fault, or Ctrl-C: nobody waits for queries any more
            for pool in (actors, judges):
                pool.shutdown(wait=False, cancel_futures=True)
            stop_queries()
        for pool in (actors, judges):
            pool.shutdown()
    return results


def _take(
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
