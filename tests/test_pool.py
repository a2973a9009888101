"""A pool's records hold what other programs read, and give back our samples."""

import json
from dataclasses import replace

import pytest

from helpers.chat_models import KINDS, stand_in
from helpers.episodes import call, make_env, singers
from helpers.models import tiny_tokenizer
from helpers.pools import SCRIPT, trajectory_of
from mtsql.agent.env import Outcome
from mtsql.agent.reply import format_reply
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import (
    TEMPLATE,
    pool_record,
    record_line,
    record_sample,
    write_pool,
    write_template,
)
from mtsql.rl.trajectory import Trajectory

TOKENIZERS = {"embedded": tiny_tokenizer, **{k: lambda k=k: stand_in(k) for k in KINDS}}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("pool") / "singers.sqlite")


def env_of(database, **config):
    return make_env(database, history=(("who ?", "SELECT 1"),), **config)


@pytest.mark.parametrize("style", ["full", "brief"])
def test_a_record_has_messages_tools_and_names_in_the_form_that_others_read(
    database, tmp_path, style
):
    renderer = Renderer(tiny_tokenizer())
    trajectory = trajectory_of(env_of(database, style=style), renderer)
    file = tmp_path / "pool.jsonl"
    write_pool(file, [pool_record(trajectory, renderer, 2)] * 2)
    lines = file.read_text(encoding="utf-8").splitlines()
    record, again = map(json.loads, lines)
    assert record == again and lines[0] == record_line(record)
    assert record["turn_id"] == "dev:0:0" and record["db_id"] == "shows"
    assert (record["round"], record["sample"], record["num_replies"]) == (2, 0, 3)
    assert record["outcome"] == "answered"
    assert {frozenset(message) for message in record["messages"]} == {
        frozenset({"role", "content"})
    }
    opening, schemas = env_of(database, style=style).reset()
    assert record["messages"][0] == opening[0]
    assert json.loads(record["tools"] or "[]") == schemas
    assert (record["tools"] is None) == (style == "brief")
    roles = [message["role"] for message in record["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    replies = [message["content"] for message in record["messages"][1::2]]
    assert replies == [format_reply(reply) for reply in SCRIPT]
    observations = [message["content"] for message in record["messages"][2::2]]
    assert observations == [one.observation for one in trajectory.env.records[:2]]
    sample, ours = record_sample(record), trajectory.to_sample([])
    for name in ("prompt_ids", "ids", "loss_mask"):
        assert getattr(sample, name) == getattr(ours, name)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_training_template_gives_our_ids_and_mask(database, tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    renderer = Renderer(tokenizer)
    trajectory = trajectory_of(env_of(database, style="full"), renderer)
    record = pool_record(trajectory, renderer, 0)
    write_template(tmp_path, renderer, env_of(database, style="full"))
    found = tokenizer.apply_chat_template(
        record["messages"],
        tools=json.loads(record["tools"]),
        chat_template=(tmp_path / TEMPLATE).read_text(encoding="utf-8"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    prompt = trajectory.prompt_ids
    assert found["input_ids"] == prompt + trajectory.ids
    assert found["assistant_masks"] == [0] * len(prompt) + trajectory.loss_mask


def test_a_training_template_refuses_other_openings(database):
    tokenizer = tiny_tokenizer()
    template = Renderer(tokenizer).training_template(*env_of(database).reset())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who ?"}]
    with pytest.raises(Exception, match="conversations begin with"):
        tokenizer.apply_chat_template(messages, chat_template=template)


def test_an_observation_that_the_model_did_not_read_is_no_message(database):
    renderer = Renderer(tiny_tokenizer())
    env = env_of(database, max_replies=2)
    trajectory = Trajectory(env.turn, 4, renderer.render_prompt(*env.reset()), env)
    for number in range(2):
        text = format_reply(call(f"SELECT {number}"))
        ids = renderer.render_reply(text)
        trajectory.add_sampled(ids, [0.0] * len(ids))
        observed = env.step(text)
        if not isinstance(observed, Outcome):
            trajectory.add_context(renderer.render_observation(observed))
    record = pool_record(trajectory, renderer, 0)
    roles = [message["role"] for message in record["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert (record["outcome"], record["sample"]) == ("max_replies", 4)


def test_half_a_character_is_written_as_the_tokens_have_it(database, tmp_path):
    renderer = Renderer(tiny_tokenizer())
    trajectory = trajectory_of(env_of(database, style="full"), renderer)
    records = trajectory.env.records
    records[0] = replace(records[0], observation="a \ud83d b")
    write_pool(tmp_path / "pool.jsonl", [pool_record(trajectory, renderer, 0)])
    record = json.loads((tmp_path / "pool.jsonl").read_text(encoding="utf-8"))
    assert record["messages"][2]["content"] == "a \ufffd b"


def test_a_fingerprint_is_of_the_vocabulary_and_the_template():
    kinds = {kind: Renderer(make()).fingerprint for kind, make in TOKENIZERS.items()}
    assert len(set(kinds.values())) == len(kinds)
    assert Renderer(tiny_tokenizer()).fingerprint == kinds["embedded"]
