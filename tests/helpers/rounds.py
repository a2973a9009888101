"""Runs of stage 1 on a tiny model that does not play itself: a script says what is right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import train_sft

from mtsql.agent.reply import Answer, Reply
from mtsql.model.policy import EmbeddedConfig, ModelConfig
from mtsql.rl import collect, sweep
from mtsql.rl.replay import read_demonstrations, replay
from mtsql.rl.selftaught import SelfTaughtConfig
from mtsql.run.checkpoint import CheckpointConfig

WRONG = [Reply(Answer("SELECT 1"))]


class ScriptedRounds:
    """Takes the place of the rollouts. Of each turn that `is_solved(turn_id, round)` names, the
    first sample answers as demonstrated; all others answer wrongly.

    `asked` holds (round, turn ids) of each chunk. `num_left` chunks are played before the process
    dies of `error`; None: it lives.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, is_solved: Callable[[str, int], bool]
    ) -> None:
        monkeypatch.setattr(collect, "rollout", self.play)
        monkeypatch.setattr(sweep, "TURNS_PER_CHUNK", 2)
        self.is_solved = is_solved
        self.asked: list[tuple[int, list[str]]] = []
        self.num_left: int | None = None
        self.error: type[BaseException] = ZeroDivisionError

    def play(self, engine, renderer, turns, make_env, *, num_samples, update, judge, **_):
        if self.num_left is not None:
            self.num_left -= 1
            if self.num_left < 0:
                raise self.error
        self.asked.append((update, [turn.turn_id for turn in turns]))
        engine.counts.sampled += 10 * len(turns)
        demonstrations = read_demonstrations(Path("data/toyworld/demonstrations.jsonl"))
        results = []
        for turn in turns:
            right = demonstrations[turn.turn_id]
            first = right if self.is_solved(turn.turn_id, update) else WRONG
            for replies in [first, *[WRONG] * (num_samples - 1)]:
                results.append(judge(replay(turn, replies, make_env(turn), renderer)))
        return results


def tiny_rounds(run: str, **selftaught: object) -> train_sft.Config:
    """A run of two rounds of six turns in a model of one layer, without held-out scores."""
    tiny = EmbeddedConfig(hidden_size=32, num_layers=1, intermediate_size=32)
    usual: dict[str, object] = {"rounds": 2, "samples_per_turn": 2, "eval_split": None}
    return train_sft.Config(
        source="self",
        run=run,
        max_turns=6,
        model=ModelConfig(embedded=tiny),
        selftaught=SelfTaughtConfig(**usual | selftaught),
        sft=train_sft.SftConfig(epochs=1, samples_per_update=2),
        checkpoint=CheckpointConfig(every=1, keep_best=0),
    )
