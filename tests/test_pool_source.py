"""Pool files become samples of this run's tokenizer, without what a run must not learn."""

import json
from dataclasses import replace

import pytest

from helpers.chat_models import stand_in
from helpers.episodes import singers
from helpers.models import tiny_tokenizer
from helpers.pools import SCRIPT, trajectory_of
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.reply import format_reply
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import pool_record, record_line
from mtsql.rl.pool_source import PoolRules, read_pool
from mtsql.sql.dialogues import Corpus, Dialogue, Turn

OURS = Renderer(tiny_tokenizer())
QWEN = Renderer(stand_in("qwen"))


def corpus_of(stem, db_id, database, question="who is old ?"):
    turn = Turn(f"{stem}:0:0", 0, db_id, question, "SELECT 1", (("who ?", "SELECT 1"),))
    return Corpus([Dialogue(f"{stem}:0", db_id, (turn,))], {db_id: database})


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    database = singers(tmp_path_factory.mktemp("pool") / "singers.sqlite")
    return corpus_of("train", "shows", database), corpus_of("dev", "flights", database)


def env_maker(splits, **config):
    def make_env(turn):
        return SqlEnv(turn, splits[0].databases["shows"], EnvConfig(**config), "full")

    return make_env


def record_of(splits, renderer=OURS, **changes):
    [turn] = splits[0].turns
    return pool_record(trajectory_of(env_maker(splits)(turn), renderer), renderer, 0) | changes


def read(splits, tmp_path, *records, renderer=OURS, maker=None, max_samples=0, **rules):
    """Read records, or lines, from a file and half of them from another."""
    lines = [one if isinstance(one, str) else record_line(one) for one in records]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    half = (len(lines) + 1) // 2
    for file, part in zip(files, (lines[:half], lines[half:])):
        file.write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    limits = {"max_prompt_tokens": 9999, "max_tokens": 9999, **rules}
    rules = PoolRules(splits[0], splits[1:], **limits)
    maker = maker or env_maker(splits)
    return read_pool(files, rules, maker, renderer, seed=0, max_samples=max_samples)


def trained_text(sample, renderer):
    ids = [id for id, mask in zip(sample.ids, sample.loss_mask) if mask]
    return renderer.text(ids)


def spelled_out(record):
    """The record as if the policy had sampled the first word of a reply letter by letter."""
    added = set(OURS.tokenizer.get_added_vocab().values())
    for place, id in enumerate(record["ids"]):
        word = OURS.tokenizer.convert_ids_to_tokens(id)
        if record["loss_mask"][place] and id not in added and len(word) > 1:
            letters = OURS.tokenizer.convert_tokens_to_ids(list(word))
            ids, mask = list(record["ids"]), list(record["loss_mask"])
            ids[place : place + 1] = letters
            mask[place : place + 1] = [1] * len(letters)
            return record | {"ids": ids, "loss_mask": mask}
    raise AssertionError("no reply has a token of several letters")


def test_ids_of_this_tokenizer_are_taken_as_they_were_sampled(splits, tmp_path):
    record = record_of(splits)
    other = spelled_out(record)
    assert other["ids"] != record["ids"]
    found = read(splits, tmp_path, record, other)
    for sample, expected in zip(found.samples, (record, other)):
        assert sample.prompt_ids == expected["prompt_ids"]
        assert (sample.ids, sample.loss_mask) == (expected["ids"], expected["loss_mask"])
    assert (found.num_rendered, found.num_other_prompts, found.num_unknown) == (0, 0, 0)
    assert found.lines() == ["pool: 2 trajectories, 0 of them rendered from their messages"]


@pytest.mark.parametrize("made_with", [OURS, QWEN])
def test_a_pool_of_one_model_serves_another_with_another_tokenizer(splits, tmp_path, made_with):
    [trained_with] = {OURS, QWEN} - {made_with}
    record = record_of(splits, made_with)
    found = read(splits, tmp_path, record, renderer=trained_with)
    [sample] = found.samples
    expected = record_of(splits, trained_with)
    assert sample.prompt_ids == expected["prompt_ids"]
    assert (sample.ids, sample.loss_mask) == (expected["ids"], expected["loss_mask"])
    assert (found.num_rendered, found.num_other_prompts) == (1, 0)


