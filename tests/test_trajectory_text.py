"""The text of an update's trajectories: which groups it shows, what it marks, and that no text of a
model or a data set can break it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.episodes import GOLD, make_env, singers
from mtsql.agent.env import Outcome
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.samples import compute_advantages
from mtsql.rl.scored import Group, Scored
from mtsql.rl.trajectory import Trajectory
from mtsql.rl.trajectory_text import LEGEND, chosen_groups, marked_text, update_text
from mtsql.run.ranks import Ranks

TRICKY = st.text(st.sampled_from("[]\\[]ab\n"), max_size=12)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("shows") / "shows.sqlite")


def decode(ids: list[int]) -> str:
    """A tokenizer in which each character is a token."""
    return "".join(map(chr, ids))


def encode(text: str) -> list[int]:
    return list(map(ord, text))


def scored(database, sample: int, reward: float, reply: str, outcome=Outcome.ANSWERED) -> Scored:
    """A trajectory: a reply, an observation and the end of a second reply."""
    env = make_env(database)
    env.end(outcome)
    trajectory = Trajectory(env.turn, sample, encode("who ?"), env)
    if reply:
        trajectory.add_sampled(encode(reply), [-0.5] * len(reply))
        trajectory.add_context(encode("\n7 rows\n"))
        trajectory.add_sampled(encode("done"), [-0.5] * 4)
    return Scored(trajectory, {"ex": reward, "em": 0.5}, reward)


def group_of(database, *rewards: float) -> Group:
    return [scored(database, i, reward, f"reply {i}") for i, reward in enumerate(rewards)]


def read_marks(shown: str) -> list[str]:
    """The stretches of a marked text, sampled ones at odd places, without the added backslashes."""
    pieces = re.split(r"\[\[|\]\]", shown)
    texts = []
    for place, piece in enumerate(pieces):
        before, after = "[]" if place % 2 else "]["
        text = re.sub(r"(?<=\[)\\(?=\\*\[)|(?<=\])\\(?=\\*\])", "", before + piece + after)
        texts.append(text[1:-1])
    return texts


@given(st.lists(TRICKY.filter(len), min_size=1, max_size=5))
def test_marks_can_be_read_back_whatever_the_text_is(stretches):
    ids, mask = [], []
    for place, text in enumerate(stretches):
        ids += encode(text)
        mask += [place % 2] * len(text)
    expected = stretches if len(stretches) % 2 else [*stretches, ""]
    assert read_marks(marked_text(ids, mask, decode)) == expected


@settings(max_examples=30)
@given(st.text(max_size=9))
def test_any_text_gives_printable_utf_8(text):
    shown = marked_text(encode(text), [1] * len(text), decode)
    assert shown.encode().decode() == shown
    assert all(char.isprintable() or char in "\n\t" for char in shown)


def test_text_that_looks_like_marks_or_headings_is_not_taken_for_them(database):
    reply = "SELECT a[[0]]\n======== train:1:0 ========\x1b[2J\r\ud83d"
    text = update_text([[scored(database, 0, 1.0, reply)]], decode)
    shown = text.split(LEGEND)[1]
    assert shown.count("[[") == shown.count("]]") == 2
    assert [line for line in shown.splitlines() if line.startswith("====")] == [
        "======== dev:0:0: highest mean reward ========"
    ]
    assert (
        r"    [[SELECT a[\[0]\]" in shown
        and r"    ======== train:1:0 ========\x1b[2J\r\ud83d" in shown
    )


def test_the_groups_to_learn_from_and_the_best_and_worst_are_shown_once_each(database):
    means = ((3, 3), (0, 3), (1, 2), (0, 2), (0, 0), (1, 1), (3, 3))
    groups = [group_of(database, *rewards) for rewards in means]
    found = [(groups.index(group), why) for why, group in chosen_groups(groups)]
    assert found == [
        (1, "large spread of rewards"),
        (3, "large spread of rewards"),
        (0, "highest mean reward of the other groups"),
        (4, "lowest mean reward of the other groups"),
    ]


@pytest.mark.parametrize("num_groups", [0, 1, 2, 3])
def test_no_group_is_shown_twice(database, num_groups):
    groups = [group_of(database, place, 3) for place in range(num_groups)]
    shown = [groups.index(group) for _, group in chosen_groups(groups)]
    assert sorted(shown) == list(range(num_groups))
    assert f"{num_groups} of this update's {num_groups} groups" in update_text(groups, decode)


def test_the_advantages_of_replies_stand_side_by_side(database):
    group = group_of(database, 1.0, 3.0)
    for one in group:
        one.so_far = (one.reward / 2, one.reward)
    config = AdvantageConfig(credit="reply", baseline="leave_one_out", scale="none")
    compute_advantages([group], Ranks(), config)
    text = update_text([group], decode)
    assert "     1   3.000  +2.000 +1.000  3.00" in text
    group[1].so_far = (0.0, 3.0)
    group[0].so_far = (0.0, 1.0)
    compute_advantages([group], Ranks(), config)
    assert "     1   3.000     +2.000  3.00" in update_text([group], decode)


def test_a_group_shows_its_turn_all_siblings_and_the_best_and_worst_text(database):
    group = group_of(database, 1.0, 3.0, 0.0, 1.0)
    config = AdvantageConfig(scale="none", on_truncated="mask")
    group[3].trajectory.env.end(Outcome.REPLY_TOKENS)
    compute_advantages([group], Ranks(), config)
    text = update_text([group], decode)
    body = text.split(LEGEND)[1]
    assert text.startswith("1 of this update's 1 groups on the main rank.\n")
    assert body == (
        "\n======== dev:0:0: large spread of rewards ========\n"
        "database  shows\n"
        "hardness  medium\n"
        "question  who is old ?\n"
        f"gold SQL  {GOLD}\n"
        "\n"
        "prompt (5 tokens)\n"
        "    who ?\n"
        "\n"
        "sample  reward  advantage    ex    em       outcome  tokens\n"
        "     1   3.000     +1.750  3.00  0.50      answered      11   best\n"
        "     0   1.000     -0.250  1.00  0.50      answered      11\n"
        "     3   1.000          -  1.00  0.50  reply_tokens      11\n"
        "     2   0.000     -1.250  0.00  0.50      answered      11  worst\n"
        "\n"
        "The first 6 tokens of these two are the same.\n"
        "\n"
        "---- best: sample 1, reward 3.000, answered ----\n"
        "    [[reply 1]]\n"
        "    7 rows\n"
        "    [[done]]\n"
        "\n"
        "---- worst: sample 2, reward 0.000, answered ----\n"
        "    [[reply 2]]\n"
        "    7 rows\n"
        "    [[done]]\n"
    )


def test_a_truncated_reply_is_there_to_its_last_token(database):
    reply = "<think> " + "so " * 400
    text = update_text([[scored(database, 0, 0.0, reply, Outcome.REPLY_TOKENS)]], decode)
    assert f"[[{reply}]]" in text and "reply_tokens" in text


def test_siblings_with_the_same_text_are_shown_once(database):
    same = [scored(database, i, 1.0, "SELECT 1") for i in range(3)]
    assert update_text([same], decode).count("[[SELECT 1]]") == 1
    other = [*same, scored(database, 3, 1.0, "SELECT 2")]
    text = update_text([other], decode)
    assert "---- one: sample 0" in text and "---- another: sample 3" in text


def test_a_prompt_that_the_model_did_not_read_is_not_shown(database):
    text = update_text([[scored(database, 0, 0.0, "", Outcome.PROMPT_TOKENS)]], decode)
    assert "prompt (5 tokens): not shown" in text and "who ?" not in text
    assert "(no token was sampled)" in text


def test_a_kl_penalty_has_a_column(database):
    group = group_of(database, 1.0, 1.0)
    assert " kl " not in update_text([group], decode)
    group[0].kl = 0.25
    assert re.search(r"sample +reward +kl +advantage", update_text([group], decode))
