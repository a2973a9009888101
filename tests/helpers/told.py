"""Models that say what they are told, for conversations: an agent without a model, and the real
engine with the tokens of a script."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from helpers.episodes import singers
from mtsql.agent.env import EnvConfig, Outcome
from mtsql.agent.reply import Reply, format_reply
from mtsql.chat.conversation import Conversation
from mtsql.chat.events import Did, Event, Played, Reading, Sampled
from mtsql.chat.session import Session
from mtsql.chat.telling import TellingEnv
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Database

Episode = list[Reply | str]
"""The replies to one question."""


def texts_of(episode: Episode) -> list[str]:
    return [one if isinstance(one, str) else format_reply(one) for one in episode]


@dataclass
class ToldAgent:
    """Stands for an agent: the real environment with the replies of `episodes`, one episode for
    each question, again from the first after the last. It imports no torch."""

    database: Database
    episodes: list[Episode]
    secs_per_word: float = 0.0

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(model="models/told", max_prompt_tokens=4000)
        self.asked: list[Turn] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def ask(self, turn: Turn) -> Iterator[Event | Played]:
        episode = self.episodes[len(self.asked) % len(self.episodes)]
        self.asked.append(turn)
        self._stop.clear()
        env = TellingEnv(turn, self.database, EnvConfig(max_replies=9), "brief")
        told: list[Event] = []
        env.tell = told.append
        steps = []
        num_words = 0
        yield Reading(10, 20)
        for text in texts_of(episode):
            for word in text.split(" "):
                time.sleep(self.secs_per_word)
                if self._stop.is_set():
                    raise ValueError("stopped: the question is not part of the conversation")
                num_words += 1
                yield Sampled(f"{word} ")
            outcome = env.step(text)
            steps += [event.step for event in told if isinstance(event, Did)]
            yield from told
            told.clear()
            if isinstance(outcome, Outcome):
                yield Played(env.final_sql, outcome, tuple(steps), 20, num_words, 0.5)


def told_session(folder: Path, *episodes: Episode, secs_per_word: float = 0.0) -> Session:
    """A session on the database of two singers, which is written to `folder`."""
    database = singers(folder / "shop.sqlite")
    agent = ToldAgent(database, list(episodes), secs_per_word)
    return Session(agent, Conversation(database, EnvConfig()))