def test_the_prompt_of_a_turn_of_this_run_is_rendered_as_this_run_renders_it(splits, tmp_path):
    database = splits[0].databases["shows"]
    spelled = (corpus_of("train", "shows", database, "what is <think> ?"), splits[1])
    [turn] = spelled[0].turns
    expected = QWEN.render_prompt(*env_maker(splits)(turn).reset())
    found = read(spelled, tmp_path, record_of(spelled), renderer=QWEN)
    assert found.samples[0].prompt_ids == expected and found.num_other_prompts == 0
    others = record_of(spelled) | {"turn_id": None}
    prompt_ids = read(spelled, tmp_path, others, renderer=QWEN).samples[0].prompt_ids
    assert len(prompt_ids) < len(expected)  # the question's letters became a token


def test_edited_messages_are_rendered_and_not_what_the_ids_said(splits, tmp_path):
    record = record_of(splits)
    record["messages"][-1]["content"] = "<answer_sql>SELECT 2</answer_sql>"
    found = read(splits, tmp_path, record)
    text = trained_text(found.samples[0], OURS)
    assert text.endswith("<answer_sql>SELECT 2</answer_sql><|im_end|>") and "Done." not in text
    assert found.num_rendered == 1


def test_trajectories_of_others_are_rendered_with_the_mask_on_replies(splits, tmp_path):
    messages = [
        {"role": "user", "content": "Who is old ? Think in <think>."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Look.",
            "tool_calls": [{"function": {"name": "exec_sql", "arguments": {"code": "SELECT 1"}}}],
        },
        {"role": "tool", "content": "one row"},
        {"role": "assistant", "content": "<answer_sql>SELECT 1</answer_sql>"},
    ]
    found = read(splits, tmp_path, {"messages": messages}, renderer=QWEN)
    [sample] = found.samples
    stop = "<|im_end|>"
    assert trained_text(sample, QWEN) == (
        '<think>\nLook.\n</think>\n\n<tool_call>\n{"name": "exec_sql", "arguments": '
        f'{{"code": "SELECT 1"}}}}\n</tool_call>{stop}<answer_sql>SELECT 1</answer_sql>{stop}'
    )
    think = QWEN.tokenizer.convert_tokens_to_ids("<think>")
    assert sample.prompt_ids.count(think) == 1  # a tag is a token wherever others write it
    assert (found.num_rendered, found.num_unknown) == (1, 1)
    assert "nobody checks" in found.lines()[-1]


def test_what_a_run_must_not_learn_is_left_out_by_name(splits, tmp_path):
    left_out = replace(splits[0], dialogues=[], left_out={"train:0:0": "wrong"})
    good = record_of(splits)
    records = [
        good | {"turn_id": "dev:0:0"},
        good | {"turn_id": None, "db_id": "flights"},
        good,
    ]
    found = read(splits, tmp_path, *records)
    assert len(found.samples) == 1
    lines = found.lines()
    assert lines[1].startswith("pool: 1 left out: its turn is held out (first: ")
    assert lines[1].endswith("a.jsonl, line 1, dev:0:0)")
    assert "1 left out: database flights is held out" in lines[2]
    with pytest.raises(ValueError, match="no trajectory to learn from .1: its turn is left out"):
        read((left_out, splits[1]), tmp_path, good)


def test_a_turn_of_another_data_set_is_not_taken_for_ours(splits, tmp_path):
    other = record_of(splits, db_id="concerts")
    found = read(splits, tmp_path, other)
    assert (found.num_unknown, found.num_other_prompts) == (1, 0)


def test_another_prompt_than_the_runs_own_is_counted(splits, tmp_path):
    found = read(splits, tmp_path, record_of(splits), maker=env_maker(splits, max_replies=2))
    assert (found.num_other_prompts, found.num_rendered) == (1, 0)
    assert "another prompt than this run writes" in found.lines()[1]


