"""A self-taught round keeps right rollouts by difficulty and trains on them. Demonstrations show
what an agent with the tools in use does."""

from typing import get_args

import numpy as np
import pytest

from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Answer, Reply
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.replay import demonstration_samples
from mtsql.rl.selftaught import SelfTaughtConfig, select
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.schema import Database
from mtsql.toyworld.world import WorldConfig, write_toy_world
from mtsql.workbench import _texts

WRONG = [Reply(Answer("SELECT 1"))]


def rollout_of(*replies):
    """A trajectory of these replies, each a list of sampled tokens."""
    trajectory = Trajectory(turn=None, sample=0, prompt_ids=[1], env=None)
    for ids in replies:
        trajectory.add_sampled(ids, [0.0] * len(ids))
    return trajectory


def points_of(trajectories):
    """A point on a line for each trajectory: its first token."""
    return np.array([[trajectory.ids[0]] for trajectory in trajectories])


def never(trajectories):
    raise AssertionError("nothing to embed")


A, B = [1, 2, 3], [4, 5, 6]
SHORT, LONG, LONG_AGAIN, OTHER, LONGER = (
    rollout_of(*r) for r in ([A], [A, A, A], [A, A, A], [A, A, B], [A, A, A, A])
)
"""Rollouts with 0, 2, 2, 2 and 3 interactions. LONG_AGAIN has the tokens of LONG."""
SIX = [rollout_of([first], [0], [0]) for first in (1, 2, 3, 50, 51, 99)]
"""With 2 interactions, in three clusters: 1, 2, 3; 50, 51; 99."""


def test_vectors_that_are_not_finite_name_their_embedding():
    with pytest.raises(ValueError, match="selftaught.embedding models/e: a vector has a number"):
        select(
            SIX,
            [True] * 5 + [False],
            False,
            SelfTaughtConfig(embedding="models/e"),
            0,
            lambda trajectories: points_of(trajectories) * np.nan,
        )


@pytest.mark.parametrize("seed", range(4))
def test_an_easy_or_always_solved_turn_keeps_few_short_rollouts(seed):
    config = SelfTaughtConfig(max_easy=1)
    group = [LONGER, LONG, SHORT, OTHER]
    one_wrong = [True, True, True, False]
    assert select(group, [True] * 4, False, config, seed, never) == [SHORT]
    assert select(group, one_wrong, True, config, seed, never) == [SHORT]
    assert select(group, [False] * 4, True, config, seed, never) == []
    two = SelfTaughtConfig(max_easy=2)
    assert select([SHORT, LONGER], [True] * 2, True, two, seed, never) == [SHORT]
    assert select([LONGER], [True], True, two, seed, never) == [LONGER]  # too long, but solved


@pytest.mark.parametrize("seed", range(4))
def test_a_hard_turn_keeps_the_medoid_of_each_cluster(seed):
    config = SelfTaughtConfig()
    group = [*SIX, SHORT, rollout_of([99], [0], [0])]  # one that is too short and one that repeats
    is_valid = [True] * 7 + [False]
    kept = select(group, is_valid, False, config, seed, points_of)
    assert [trajectory.ids[0] for trajectory in kept] == [2, 50, 99]


def test_a_hard_turn_with_few_or_only_short_rollouts_keeps_what_it_has():
    config = SelfTaughtConfig()
    valid = [True, True, True, False]
    kept = select([LONG, LONG_AGAIN, OTHER, SHORT], valid, False, config, 0, never)
    assert kept == [LONG, OTHER]
    assert select([SHORT, LONG], [True, False], False, config, 0, never) == [SHORT]
    assert select([SHORT, LONG], [False, False], False, config, 0, never) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_hard", 0), ("min_hard_interactions", -1), ("temperature", 0.0), ("embedding", "")],
)
def test_a_bad_key_is_named(key, value):
    with pytest.raises(ValueError, match=f"selftaught.{key}"):
        SelfTaughtConfig(**{key: value})


@pytest.mark.parametrize("style", get_args(PromptStyle))
@pytest.mark.parametrize(
    ("limits", "missing"),
    [
        (EnvConfig(), ()),
        (EnvConfig(tools=("exec_sql",)), ("memory_",)),
        (EnvConfig(tools=("memory_retrieve",)), ("exec_",)),
        (EnvConfig(tools=(), max_replies=1), ("memory_", "exec_", "<tool")),
    ],
)
def test_samples_and_tokenizer_texts_know_the_offered_tools_only(tmp_path, limits, missing, style):
    folder = tmp_path / "world"
    write_toy_world(folder, 0, WorldConfig(2, 1, 10, 1, 1))
    corpus = load_corpus(folder / "train.json", folder / "tables.json", folder / "database")
    texts = list(_texts(corpus, DataConfig(toy_folder=str(folder)), limits, style))
    renderer = Renderer(train_tokenizer(texts, 600, TAGS))

    def make_env(turn):
        schema, db_path = corpus.databases[turn.db_id].schema, corpus.databases[turn.db_id].path
        return SqlEnv(turn, Database(schema, db_path), limits, style)

    file = folder / "demonstrations.jsonl"
    limits_of = {"seed": 0, "max_samples": 0, "max_prompt_tokens": 9999}
    samples, lines = demonstration_samples(corpus, make_env, renderer, file, **limits_of)
    assert len(samples) == len(corpus.turns) and not lines
    texts += [renderer.text(sample.prompt_ids + sample.ids) for sample in samples]
    text = "\n".join(texts)
    for name in ("memory_retrieve", "memory_verify", "exec_sql", "exec_verify", "<tool_call>"):
        assert (name in text) == (not name.startswith(missing)), name
