"""Environments meet the engine: every trajectory advances on its own.

A row that stops goes to its environment in a thread pool while the other rows decode; its observation joins a later
scheduling step. Tokens depend on (seed, update, turn, sample, position) alone, so it does not matter when SQL returns.
Their log-probs do, in the last bits: sums round by which rows are computed together. Hence observations join a fixed
number of steps after their reply, and two rollouts of the same weights are equal bit for bit.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.llm.engine import Completion, Engine, StopReason
from mtsql.llm.rendering import Renderer
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn

CUT = {
    StopReason.STEP_TOKENS: Outcome.STEP_TOKENS,
    StopReason.TRAJECTORY_TOKENS: Outcome.TRAJECTORY_TOKENS,
}


SQL_STEPS = 2
"""Engine steps from a reply to its observation. Only SQL that takes longer than they do makes the other rows wait."""


def turn_key(turn_id: str) -> int:
    """A stable 63-bit number for a turn id, the same on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(turn_id.encode(), digest_size=8).digest()) >> 1


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
    sql_workers: int = 2,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play `num_samples` episodes of each turn with the engine's current weights.

    Returns the trajectories grouped by turn: those of `turns[i]` stand at `i * num_samples : (i + 1) * num_samples`,
    with `sample` counting from 0. A prompt over `max_prompt_tokens` ends its whole group with `Outcome.PROMPT_TOKENS`.
    `on_done` is told of each finished episode (progress bars).
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

    def finish(handle: int) -> None:
        engine.close(handle)
        trajectory = live.pop(handle)
        if on_done is not None:
            on_done(trajectory)

    running: deque[tuple[int, Future, int]] = deque()  # (step it is due at, answer, handle), in that order
    with ThreadPoolExecutor(max_workers=sql_workers) as pool:
        step = 0
        while live:
            step += 1
            for completion in engine.step() if engine.has_work else []:
                if future := _take(completion, live[completion.handle], renderer, pool, finish):
                    running.append((step + SQL_STEPS, future, completion.handle))
            if running and not engine.has_work:
                step = max(step, running[0][0])  # no row decodes: the next observation is due at once
            while running and running[0][0] <= step:
                _, future, handle = running.popleft()
                _observe(future.result(), handle, live[handle], renderer, engine, finish)
    return trajectories


def _take(completion: Completion, trajectory: Trajectory, renderer, pool, finish) -> Future | None:
    """A reply is complete: keep its tokens and hand its text to the environment, unless a budget cut it."""
    trajectory.add_sampled(completion.ids, completion.logprobs)
    if completion.reason in CUT:
        trajectory.env.end(CUT[completion.reason])
        finish(completion.handle)
        return None
    return pool.submit(trajectory.env.step, renderer.decode(completion.ids))


def _observe(observed: str | Outcome, handle: int, trajectory: Trajectory, renderer, engine: Engine, finish) -> None:
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
