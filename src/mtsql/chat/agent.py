"""A model that works on questions, one at a time, in a thread of its own.

The thread is its own because the caller shows the events meanwhile, and may stop the generation:
Ctrl-C reaches the caller only, and the engine ends between two of its steps.
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event as Flag

import torch

from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.exchange import sample_exchange
from mtsql.agent.prompts import PromptStyle
from mtsql.chat.events import Did, Event, Played
from mtsql.chat.steps import Step
from mtsql.chat.streaming import Stopped, StreamingEngine
from mtsql.chat.telling import Tell, TellingEnv
from mtsql.engine.config import EngineConfig, ModelShape, block_bytes, resolved_block_size
from mtsql.engine.paged_attention import uses_flash
from mtsql.engine.sampling import SamplingConfig
from mtsql.model.attention_path import main_device
from mtsql.model.policy import (
    ModelConfig,
    generation_weights,
    load_policy,
    load_tokenizer,
    policy_shape,
    resolved,
)
from mtsql.model.rendering import Renderer
from mtsql.model.sizes import require_embeddings, require_positions
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Database
from mtsql.sql.worker_pool import set_num_workers

NUM_SQL_WORKERS = 2
"""Processes that run queries: one episode runs one query at a time."""
SCHEDULED_TOKENS = 256
"""Tokens that a step of the engine reads. A prompt is read in several steps, so that progress is
shown and the generation can be stopped meanwhile."""
NUM_KEPT = 2
"""Prompts with their trajectories for which the cache has room. Questions of a dialogue have the
schema in common, which is read once."""


@dataclass(frozen=True)
class AgentConfig:
    """How the agent was trained, and how its replies are drawn."""

    model: str
    """Its folder."""
    env: EnvConfig
    style: PromptStyle
    max_prompt_tokens: int
    sampling: SamplingConfig
    seed: int


class Agent:
    """A loaded model. Use it as a context, so that its thread ends."""

    def __init__(self, config: AgentConfig, database: Database) -> None:
        """Load the model. ValueError that names the folder, file or key if it cannot be used."""
        self.config = config
        self.database = database
        self._stop = Flag()
        self._context = ExitStack()
        self._thread = ThreadPoolExecutor(1, "agent")
        set_num_workers(config.env.num_sql_workers or NUM_SQL_WORKERS)
        is_loaded = False
        try:
            self._thread.submit(self._load).result()
            is_loaded = True
        finally:
            if not is_loaded:  # an error, or Ctrl-C
                self.close()

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the generation and end the thread."""
        self._stop.set()
        self._thread.submit(self._context.close)
        self._thread.shutdown()

    def warning(self) -> str | None:
        """A sentence if the model's own chat template writes other tokens than we do."""
        env = SqlEnv(Turn("chat:0:0", 0, "", "who?", ""), self.database, *self._how)
        return self.renderer.template_difference(*sample_exchange(env))

    def ask(self, turn: Turn) -> Generator[Event | Played, None, None]:
        """Play a question: what happens, as it happens, and at last the episode.

        If the caller leaves, also by Ctrl-C, the generation stops before the next token. ValueError
        if the agent was stopped from another thread.
        """
        events: SimpleQueue[Event | Future[Played]] = SimpleQueue()
        stop = self._stop = Flag()  # its own: an episode that was stopped may not have ended yet
        playing = self._thread.submit(self._play, turn, events.put, stop)
        playing.add_done_callback(events.put)
        try:
            while not isinstance(event := events.get(), Future):
                yield event
            yield event.result()
        except Stopped:
            raise ValueError("stopped: the question is not part of the conversation") from None
        finally:
            stop.set()
            playing.exception()  # waits for its end

    def stop(self) -> None:
        """Stop the generation that another thread waits for, before its next token."""
        self._stop.set()

    @property
    def _how(self) -> tuple[EnvConfig, PromptStyle]:
        return self.config.env, self.config.style

    # In the thread of the agent, because autocast belongs to a thread.

    def _load(self) -> None:
        config = self.config
        model = resolved(ModelConfig(path=config.model))
        shape = policy_shape(model)
        max_tokens = config.max_prompt_tokens + config.sampling.max_trajectory_tokens
        require_positions(shape, max_tokens)
        tokenizer = load_tokenizer(config.model)
        require_embeddings(shape, tokenizer, config.model)
        self.renderer = Renderer(tokenizer)
        policy = load_policy(model)
        policy.to(main_device())
        weights = self._context.enter_context(generation_weights(policy, model.compute_dtype))
        limits = engine_limits(shape, max_tokens, model.compute_dtype)
        stop_ids = self.renderer.stop_ids
        self._engine = StreamingEngine(weights, stop_ids, config.sampling, limits)

    def _play(self, turn: Turn, put: Tell, stop: Flag) -> Played:
        steps: list[Step] = []

        def tell(event: Event) -> None:
            if isinstance(event, Did):
                steps.append(event.step)
            put(event)

        start = time.monotonic()
        self._engine.listen(self.renderer, tell, stop)
        try:
            [played] = rollout(
                self._engine,
                self.renderer,
                [turn],
                self._env_maker(tell),
                num_samples=1,
                seed=self.config.seed,
                update=0,
                max_prompt_tokens=self.config.max_prompt_tokens,
                judge=lambda trajectory: trajectory,
            )
        finally:
            self._engine.close_all()
        unfinished = truncated_reply(played, self.renderer)
        if unfinished is not None:
            tell(Did(unfinished))
        return Played(
            played.env.final_sql,
            played.outcome,
            tuple(steps),
            len(played.prompt_ids),
            played.num_sampled,
            time.monotonic() - start,
        )

    def _env_maker(self, tell: Tell) -> Callable[[Turn], SqlEnv]:
        def make_env(turn: Turn) -> SqlEnv:
            env = TellingEnv(turn, self.database, *self._how)
            env.tell = tell
            return env

        return make_env


def truncated_reply(played: Trajectory, renderer: Renderer) -> Step | None:
    """The last reply, if a budget ended it before the environment could read it."""
    if len(played.reply_spans) == len(played.env.records):
        return None
    start, end = played.reply_spans[-1]
    text = renderer.decode(played.ids[start:end])
    return Step("truncated", f"after {end - start} tokens", text)


def engine_limits(shape: ModelShape, max_tokens: int, dtype: torch.dtype) -> EngineConfig:
    """What the engine may use: one row, and a cache for `NUM_KEPT` of the longest samples."""
    limits = EngineConfig(max_rows=1, max_scheduled_tokens=SCHEDULED_TOKENS)
    block_size = resolved_block_size(limits, uses_flash(main_device(), dtype))
    num_blocks = NUM_KEPT * (-(-max_tokens // block_size) + 1)  # the last block is partly filled
    return replace(limits, cache_bytes=num_blocks * block_bytes(shape, block_size, dtype))
