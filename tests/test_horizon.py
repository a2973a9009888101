"""The short horizon: what the switch implies, what contradicts it, and that a model keeps it."""

import json

import eval as eval_script
import pytest
import train_rl
import train_sft

from helpers.episodes import GOLD, HISTORY, call, singers
from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.horizon import SHORT
from mtsql.agent.reply import Answer, Reply, Verdict, format_reply
from mtsql.model_notes import notes_of
from mtsql.rl.checks import check_config
from mtsql.run.config import config_diff, flat, parse_config, to_dict
from mtsql.sql.dialogues import Turn

CONFIG = EnvConfig(horizon="short", tools=(), max_replies=1)


def parse(*flags: str, kind: type = train_rl.Config):
    config = parse_config(kind, list(flags), "")
    if kind is train_rl.Config:
        check_config(config)
    return config


@pytest.mark.parametrize("kind", [train_rl.Config, train_sft.Config, eval_script.Config])
def test_one_switch_sets_all_that_it_implies(kind, tmp_path):
    (tmp_path / "long.yaml").write_text("env: {max_replies: 4}\nsampling.max_reply_tokens: 2048\n")
    (tmp_path / "short.yaml").write_text("base: long.yaml\nenv: {horizon: short}\n")
    default = flat(to_dict(kind()))
    expected = {"env.horizon": "short"} | {k: v for k, v in SHORT.items() if k in default}
    for flags in (
        ["--env.horizon", "short"],
        ["--env.horizon=short"],
        ["--config", str(tmp_path / "short.yaml")],
        ["--config", str(tmp_path / "long.yaml"), "--env.horizon", "short"],
    ):
        assert config_diff(parse(*flags, kind=kind), kind()) == expected


def test_budgets_may_be_set_beside_the_switch(tmp_path):
    config = parse("--env.horizon", "short", "--sampling.max_reply_tokens", "64")
    assert (config.sampling.max_reply_tokens, config.sampling.max_trajectory_tokens) == (64, 1000)
    (tmp_path / "own.yaml").write_text("env: {horizon: short}\nsampling: {max_reply_tokens: 7}\n")
    assert parse("--config", str(tmp_path / "own.yaml")).sampling.max_reply_tokens == 7


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--env.max_replies=4", "env.max_replies is 4, but env.horizon is short"),
        ("--env.tools=[exec_sql]", "env.tools is ['exec_sql'], but env.horizon is short"),
        ("--env.malformed_call=observe", "env.malformed_call is observe, but"),
        ("--env.answer_fallback=true", "env.answer_fallback is True, but"),
        ("--env.memory_results=true", "env.memory_results has no effect"),
        ("--reward.weights.propose=0.5", "reward.weights.propose is 0.5, but env.horizon is short"),
        ("--reward.weights.memory_verify=1", "reward.weights.memory_verify is 1.0, but"),
    ],
)
def test_a_contradiction_is_named(flag, words, tmp_path):
    with pytest.raises(ValueError) as error:
        parse("--env.horizon", "short", flag)
    assert words in str(error.value)
    key, _, value = flag.removeprefix("--").partition("=")
    (tmp_path / "base.yaml").write_text("env.horizon: short\n")
    (tmp_path / "own.yaml").write_text(f"base: base.yaml\n{key}: {value}\n")
    with pytest.raises(ValueError) as error:
        parse("--config", str(tmp_path / "own.yaml"))
    assert words in str(error.value)


@pytest.mark.parametrize("style", ["full", "brief"])
def test_an_episode_is_a_question_and_its_answer(style, tmp_path):
    turn = Turn("dev:0:1", 1, "shows", "and the old ones ?", GOLD, HISTORY)
    env = SqlEnv(turn, singers(tmp_path / "shows.sqlite"), CONFIG, style)
    [message], schemas = env.reset()
    assert schemas == [] and "exec_sql" not in message["content"]
    assert "step" not in message["content"].lower()
    assert env.step(format_reply(Reply(Answer(GOLD)))) is Outcome.ANSWERED
    assert env.final_sql == GOLD


def test_a_demonstration_becomes_one_answer():
    replies = [call(GOLD), call(GOLD, "memory_retrieve", ran=Verdict.PASS), Reply(Answer(GOLD))]
    turn = Turn("dev:0:1", 1, "shows", "and the old ones ?", GOLD, HISTORY)
    assert fit(replies, CONFIG.tools, turn) == [Reply(Answer(GOLD))]


def test_a_model_keeps_its_horizon(tmp_path):
    size = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **size}))
    [(name, notes)] = notes_of(parse("--env.horizon", "short")).items()
    (tmp_path / name).write_text(json.dumps(notes))
    again = parse("--model.path", str(tmp_path), kind=eval_script.Config)
    assert again.env == CONFIG and again.sampling.max_trajectory_tokens == 1000
    assert to_dict(parse().env)["horizon"] == "long"
