"""Environments meet the engine: every trajectory advances on its own.

When a row ends a reply, its environment acts in a thread pool while the other rows decode. The
observation joins a later engine step, and a finished trajectory is judged while others decode.

Tokens depend on (seed, update, turn, sample, position) alone, so they are the same whenever SQL
returns. The last bits of their log-probs are not: they depend on which rows are computed together.
Therefore, on a CPU, an observation joins a number of engine steps after its reply that depends on
the work of its queries and not on the clock. Two rollouts of the same weights are then equal bit
for bit. On a GPU equal bits are not promised, and a step takes milliseconds. There an observation
joins when it is ready, so that no row waits for the query of another one.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.engine.completions import Completion, StopReason
from mtsql.engine.engine import Engine
from mtsql.model.flops import pairs
from mtsql.model.rendering import Renderer
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WAKE_SECS, WorkMeter
from mtsql.sql.worker_pool import query_threads

T = TypeVar("T")
Show = Callable[[int, int], None]
"""Called with the number of finished episodes and of all episodes, each time that one ends."""

TRUNCATED = {
    StopReason.REPLY_TOKENS: Outcome.REPLY_TOKENS,
    StopReason.TRAJECTORY_TOKENS: Outcome.TRAJECTORY_TOKENS,
}
SQL_STEPS = 2
"""On a CPU an observation joins this many engine steps after its reply, plus one step for each tick
(a million virtual-machine steps) of its queries. If the queries are not done by then, the engine
waits. On a GPU this is the least number of steps."""
NUM_ACTORS = 16
"""Threads in which environments act. They mostly wait for SQL workers, which serve them before the
judges."""
NUM_JUDGES = 2
"""Threads that judge finished trajectories. More would slow the decoding thread, which needs the
interpreter's lock too."""


def show_nothing(num_done: int, num_all: int) -> None:
    """Show no progress."""


def show_part(show: Show, num_before: int, num_all: int) -> Show:
    """How a rollout shows its progress that comes after `num_before` of `num_all` episodes."""
    return lambda num_done, _: show(num_before + num_done, num_all)


