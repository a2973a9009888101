"""Demonstrations fitted to fewer tools: those of the embedded world and others. Nothing in a fitted
episode names a tool that is not in use."""

import json
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest

from helpers.episodes import BOTH, EXEC, MEMORY, answer, call
from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Answer, ToolCall, Verdict, format_reply
from mtsql.rl.replay import read_demonstrations
from mtsql.sql.dialogues import Turn, load_corpus
from mtsql.sql.sandbox import run_query
from mtsql.toyworld.world import WorldConfig, write_toy_world

PASS, NO = Verdict.PASS, Verdict.NO_PASS
NAMES = {"exec_sql": ("exec_sql", "exec_verify"), "memory_retrieve": ("memory_", "coheren")}
"""What only texts about a tool contain."""
SIZE = WorldConfig(5, 1, train_dialogues=60, seen_dialogues=1, dev_dialogues=1)
OFFERS = [BOTH, EXEC, MEMORY, ()]

execute = call
remember = partial(call, tool="memory_retrieve")


def offer_name(tools):
    return "+".join(tools) or "nothing"


# The demonstrations that toyworld/dialogues.py writes. A later turn is one with earlier turns.
GOLD = "SELECT age FROM singer WHERE city = 'Bern' AND name = 'Ann'"
TURN = Turn("train:0:1", 1, "shop", "how old is she ?", GOLD, (("those in bern ?", "SELECT 1"),))
HASTY = [answer(GOLD)]
FIRST = [execute(GOLD), answer(GOLD, ran=PASS)]
LATER = [execute(GOLD), remember(GOLD, ran=PASS), answer(GOLD, fits=PASS)]
FIRST_LOOK = [
    execute("look", think="look at city"),
    execute(GOLD, think="city is Bern", ran=PASS),
    answer(GOLD, ran=PASS),
]
LATER_LOOK = [
    execute("look", think="look at city"),
    remember(GOLD, think="city is Bern", ran=PASS),
    answer(GOLD, fits=PASS),
]
FIRST_NOTHING = [
    execute("naive"),
    execute("look", think="nothing , look", ran=NO),
    execute(GOLD, think="city is Bern", ran=PASS),
    answer(GOLD, ran=PASS),
]
LATER_NOTHING = [
    execute("naive"),
    execute("look", think="nothing , look", ran=NO),
    remember(GOLD, think="city is Bern", ran=PASS),
    answer(GOLD, fits=PASS),
]
FIRST_WRONG = [
    execute("wrong"),
    execute(GOLD, think="age is not there", ran=NO),
    answer(GOLD, ran=PASS),
]
LATER_WRONG = [
    execute("wrong"),
    execute(GOLD, think="age is not there", ran=NO),
    remember(GOLD, ran=PASS),
    answer(GOLD, fits=PASS),
]
FORGOT = [
    execute("forgot"),
    remember("forgot", ran=PASS),
    execute(GOLD, think="keep city is Bern", fits=NO),
    answer(GOLD, ran=PASS),
]
SAW = "that singer is Ann"
LATER_REREAD = [
    remember("asked"),
    execute(GOLD, think=SAW, fits=NO),
    answer(GOLD, ran=PASS),
]
LATER_REREAD_NOTHING = [
    execute("guess"),
    remember("guess", ran=NO),
    execute(GOLD, think=SAW, fits=NO),
    answer(GOLD, ran=PASS),
]
LATER_REREAD_LOOK = [
    remember("asked"),
    execute("look", think=SAW, fits=NO),
    execute(GOLD, think="city is Bern", ran=PASS),
    answer(GOLD, ran=PASS),
]
LATER_RERUN = [
    execute("asked"),
    remember(GOLD, think=SAW, ran=PASS),
    answer(GOLD, fits=PASS),
]
SHAPES = {
    name: shape
    for name, shape in globals().items()
    if name.startswith(("HASTY", "FIRST", "LATER", "FORGOT"))
}


