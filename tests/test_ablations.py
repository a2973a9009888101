"""A tool that is not offered does not exist: not in prompts, tool schemas and observations, not in
demonstrations, and the memory shows no results that only execution could give."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Reply, ToolCall, Verdict, format_reply
from mtsql.rl.selftaught import read_demonstrations
from mtsql.sql.dialogues import load_corpus
from mtsql.sql.sandbox import QueryStatus, run_query
from mtsql.toyworld.world import WorldConfig, write_toy_world

PASS, NO = Verdict.PASS, Verdict.NO_PASS
EXEC, MEMORY = ("exec_sql",), ("memory_retrieve",)
BOTH = EXEC + MEMORY
NAMES = {"exec_sql": ("exec_sql", "exec_verify"), "memory_retrieve": ("memory_", "coheren")}
"""What only texts about a tool contain."""
SIZE = WorldConfig(5, 1, train_dialogues=60, seen_dialogues=1, dev_dialogues=1)
OFFERS = [
    EnvConfig(use_exec=use_exec, use_memory=use_memory)
    for use_exec in (True, False)
    for use_memory in (True, False)
]


def offer_name(limits):
    return "+".join(limits.offered) or "nothing"


def step(action, sql, think="", ran=None, fits=None):
    """A reply: the thought, the verdicts on what ran and what fits, then a call or the answer."""
    if action == "answer":
        return Reply(think, ran, fits, answer=sql)
    return Reply(think, ran, fits, tool_call=ToolCall(action, sql))


execute = partial(step, "exec_sql")
remember = partial(step, "memory_retrieve")
answer = partial(step, "answer")

# The demonstrations that toydialogues.py writes. A later turn is one with earlier turns.
HASTY = [answer("gold")]
FIRST = [execute("gold"), answer("gold", ran=PASS)]
LATER = [execute("gold"), remember("gold", ran=PASS), answer("gold", fits=PASS)]
FIRST_LOOK = [
    execute("look", "look at city"),
    execute("gold", "city is Bern", ran=PASS),
    answer("gold", ran=PASS),
]
LATER_LOOK = [
    execute("look", "look at city"),
    remember("gold", "city is Bern", ran=PASS),
    answer("gold", fits=PASS),
]
FIRST_NOTHING = [
    execute("naive"),
    execute("look", "nothing , look", ran=NO),
    execute("gold", "city is Bern", ran=PASS),
    answer("gold", ran=PASS),
]
LATER_NOTHING = [
    execute("naive"),
    execute("look", "nothing , look", ran=NO),
    remember("gold", "city is Bern", ran=PASS),
    answer("gold", fits=PASS),
]
FIRST_WRONG = [
    execute("wrong"),
    execute("gold", "age is not there", ran=NO),
    answer("gold", ran=PASS),
]
LATER_WRONG = [
    execute("wrong"),
    execute("gold", "age is not there", ran=NO),
    remember("gold", ran=PASS),
    answer("gold", fits=PASS),
]
FORGOT = [
    execute("forgot"),
    remember("forgot", ran=PASS),
    execute("gold", "keep city is Bern", fits=NO),
    answer("gold", ran=PASS),
]
SHAPES = {
    name: shape
    for name, shape in globals().items()
    if name.startswith(("HASTY", "FIRST", "LATER", "FORGOT"))
}


@pytest.mark.parametrize(
    ("replies", "offered", "expected"),
    [
        (HASTY, EXEC, [answer("gold")]),
        (HASTY, MEMORY, [answer("gold")]),
        (FIRST, EXEC, FIRST),
        (FIRST, MEMORY, [answer("gold")]),
        (LATER, EXEC, [execute("gold"), answer("gold", ran=PASS)]),
        (LATER, MEMORY, [remember("gold"), answer("gold", fits=PASS)]),
        (FIRST_LOOK, EXEC, FIRST_LOOK),
        (FIRST_LOOK, MEMORY, [answer("gold")]),
        (
            LATER_LOOK,
            EXEC,
            [execute("look", "look at city"), answer("gold", "city is Bern", ran=PASS)],
        ),
        (LATER_LOOK, MEMORY, [remember("gold"), answer("gold", fits=PASS)]),
        (FIRST_NOTHING, EXEC, FIRST_NOTHING),
        (FIRST_NOTHING, MEMORY, [answer("gold")]),
        (
            LATER_NOTHING,
            EXEC,
            [
                execute("naive"),
                execute("look", "nothing , look", ran=NO),
                answer("gold", "city is Bern", ran=PASS),
            ],
        ),
        (LATER_NOTHING, MEMORY, [remember("gold"), answer("gold", fits=PASS)]),
        (FIRST_WRONG, EXEC, FIRST_WRONG),
        (FIRST_WRONG, MEMORY, [answer("gold")]),
        (
            LATER_WRONG,
            EXEC,
            [
                execute("wrong"),
                execute("gold", "age is not there", ran=NO),
                answer("gold", ran=PASS),
            ],
        ),
        (LATER_WRONG, MEMORY, [remember("gold"), answer("gold", fits=PASS)]),
        (FORGOT, EXEC, [execute("gold", "keep city is Bern"), answer("gold", ran=PASS)]),
        (FORGOT, MEMORY, [remember("forgot"), answer("gold", "keep city is Bern", fits=NO)]),
    ],
)
def test_the_shapes_of_the_toy_world(replies, offered, expected):
    assert fit(replies, offered) == expected


def test_without_any_tool_only_the_answer_and_what_the_conversation_asks_for_are_left():
    for name, shape in SHAPES.items():
        think = "keep city is Bern" if name == "FORGOT" else ""
        assert fit(shape, ()) == [answer("gold", think)]


def test_with_all_tools_nothing_changes_and_tools_may_be_taken_away_one_by_one():
    for shape in SHAPES.values():
        assert fit(shape, BOTH) is shape
        assert fit(fit(shape, EXEC), ()) == fit(fit(shape, MEMORY), ()) == fit(shape, ())


@pytest.mark.parametrize(
    ("replies", "offered", "expected"),
    [
        pytest.param(
            [remember("wrong"), execute("wrong", fits=PASS), remember("gold", "no age", ran=NO)]
            + [answer("gold", fits=PASS)],
            MEMORY,
            [remember("gold"), answer("gold", fits=PASS)],
            id="only execution found the fault",
        ),
        pytest.param(
            [execute("bad"), remember("bad", ran=NO), execute("gold", "keep it", fits=NO)]
            + [answer("gold", ran=PASS)],
            EXEC,
            [execute("bad"), execute("gold", "keep it", ran=NO), answer("gold", ran=PASS)],
            id="both found a fault: the call stays, its verdict passes on",
        ),
        pytest.param(
            [execute("a"), remember(" a\n", ran=PASS), execute("b", fits=NO), answer("b")],
            EXEC,
            [execute("b"), answer("b")],
            id="white space does not make another query",
        ),
        pytest.param(
            [execute("a"), remember("a", ran=PASS), answer("a", "fine all the same", fits=NO)],
            EXEC,
            [execute("a"), answer("a", "fine all the same", ran=PASS)],
            id="a query that was refused but not given up stays",
        ),
        pytest.param(
            [execute("look"), execute("bad", "it is Bern", ran=PASS), remember("bad", ran=PASS)]
            + [execute("gold", "keep it", fits=NO), answer("gold", ran=PASS)],
            EXEC,
            [execute("look"), execute("gold", "it is Bern\nkeep it", ran=PASS)]
            + [answer("gold", ran=PASS)],
            id="thoughts of removed calls come first, as they were thought first",
        ),
        pytest.param(
            [remember("bad"), execute("worse", "keep it", fits=NO), execute("gold", ran=NO)]
            + [answer("gold", ran=PASS)],
            MEMORY,
            [remember("bad"), answer("gold", "keep it", fits=NO)],
            id="a verdict passes over all removed calls",
        ),
        pytest.param(
            [execute("a"), remember("b", ran=PASS), answer("a", ran=NO, fits=NO)],
            EXEC,
            [execute("a"), answer("a", ran=NO)],
            id="a verdict of its own wins",
        ),
        pytest.param(
            [execute("a", "names of singers"), remember("a", "now ask memory_retrieve", ran=PASS)]
            + [answer("a", "it fits", fits=PASS)],
            EXEC,
            [execute("a", "names of singers"), answer("a", ran=PASS)],
            id="a thought that names a missing tool goes",
        ),
        pytest.param(
            [execute("a", "names of singers"), remember("a", ran=PASS), answer("a", fits=PASS)],
            MEMORY,
            [remember("a", "names of singers"), answer("a", fits=PASS)],
            id="a first thought about a query that stays is kept",
        ),
        pytest.param([execute("a")], MEMORY, [], id="no answer: nothing to keep"),
        pytest.param(
            [step("typo", "a"), answer("a")],
            EXEC,
            [step("typo", "a"), answer("a")],
            id="a tool that never existed is left to the environment",
        ),
    ],
)
def test_a_demonstration_of_ones_own(replies, offered, expected):
    assert fit(replies, offered) == expected


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(corpus, turn id -> replies) of a small toy world."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(folder, 3, SIZE)
    corpus = load_corpus(folder / "train.json", folder / "tables.json", folder / "database")
    return corpus, read_demonstrations(folder / "demonstrations.jsonl")


def make_env(corpus, turn, limits, style):
    return SqlEnv(turn, corpus.databases[turn.db_id], limits, style)


def names_missing(text, limits):
    missing = NAMES.keys() - set(limits.offered)
    return any(name in text for tool in missing for name in NAMES[tool])


def outline(replies):
    return tuple(
        (bool(r.think), r.exec_verdict, r.memory_verdict, r.tool_call and r.tool_call.name)
        for r in replies
    )


def test_the_world_has_the_shapes_above_and_no_other(world):
    found = {outline(replies) for replies in world[1].values()}
    assert found == {outline(shape) for shape in SHAPES.values()}


@pytest.mark.parametrize("limits", OFFERS, ids=offer_name)
@pytest.mark.parametrize("style", PromptStyle)
def test_nothing_names_a_tool_that_is_not_offered(world, limits, style):
    corpus, demonstrations = world
    for turn in corpus.turns:
        original = demonstrations[turn.turn_id]
        replies = fit(original, limits.offered)
        assert len(replies) <= len(original) and replies[-1].answer == turn.sql
        env = make_env(corpus, turn, limits, style)
        messages, tools = env.reset()
        texts = [messages[0]["content"], json.dumps(tools)]
        for reply in replies:
            texts.append(format_reply(reply))
            observed = env.step(texts[-1])
            texts += [observed] if isinstance(observed, str) else []
        assert observed is env.outcome is Outcome.ANSWERED
        assert not names_missing("\n".join(texts), limits), texts
        if not limits.use_exec:
            assert all(record.status is None for record in env.records)
            assert "Result:" not in "\n".join(texts)


@pytest.mark.parametrize("limits", OFFERS, ids=offer_name)
def test_every_call_is_judged_and_no_query_is_given_up_without_a_reason(world, limits):
    corpus, demonstrations = world
    for turn in corpus.turns:
        replies = fit(demonstrations[turn.turn_id], limits.offered)
        assert replies[0].exec_verdict is replies[0].memory_verdict is None
        for before, after in pairwise(replies):
            call = before.tool_call
            is_exec = call.name == "exec_sql"
            verdict = after.exec_verdict if is_exec else after.memory_verdict
            assert verdict is not None
            assert (after.memory_verdict if is_exec else after.exec_verdict) is None
            if is_exec:
                result = run_query(corpus.databases[turn.db_id].path, call.code)
                is_nothing = not result.is_ok or result.is_empty or result.rows == ((0,),)
                assert (verdict is NO) == is_nothing
            following = after.answer or after.tool_call.code
            is_given_up = call.code != following and "SELECT DISTINCT" not in call.code
            assert is_given_up == (verdict is NO)


def test_offered_names_the_tools_in_use():
    assert [limits.offered for limits in OFFERS] == [BOTH, EXEC, MEMORY, ()]


@pytest.mark.parametrize("style", PromptStyle)
def test_without_execution_the_memory_runs_nothing(world, style, monkeypatch):
    def run_query(*_):
        raise AssertionError("a query ran")

    monkeypatch.setattr("mtsql.agent.env.run_query", run_query)
    monkeypatch.setattr("mtsql.agent.memory.run_query", run_query)
    corpus, _ = world
    turn = next(turn for turn in corpus.turns if len(turn.history) == 2)
    for limits in (EnvConfig(use_exec=False), EnvConfig(memory_results=False)):
        env = make_env(corpus, turn, limits, style)
        observed = env.step(format_reply(remember(turn.sql)))
        assert env.records[0].status is None and not env.records[0].is_ok
        assert turn.history[-1][1] in observed and "Result" not in observed


def test_memory_results_shows_results_without_execution(world):
    corpus, _ = world
    turn = next(turn for turn in corpus.turns if len(turn.history) == 2)
    limits = EnvConfig(use_exec=False, memory_results=True)
    env = make_env(corpus, turn, limits, PromptStyle.FULL)
    observed = env.step(format_reply(remember(turn.sql)))
    assert env.records[0].status is QueryStatus.OK
    assert observed.count("\nResult:") == 3 and "Result: not shown" not in observed
    assert "7. Do the query and its result answer" in observed
    assert not names_missing(observed, limits)
    both = make_env(corpus, turn, EnvConfig(), PromptStyle.FULL)
    with_exec = both.step(format_reply(remember(turn.sql)))
    assert observed == with_exec.replace("call exec_sql", "call memory_retrieve")


def test_memory_results_needs_the_memory():
    assert not replace(EnvConfig(), memory_results=False).has_memory_results
    with pytest.raises(ValueError, match="env.memory_results has no effect without env.use_memory"):
        EnvConfig(use_memory=False, memory_results=True)


def test_a_call_of_a_tool_that_is_not_offered_is_answered(world):
    corpus, _ = world
    answers = []
    for limits in OFFERS[1:]:
        env = make_env(corpus, corpus.turns[0], limits, PromptStyle.BRIEF)
        name = "exec_sql" if "exec_sql" not in limits.offered else "memory_retrieve"
        answers.append(env.step(format_reply(step(name, "SELECT 1"))))
        assert env.records[0].status is None and env.outcome is None
    assert answers == [
        "There is no such tool. Tools: exec_sql.",
        "There is no such tool. Tools: memory_retrieve.",
        "There are no tools.",
    ]