def test_long_ones_and_those_without_an_answer_are_counted(splits, tmp_path):
    good = record_of(splits)
    num_prompt, num_all = len(good["prompt_ids"]), len(good["prompt_ids"] + good["ids"])
    with pytest.raises(ValueError, match=f"max_prompt_tokens={num_prompt - 1}"):
        read(splits, tmp_path, good, max_prompt_tokens=num_prompt - 1)
    with pytest.raises(ValueError, match=f"more than {num_all - 1} tokens"):
        read(splits, tmp_path, good, max_tokens=num_all - 1)
    assert len(read(splits, tmp_path, good, max_tokens=num_all).samples) == 1
    bad = json.loads(record_line(good))
    bad["messages"][-1]["content"] = "The answer is SELECT 1."
    call = json.loads(record_line(good))
    call["messages"][-1]["content"] = format_reply(SCRIPT[0])
    found = read(splits, tmp_path, good, bad, call)
    assert [len(places) for places in found.left_out.values()] == [2]
    assert len(read(splits, tmp_path, bad, call, env=EnvConfig(answer_fallback=True)).samples) == 2


def test_an_episode_that_this_run_would_end_earlier_is_left_out(splits, tmp_path):
    good = record_of(splits)
    other = json.loads(record_line(good).replace("exec_sql", "run_query"))
    prose = json.loads(record_line(good))
    prose["messages"][1]["content"] = "I look at the data first."
    found = read(splits, tmp_path, good, other, prose)
    [(why, places)] = found.left_out.items()
    assert len(places) == 2 and "calls none of env.tools=['exec_sql', 'memory_retrieve']" in why
    with pytest.raises(ValueError, match="1: it has more than env.max_replies=2 replies"):
        read(splits, tmp_path, good, env=EnvConfig(max_replies=2))
    short = EnvConfig(horizon="short", tools=(), max_replies=1)
    only = {"messages": [good["messages"][0], good["messages"][-1]]}
    assert len(read(splits, tmp_path, good, only, env=short).samples) == 1


def test_a_call_that_cannot_be_read_may_stay_where_the_run_answers_it(splits, tmp_path):
    record = json.loads(record_line(record_of(splits)))
    record["messages"][1]["content"] = "<tool_call>{</tool_call>"
    assert read(splits, tmp_path, record, env=EnvConfig(malformed_call="observe")).samples
    with pytest.raises(ValueError, match="no trajectory to learn from"):
        read(splits, tmp_path, record)


def test_no_trajectory_is_learned_twice(splits, tmp_path):
    record = record_of(splits)
    found = read(splits, tmp_path, record, record, spelled_out(record), record | {"round": 7})
    assert len(found.samples) == 2
    assert "2 left out: it repeats an earlier one" in found.lines()[1]


def test_max_samples_keeps_some_of_all_files(splits, tmp_path):
    records = [json.loads(record_line(record_of(splits))) for _ in range(6)]
    for number, record in enumerate(records):
        record["messages"][1]["content"] += f"<think>{number}</think>"
    found = read(splits, tmp_path, *records, max_samples=4)
    assert len(found.samples) == 4
    assert found.lines()[1] == "pool: 4 of them are used (sft.max_samples)"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object, found list"),
        ('{"messages": 1}', "line 2: messages: expected a list"),
        ('{"turn_id": 7}', "line 2: turn_id: expected a string or null"),
    ],
)
def test_a_malformed_line_is_named(splits, tmp_path, line, words):
    with pytest.raises(ValueError, match=f"a.jsonl, {words}") as error:
        read(splits, tmp_path, record_of(splits), line, record_of(splits))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": "1 2"}, "ids: expected a list of integers from 0 to"),
        ({"ids": [1, 99999]}, "ids: expected a list of integers from 0 to"),
        ({"loss_mask": [2]}, "loss_mask: expected a list of integers from 0 to 1"),
        ({"loss_mask": [1]}, "a sample has .* ids but 1 loss_mask"),
        ({"prompt_ids": []}, "a sample needs a prompt"),
    ],
)
def test_damaged_ids_of_this_tokenizer_are_named(splits, tmp_path, change, words):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: {words}"):
        read(splits, tmp_path, record_of(splits, **change))