@pytest.mark.parametrize(
    ("replies", "offered", "expected"),
    [
        (HASTY, EXEC, [answer(GOLD)]),
        (HASTY, MEMORY, [answer(GOLD)]),
        (FIRST, EXEC, FIRST),
        (FIRST, MEMORY, [answer(GOLD)]),
        (LATER, EXEC, [execute(GOLD), answer(GOLD, ran=PASS)]),
        (LATER, MEMORY, [remember(GOLD), answer(GOLD, fits=PASS)]),
        (FIRST_LOOK, EXEC, FIRST_LOOK),
        (FIRST_LOOK, MEMORY, [answer(GOLD)]),
        (
            LATER_LOOK,
            EXEC,
            [execute("look", think="look at city"), answer(GOLD, think="city is Bern", ran=PASS)],
        ),
        (LATER_LOOK, MEMORY, [remember(GOLD), answer(GOLD, fits=PASS)]),
        (FIRST_NOTHING, EXEC, FIRST_NOTHING),
        (FIRST_NOTHING, MEMORY, [answer(GOLD)]),
        (
            LATER_NOTHING,
            EXEC,
            [
                execute("naive"),
                execute("look", think="nothing , look", ran=NO),
                answer(GOLD, think="city is Bern", ran=PASS),
            ],
        ),
        (LATER_NOTHING, MEMORY, [remember(GOLD), answer(GOLD, fits=PASS)]),
        (FIRST_WRONG, EXEC, FIRST_WRONG),
        (FIRST_WRONG, MEMORY, [answer(GOLD)]),
        (
            LATER_WRONG,
            EXEC,
            [
                execute("wrong"),
                execute(GOLD, think="age is not there", ran=NO),
                answer(GOLD, ran=PASS),
            ],
        ),
        (LATER_WRONG, MEMORY, [remember(GOLD), answer(GOLD, fits=PASS)]),
        (LATER_REREAD, EXEC, [execute(GOLD), answer(GOLD, ran=PASS)]),
        (LATER_REREAD, MEMORY, [remember("asked"), answer(GOLD, think=SAW, fits=NO)]),
        (
            LATER_REREAD_NOTHING,
            EXEC,
            [
                execute("guess"),
                execute(GOLD, ran=NO),
                answer(GOLD, ran=PASS),
            ],
        ),
        (LATER_REREAD_NOTHING, MEMORY, [remember("guess"), answer(GOLD, think=SAW, fits=NO)]),
        (
            LATER_REREAD_LOOK,
            EXEC,
            [
                execute("look"),
                execute(GOLD, think="city is Bern", ran=PASS),
                answer(GOLD, ran=PASS),
            ],
        ),
        (LATER_REREAD_LOOK, MEMORY, [remember("asked"), answer(GOLD, think=SAW, fits=NO)]),
        (LATER_RERUN, EXEC, [execute("asked"), answer(GOLD, think=SAW, ran=PASS)]),
        (LATER_RERUN, MEMORY, [remember(GOLD), answer(GOLD, fits=PASS)]),
        (FORGOT, EXEC, [execute(GOLD, think="keep city is Bern"), answer(GOLD, ran=PASS)]),
        (FORGOT, MEMORY, [remember("forgot"), answer(GOLD, think="keep city is Bern", fits=NO)]),
    ],
)
def test_fit_leaves_of_each_toy_shape_what_the_remaining_tools_allow(replies, offered, expected):
    assert fit(replies, offered, TURN) == expected


def test_fit_leaves_only_the_answer_and_thoughts_about_the_conversation_without_tools():
    for name, shape in SHAPES.items():
        think = "keep city is Bern" if name == "FORGOT" else ""
        assert fit(shape, (), TURN) == [answer(GOLD, think=think)]


def test_fit_changes_nothing_with_both_tools_and_tools_may_be_taken_away_one_by_one():
    for shape in SHAPES.values():
        assert fit(shape, BOTH, TURN) is shape
        assert (
            fit(fit(shape, EXEC, TURN), (), TURN)
            == fit(fit(shape, MEMORY, TURN), (), TURN)
            == fit(shape, (), TURN)
        )


@pytest.mark.parametrize(
    ("replies", "offered", "expected"),
    [
        pytest.param(
            [
                remember("wrong"),
                execute("wrong", fits=PASS),
                remember(GOLD, think="no age", ran=NO),
            ]
            + [answer(GOLD, fits=PASS)],
            MEMORY,
            [remember(GOLD), answer(GOLD, fits=PASS)],
            id="only execution found the fault",
        ),
        pytest.param(
            [execute("bad"), remember("bad", ran=NO), execute(GOLD, think="keep it", fits=NO)]
            + [answer(GOLD, ran=PASS)],
            EXEC,
            [execute("bad"), execute(GOLD, think="keep it", ran=NO), answer(GOLD, ran=PASS)],
            id="both found a fault: the call stays, its verdict passes on",
        ),
        pytest.param(
            [execute("a"), remember(" a\n", ran=PASS), execute("b", fits=NO), answer("b")],
            EXEC,
            [execute("b"), answer("b")],
            id="white space does not make another query",
        ),
        pytest.param(
            [
                execute("a"),
                remember("a", ran=PASS),
                answer("a", think="fine all the same", fits=NO),
            ],
            EXEC,
            [execute("a"), answer("a", think="fine all the same", ran=PASS)],
            id="a query that was refused but not given up stays",
        ),
        pytest.param(
            [
                execute("look"),
                execute("bad", think="it is Bern", ran=PASS),
                remember("bad", ran=PASS),
            ]
            + [execute(GOLD, think="keep it", fits=NO), answer(GOLD, ran=PASS)],
            EXEC,
            [execute("look"), execute(GOLD, think="it is Bern\nkeep it", ran=PASS)]
            + [answer(GOLD, ran=PASS)],
            id="thoughts of removed calls come first, as they were thought first",
        ),
        pytest.param(
            [remember("bad"), execute("worse", think="keep it", fits=NO), execute(GOLD, ran=NO)]
            + [answer(GOLD, ran=PASS)],
            MEMORY,
            [remember("bad"), answer(GOLD, think="keep it", fits=NO)],
            id="a verdict passes over all removed calls",
        ),
        pytest.param(
            [execute("a"), remember("b", ran=PASS), answer("a", ran=NO, fits=NO)],
            EXEC,
            [execute("a"), answer("a", ran=NO)],
            id="a verdict of its own wins",
        ),
        pytest.param(
            [
                execute("a", think="names of singers"),
                remember("a", think="now ask memory_retrieve", ran=PASS),
            ]
            + [answer("a", think="it fits", fits=PASS)],
            EXEC,
            [execute("a", think="names of singers"), answer("a", ran=PASS)],
            id="a thought that names a missing tool goes",
        ),
        pytest.param(
            [
                execute("a", think="names of singers"),
                remember("a", ran=PASS),
                answer("a", fits=PASS),
            ],
            MEMORY,
            [remember("a", think="names of singers"), answer("a", fits=PASS)],
            id="a first thought about a query that stays is kept",
        ),
        pytest.param([execute("a")], MEMORY, [], id="no answer: nothing to keep"),
        pytest.param(
            [call("a", "typo"), answer("a")],
            EXEC,
            [call("a", "typo"), answer("a")],
            id="a tool that never existed is left to the environment",
        ),
    ],
)
def test_fit_passes_verdicts_and_thoughts_on_in_other_demonstrations(replies, offered, expected):
    assert fit(replies, offered, TURN) == expected


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(corpus, turn id -> replies) of a small embedded world."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(folder, 3, SIZE)
    corpus = load_corpus(folder / "train.json", folder / "tables.json", folder / "database")
    return corpus, read_demonstrations(folder / "demonstrations.jsonl")