def turn_key(turn_id: str) -> int:
    """A stable 63-bit number for a turn id, the same on every rank, run and machine."""
    return int.from_bytes(hashlib.blake2b(turn_id.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class _Acting:
    """An environment that acts on a reply which was complete at engine step `since`."""

    since: int
    handle: int
    meter: WorkMeter
    future: Future

    def is_due(self, step: int) -> bool:
        """Whether the observation joins at this step or has joined before. Waits until the queries
        are done or have used too many ticks for it."""
        num_ticks = step - self.since - SQL_STEPS
        return num_ticks >= 0 and self.meter.is_done_within(num_ticks)

    def is_ready(self, step: int) -> bool:
        """Whether the observation can join at this step. Does not wait."""
        return step - self.since >= SQL_STEPS and self.future.done()


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
    judge: Callable[[Trajectory], T],
    show: Show = show_nothing,
) -> list[T]:
    """Play `num_samples` episodes of each turn with the engine's current weights.

    Returns what `judge` returns for each finished trajectory; `judge` runs in threads while other
    rows decode. The results are grouped by turn: those of `turns[i]` are at
    `i * num_samples : (i + 1) * num_samples`, with `sample` counting from 0. If a prompt has more
    than `max_prompt_tokens`, its whole group ends with `Outcome.PROMPT_TOKENS`. `show` is told of
    each episode that ends. Sampled tokens, what they attend to and seconds of waiting are added to
    `engine.counts`.
    """
    with query_threads(NUM_ACTORS, "act") as actors, query_threads(NUM_JUDGES, "judge") as judges:
        num_all = len(turns) * num_samples
        judged: dict[int, Future[T]] = {}  # place in the result -> what `judge` will return
        live: dict[int, tuple[int, Trajectory]] = {}  # handle -> (place, trajectory)
        counts = engine.counts
        hits_before = counts.prefix_hits

        def end(place: int, trajectory: Trajectory) -> None:
            judged[place] = judges.submit(judge, trajectory)
            show(len(judged), num_all)

        groups: list[tuple[list[int], int, list[Trajectory]]] = []  # prompt, place of turn, rows
        for number, turn in enumerate(turns):
            envs = [make_env(turn) for _ in range(num_samples)]
            prompt = renderer.render_prompt(*envs[0].reset())  # the same for the whole group
            budget = engine.sampling.max_trajectory_tokens
            group = [
                Trajectory(turn, i, prompt, env, max_tokens=budget) for i, env in enumerate(envs)
            ]
            places = range(number * num_samples, (number + 1) * num_samples)
            if len(prompt) > max_prompt_tokens:
                for place, trajectory in zip(places, group, strict=True):
                    trajectory.env.end(Outcome.PROMPT_TOKENS)
                    end(place, trajectory)
                continue
            groups.append((prompt, number, group))
        # Prompts with a long common beginning follow each other: they find it in the cache.
        for prompt, number, group in sorted(groups, key=lambda one: one[0]):
            key = turn_key(turns[number].turn_id)
            handles = engine.open_group(
                prompt, [(seed, update, key, i) for i in range(num_samples)]
            )
            places = range(number * num_samples, (number + 1) * num_samples)
            live.update(zip(handles, zip(places, group, strict=True), strict=True))

        prompts = [t.prompt_ids for _, t in live.values() if t.sample == 0]
        counts.attended += sum(pairs(0, len(prompt)) for prompt in prompts)

        def finish(handle: int) -> None:
            engine.close(handle)
            place, trajectory = live.pop(handle)
            num_computed = len(trajectory.ids) - 1  # the last token is sampled only
            counts.attended += pairs(len(trajectory.prompt_ids), num_computed)
            end(place, trajectory)

        acting: list[_Acting] = []  # in the order of their replies
        is_exact = engine.device.type == "cpu"
        step = 0
        while live:
            step += 1
            for completion in engine.step() if engine.has_work else []:
                counts.sampled += len(completion.ids)
                _, trajectory = live[completion.handle]
                meter = WorkMeter()
                future = _act(completion, trajectory, renderer, actors, finish, meter)
                if future is not None:
                    acting.append(_Acting(step, completion.handle, meter, future))
            start = time.perf_counter()
            if is_exact:
                due = [one for one in acting if one.is_due(step)]
            else:
                due = _ready(acting, step, may_wait=not engine.has_work)
            observed = [one.future.result() for one in due]
            counts.sql_wait_secs += time.perf_counter() - start
            for one, text in zip(due, observed, strict=True):
                acting.remove(one)
                _, trajectory = live[one.handle]
                _observe(text, one.handle, trajectory, renderer, engine, finish)
        if prompts:  # without what was found in the cache, as if it were as much of each prompt
            num_hits = (counts.prefix_hits - hits_before) // len(prompts)
            counts.attended -= len(prompts) * pairs(0, num_hits)
        start = time.perf_counter()
        results = [judged[place].result() for place in range(num_all)]
        counts.judge_wait_secs += time.perf_counter() - start
        return results


def _ready(acting: list[_Acting], step: int, may_wait: bool) -> list[_Acting]:
    """The observations that can join at this step. With `may_wait`, no row decodes: if none is
    ready, wait until an environment has acted."""
    if may_wait:
        wait([one.future for one in acting], WAKE_SECS, FIRST_COMPLETED)
    return [one for one in acting if one.is_ready(step)]


def _act(
    completion: Completion,
    trajectory: Trajectory,
    renderer: Renderer,
    actors: ThreadPoolExecutor,
    finish: Callable[[int], None],
    meter: WorkMeter,
) -> Future | None:
    """Keep the tokens of a complete reply and give its text to the environment. A reply that a
    budget truncated ends the episode; then the result is None."""
    trajectory.add_sampled(completion.ids, completion.logprobs)
    if completion.reason in TRUNCATED:
        trajectory.env.end(TRUNCATED[completion.reason])
        finish(completion.handle)
        return None
    future = actors.submit(trajectory.env.step, renderer.decode(completion.ids), meter)
    future.add_done_callback(lambda _: meter.finish())
    return future


def _observe(
    observed: str | Outcome,
    handle: int,
    trajectory: Trajectory,
    renderer: Renderer,
    engine: Engine,
    finish: Callable[[int], None],
) -> None:
    """Append what the environment returned to the trajectory, or end the episode."""
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
