"""What a kept trajectory holds: texts by token, replies, results, and the learner's numbers."""

import gzip
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.episodes import GOLD, HISTORY, answer, call, make_env, singers
from mtsql.agent.env import Outcome
from mtsql.agent.reply import Verdict, format_reply
from mtsql.learner.losses import store_scores
from mtsql.learner.packing import Sample, TokenScores, pack
from mtsql.model.tokenizer import train_tokenizer
from mtsql.rl.evaluate import score_turn
from mtsql.rl.kept import packed
from mtsql.rl.scored import Scored
from mtsql.rl.trajectory import Trajectory
from mtsql.rl.trajectory_record import (
    MAX_CELL_CHARS,
    MAX_COLUMNS,
    MAX_ROWS,
    evaluation_record,
    result_record,
    token_texts,
    update_records,
)
from mtsql.sql.query import QueryResult, QueryStatus

WRONG = "SELECT name FROM singer WHERE country = 'Peru'"


class Characters:
    """A renderer in which each character is a token."""

    def text(self, ids):
        return "".join(map(chr, ids))


class Bytes:
    """A renderer in which each byte is a token, so that a character may need several."""

    def text(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """The renderer of the embedded tokenizer, whose tokens write a space only between words."""

    def __init__(self):
        self.tokenizer = train_tokenizer(["SELECT release_year FROM song"] * 4, 400, ["<think>"])

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


RENDERER, BYTES, WORDS = Characters(), Bytes(), Words()


def encode(text):
    return list(map(ord, text))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("shows") / "shows.sqlite")


def played(database, replies, sample=0, cut_off=""):
    """A trajectory in which the replies were played, with tokens; then one that is cut off."""
    env = make_env(database, history=HISTORY, max_replies=4)
    trajectory = Trajectory(env.turn, sample, encode("who ?"), env)
    for reply in replies:
        text = format_reply(reply)
        trajectory.add_sampled(encode(text), [-0.123456] * len(text))
        observed = env.step(text)
        if not isinstance(observed, Outcome):
            trajectory.add_context(encode(observed))
    if cut_off:
        trajectory.add_sampled(encode(cut_off), [-2.0] * len(cut_off))
        env.end(Outcome.REPLY_TOKENS)
    return trajectory


def test_a_group_of_an_update(database):
    right = played(database, [call(WRONG, think="no"), answer(ran=Verdict.NO_PASS)])
    cut = played(database, [call("SELECT nothing")], sample=1, cut_off="<think>long")
    components = {"ex": 1.0, "em": 1.0, "propose": 0.25}
    group = [
        Scored(right, components, 2.25, so_far=(0.25, 0.5), advantages=[0.5, -0.0]),
        Scored(cut, dict.fromkeys(components, 0.0), -0.5),
    ]
    right.scores.ratios = [1.0] * len(right.ids)
    first, second = update_records(group, RENDERER, 7, 2)
    assert json.loads(packed_text([first])) == first  # nothing that JSON cannot hold
    assert first.keys() == second.keys()
    assert (first["update"], first["curriculum_stage"], first["part"]) == (7, 2, "train")
    assert (first["turn_id"], first["turn"], first["gold_sql"]) == ("dev:0:0", 1, GOLD)
    assert first["history"] == [{"question": HISTORY[0][0], "sql": HISTORY[0][1]}]
    assert first["gold_result"]["rows"] == [["Ann"]]
    assert first["answer"] == GOLD and first["answer_result"] == first["gold_result"]
    assert first["ex"] and first["error"] == "" and first["reward"] == 2.25
    assert "".join(first["tokens"]) == RENDERER.text(right.ids)
    assert set(first["logprobs"]) == {-0.1235, 0.0} and len(first["ratios"]) == len(right.ids)
    query, end = first["replies"]
    assert (query["action"], query["sql"], query["think"]) == ("exec_sql", WRONG, "no")
    assert query["result"]["rows"] == [["Bob"]] and query["status"] == "ok"
    assert (query["advantage"], query["earned"]) == (0.5, 0.25)
    assert (end["action"], end["sql"], end["exec_verdict"]) == ("answer", GOLD, "no_pass")
    assert str(end["advantage"]) == "0.0" and end["result"] is None
    assert "".join(first["tokens"][end["start"] : end["end"]]).endswith("</answer_sql>")
    assert second["replies"][0]["result"]["status"] == "error"
    assert second["replies"][1]["action"] == "truncated"
    assert second["replies"][1]["advantage"] is None and second["ratios"] == []
    assert (second["answer"], second["error"]) == ("", "no_answer")


