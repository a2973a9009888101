"""The real agent of a conversation, whose tokens come from a script."""

from dataclasses import replace
from pathlib import Path

import pytest

import mtsql.chat.agent
from helpers.told import Episode, texts_of
from mtsql.agent.env import EnvConfig
from mtsql.chat.agent import Agent, AgentConfig
from mtsql.chat.streaming import StreamingEngine
from mtsql.engine.sampling import SamplingConfig
from mtsql.sql.schema import Database


class ToldEngine(StreamingEngine):
    """Samples the tokens of `episodes`, one episode for each question that is asked. All else is
    real: prompts, cache, loop, environment."""

    episodes: list[Episode] = []

    def __init__(self, model, stop_ids, sampling, limits) -> None:
        super().__init__(model, stop_ids, sampling, replace(limits, max_draft=0))
        self._asked = 0

    def listen(self, renderer, tell, stop) -> None:
        super().listen(renderer, tell, stop)
        texts = texts_of(self.episodes[self._asked % len(self.episodes)])
        self._asked += 1
        self._ids = [id for text in texts for id in renderer.render_reply(text)]

    def _sample(self, hidden, keys, positions):
        assert len(hidden) == 1
        return [self._ids.pop(0)], [-0.5]


def told_agent(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    database: Database,
    *episodes: Episode,
    **sampling: int,
) -> Agent:
    """An agent with a tiny model and these episodes."""
    monkeypatch.setattr(mtsql.chat.agent, "StreamingEngine", ToldEngine)
    monkeypatch.setattr(ToldEngine, "episodes", list(episodes))
    budgets = SamplingConfig(temperature=0.0, **sampling)
    return Agent(AgentConfig(str(model), EnvConfig(), "brief", 4000, budgets, 0), database)