def names_missing(text, tools):
    missing = NAMES.keys() - set(tools)
    return any(name in text for tool in missing for name in NAMES[tool])


def query_of(reply):
    action = reply.action
    return action.sql if isinstance(action, Answer) else action.arguments["code"]


def outline(replies):
    tools = [r.action.name if isinstance(r.action, ToolCall) else None for r in replies]
    judged = [(bool(r.think), r.exec_verdict, r.memory_verdict) for r in replies]
    return tuple(zip(judged, tools, strict=True))


def test_the_world_has_the_shapes_above_and_no_other(world):
    """A first question quotes its values, so no spelling is looked up for it."""
    found = {outline(replies) for replies in world[1].values()}
    absent = ("FIRST_LOOK", "FIRST_NOTHING")
    assert found == {outline(shape) for name, shape in SHAPES.items() if name not in absent}


@pytest.mark.parametrize("tools", OFFERS, ids=offer_name)
@pytest.mark.parametrize("style", get_args(PromptStyle))
def test_nothing_names_a_tool_that_is_not_in_use(world, tools, style):
    corpus, demonstrations = world
    config = EnvConfig(tools=tools)
    for turn in corpus.turns:
        original = demonstrations[turn.turn_id]
        replies = fit(original, tools, turn)
        assert len(replies) <= len(original) and replies[-1].action == Answer(turn.sql)
        env = SqlEnv(turn, corpus.databases[turn.db_id], config, style)
        messages, schemas = env.reset()
        texts = [messages[0]["content"], json.dumps(schemas)]
        for reply in replies:
            texts.append(format_reply(reply))
            observed = env.step(texts[-1])
            if isinstance(observed, str):
                texts.append(observed)
        assert observed is env.outcome is Outcome.ANSWERED
        assert not names_missing("\n".join(texts), tools), texts
        if "exec_sql" not in tools:
            assert all(record.status is None for record in env.records)
            assert "Result:" not in "\n".join(texts)


@pytest.mark.parametrize("tools", OFFERS, ids=offer_name)
def test_every_call_is_judged_and_no_query_is_given_up_without_a_reason(world, tools):
    corpus, demonstrations = world
    for turn in corpus.turns:
        replies = fit(demonstrations[turn.turn_id], tools, turn)
        assert replies[0].exec_verdict is replies[0].memory_verdict is None
        for before, after in pairwise(replies):
            query = query_of(before)
            is_exec = before.action.name == "exec_sql"
            verdict = after.exec_verdict if is_exec else after.memory_verdict
            assert verdict is not None
            assert (after.memory_verdict if is_exec else after.exec_verdict) is None
            if is_exec:
                result = run_query(corpus.databases[turn.db_id].path, query)
                is_nothing = not result.is_ok or result.is_empty or result.rows == ((0,),)
                assert (verdict is NO) == is_nothing
            is_look = "SELECT DISTINCT" in query
            if is_exec:  # an earlier turn's query runs again to show its result
                is_look = is_look or query in [sql for _, sql in turn.history]
            is_given_up = query != query_of(after) and not is_look
            is_asked_about = is_exec and query == query_of(after)  # the memory shows what is wrong
            assert is_given_up == (verdict is NO) or is_asked_about