def packed_text(records):
    return gzip.decompress(packed(records)).decode()


def test_an_episode_of_an_evaluation_has_no_reward(database):
    trajectory = played(database, [answer(WRONG)])
    record = evaluation_record(trajectory, score_turn(trajectory), RENDERER, "dev", 40)
    assert (record["part"], record["update"], record["reward"]) == ("dev", 40, None)
    assert not record["ex"] and record["error"] == score_turn(trajectory).error
    assert record["curriculum_stage"] is None and record["replies"][0]["advantage"] is None
    group = [Scored(trajectory, {"ex": 0.0, "em": 0.0}, 0.0)]
    assert record.keys() == update_records(group, RENDERER, 1, 0)[0].keys()


def test_a_result_is_shortened():
    row = (None, b"\x00\xff", "x" * 5000, 1.5, *range(100))
    columns = tuple(f"c{n}" for n in range(len(row)))
    found = result_record(QueryResult(QueryStatus.OK, (row,) * 1000, columns))
    assert (found["num_rows"], found["num_columns"]) == (1000, 104)
    assert len(found["rows"]) == MAX_ROWS and len(found["columns"]) == MAX_COLUMNS
    cells = found["rows"][0]
    assert len(cells) == MAX_COLUMNS and cells[:2] == [None, "x'00ff'"] and cells[3] == "1.5"
    assert len(cells[2]) == MAX_CELL_CHARS + 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_the_texts_of_tokens_are_the_whole_text(text):
    ids = list(text.encode("utf-8", "replace"))
    assert "".join(token_texts(ids, BYTES)) == BYTES.text(ids)
    ids = WORDS.tokenizer.encode(f"<think>{text}".encode("utf-8", "replace").decode())
    assert "".join(token_texts(ids, WORDS)) == WORDS.text(ids)


def test_a_token_has_the_text_that_it_adds():
    ids = list("aé漢b".encode())
    assert token_texts(ids, BYTES) == ["a", "", "é", "", "", "漢", "b"]
    ids = WORDS.tokenizer.encode("SELECT release_year")
    texts = token_texts(ids, WORDS)
    assert "".join(texts) == "SELECT release_year" and " " not in texts[-1]
    assert token_texts([], BYTES) == []


def test_broken_characters_are_not_lost():
    ids = [0xC3, 0x28, 0xFF, 0x61, 0xE6]
    assert "".join(token_texts(ids, BYTES)) == BYTES.text(ids)


def test_the_learners_numbers_reach_the_tokens_that_they_belong_to():
    samples = [
        Sample([1, 1], [5, 6, 7, 8], [1, 0, 1, 1], [0.5] * 4, [-1.0] * 4, scores=TokenScores()),
        Sample([1, 1], [9], [1], [0.5], [-1.0]),
        Sample([2], [3, 4], [0, 1], [0.5] * 2, [-1.0] * 2, scores=TokenScores()),
    ]
    batches = pack(samples, 7) + pack(samples[:0], 7)
    tokens = []
    for batch in batches:  # a number for each target: its id
        differences = (batch.targets.double() / 100).log()
        tokens.append(torch.stack([differences, batch.targets.double()]))
    store_scores(samples, batches, tokens)
    assert samples[0].scores.ratios == pytest.approx([0.05, 0.0, 0.07, 0.08])
    assert samples[0].scores.entropies == [5.0, 0.0, 7.0, 8.0]
    assert samples[2].scores.ratios == pytest.approx([0.0, 0.04])
