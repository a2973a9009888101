"""Scored groups without a model, and a collector that plays a script instead of a policy."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from mtsql.agent.env import Outcome
from mtsql.engine.counts import EngineCounts
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.model.flops import ModelFlops
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.collect import Collector
from mtsql.rl.curriculum import Curriculum
from mtsql.rl.rewards import RewardConfig
from mtsql.rl.scored import Group, Scored, turn_of
from mtsql.rl.trajectory import Trajectory
from mtsql.run.ranks import Ranks
from mtsql.sql.sandbox import QueryStatus

CALL = SimpleNamespace(reply=SimpleNamespace(action="a call"), status=QueryStatus.OK)


def scored(
    reward: float,
    outcome: Outcome = Outcome.ANSWERED,
    num_tokens: int = 2,
    is_malformed: bool = False,
    turn_id: str = "t",
) -> Scored:
    """A scored trajectory, with one tool call unless it is malformed."""
    env = SimpleNamespace(outcome=outcome, records=[] if is_malformed else [CALL])
    trajectory = Trajectory(SimpleNamespace(turn_id=turn_id), 0, [1], env)
    if num_tokens:
        trajectory.add_sampled([7] * num_tokens, [-1.0] * num_tokens)
    return Scored(trajectory, {}, reward)


class FakeEngine:
    """Counts what it computes, and how often its cache is emptied. Its model has one weight."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.model.weight)
        self.counts = EngineCounts()
        self.num_emptied = 0

    def forget_prompts(self) -> None:
        self.num_emptied += 1


@dataclass(frozen=True)
class ScriptedCollector(Collector):
    """Plays groups of two rewards: 1 and 1 for the turns in `equal`, 1 and 2 for others. In the
    turns of `truncated`, the trajectory of reward 1 is truncated, and so dropped. `tried` keeps
    the turns of each rollout, and `engines` the sampling of each engine."""

    equal: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    tried: list[list[str]] = field(default_factory=list)
    engines: list[SamplingConfig] = field(default_factory=list)

    @contextmanager
    def new_engine(self, sampling):
        self.engines.append(sampling)
        yield FakeEngine()

    def play(self, engine, turns, split, *, num_samples, update, show):
        engine.counts += EngineCounts(computed=len(turns))
        self.tried.append([turn.turn_id for turn in turns])
        groups = []
        for turn in turns:
            is_cut = turn.turn_id in self.truncated
            outcome = Outcome.REPLY_TOKENS if is_cut else Outcome.ANSWERED
            other = 1 if turn.turn_id in self.equal else 2
            groups.append(
                [scored(1, outcome, turn_id=turn.turn_id), scored(other, turn_id=turn.turn_id)]
            )
        n = len(turns)
        counts = EngineCounts(computed=3 * n, distinct=2 * n, attended=4 * n, sampled=n)
        return groups, counts


def collector_of(turns: list[str], **fields: object) -> ScriptedCollector:
    """A collector for training turns with these ids, in groups of two."""
    corpus = SimpleNamespace(turns=[SimpleNamespace(turn_id=turn_id) for turn_id in turns])
    usual = {
        "ranks": Ranks(),
        "policy": None,
        "compute_dtype": None,
        "renderer": None,
        "corpora": {"train": corpus},
        "env_maker": lambda split: None,
        "engine": EngineConfig(),
        "sampling": SamplingConfig(),
        "reward": RewardConfig(),
        "advantage": AdvantageConfig(zero_variance="drop", on_truncated="drop"),
        "group_size": 2,
        "resample_rounds": 0,
        "max_prompt_tokens": 9,
        "seed": 0,
        "flops": ModelFlops(per_token=10.0, per_pair=1.0, per_predicted=5.0),
    }
    return ScriptedCollector(**usual | fields)


def resampled(
    turns: list[str],
    rounds: int,
    equal: tuple[str, ...] = (),
    num_picked: int = 3,
    truncated: tuple[str, ...] = (),
    accelerator: Accelerator | None = None,
) -> tuple[list[list[str]], dict]:
    """Collect an update of a curriculum of one stage. Returns this rank's turns of each rollout
    and the metrics."""
    curriculum = Curriculum([turns], (1.0,), seed=1)
    collector = collector_of(
        turns,
        ranks=Ranks.of(accelerator) if accelerator else Ranks(),
        resample_rounds=rounds,
        equal=tuple(equal),
        truncated=tuple(truncated),
    )
    picked = curriculum.pick(5, 9, num_picked)
    groups, metrics = collector.collect(picked, curriculum, 5, 9)
    assert turn_ids(groups) == sum(collector.tried, [])
    assert len(collector.engines) == 1
    return collector.tried, metrics


def turn_ids(groups: list[Group]) -> list[str]:
    """The turns of the groups, in order."""
    return [turn_of(group) for group in groups]
