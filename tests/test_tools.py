"""The tools as the model sees them, and what the paper's two tools run and show."""

from typing import get_args

import pytest

from helpers.episodes import BOTH, EXEC, GOLD, HISTORY, MEMORY, call, make_env, singers
from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.protocol import Parameter
from mtsql.agent.reply import format_reply
from mtsql.agent.tools import TOOLS, Tool, check_tools, tool_schemas, tools_named
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryStatus


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return singers(tmp_path_factory.mktemp("db") / "shows.sqlite")


def test_the_papers_tools_have_the_schemas_written_by_hand():
    def schema(name: str, description: str, code: str) -> dict:
        return {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {"code": {"type": "string", "description": code}},
                    "required": ["code"],
                },
            },
        }

    assert tool_schemas(tools_named(BOTH)) == [
        schema(
            "exec_sql",
            "Run a SQLite query on the database and return its result.",
            "The SQL query to run.",
        ),
        schema(
            "memory_retrieve",
            "Return the earlier questions of this dialogue with their SQL, "
            "to check that a query is coherent.",
            "The SQL query whose coherence is to be checked.",
        ),
    ]


def test_tools_are_listed_in_the_order_of_their_names():
    execute, remember = TOOLS[:2]
    assert tools_named(BOTH) == (execute, remember) and tools_named(()) == ()
    assert tools_named(MEMORY + EXEC) == (remember, execute)


def fail(episode, arguments):
    """A tool with a bug."""
    return int("two")


def test_a_faulty_entry_is_named():
    again = Tool("exec_sql", "Run it.", (), fail)
    with pytest.raises(ValueError, match="TOOLS has 2 tools named exec_sql"):
        check_tools([*TOOLS, again])
    judged = Tool("look", "Look.", (), fail, verdict_tag="look_verify")
    with pytest.raises(ValueError, match="look: verdict_tag is 'look_verify', neither"):
        check_tools([judged])
    with pytest.raises(ValueError, match="parameter limit: the type 'int' is none of sql, string"):
        Parameter("limit", "int", "How many.")


def test_a_bug_of_a_tool_is_no_mistake_of_the_user(database, monkeypatch):
    monkeypatch.setattr("mtsql.agent.tools.TOOLS", (Tool("look", "Look.", (), fail),))
    env = make_env(database, tools=("look",))
    with pytest.raises(RuntimeError, match="the tool look raised a ValueError: invalid literal"):
        env.step('<tool_call>{"name": "look"}</tool_call>')


def test_an_argument_that_is_not_required_may_be_null(database, monkeypatch):
    limit = Parameter("limit", "integer", "How many.", is_required=False)
    monkeypatch.setattr("mtsql.agent.tools.TOOLS", (Tool("look", "Look.", (limit,), fail),))
    [message], _ = make_env(database, style="full", tools=("look",)).reset()
    assert '"arguments": {"limit": INTEGER or null}}' in message["content"]


def test_only_the_full_style_with_several_replies_gives_schemas_to_the_chat_template(database):
    for config, is_given in (
        ({"style": "full"}, True),
        ({"style": "full", "max_replies": 1}, False),
        ({"style": "full", "tools": ()}, False),
        ({"style": "brief"}, False),
    ):
        _, schemas = make_env(database, **config).reset()
        assert schemas == (tool_schemas(tools_named(BOTH)) if is_given else [])


def test_exec_sql_shows_the_result_in_the_wording_of_the_style(database):
    sql = "SELECT name, age FROM singer"
    brief = make_env(database).step(format_reply(call(sql)))
    assert brief == "Ann | 41\nBob | 25"
    full = make_env(database, style="full").step(format_reply(call(sql)))
    assert "Result:\n('Ann', 41)\n('Bob', 25)\n\nJudge the result" in full
    capped = make_env(database, max_observation_rows=1).step(format_reply(call(sql)))
    assert capped == "Ann | 41\n... 1 more rows"


@pytest.mark.parametrize("style", get_args(PromptStyle))
@pytest.mark.parametrize("config", [{"tools": MEMORY}, {"memory_results": False}])
def test_without_results_the_memory_runs_no_query(database, style, config, monkeypatch):
    def run_query(*_: object) -> None:
        raise AssertionError("a query ran")

    monkeypatch.setattr("mtsql.agent.tools.run_query", run_query)
    monkeypatch.setattr("mtsql.agent.memory.run_query", run_query)
    env = make_env(database, history=HISTORY, style=style, **config)
    observed = env.step(format_reply(call(GOLD, "memory_retrieve")))
    [record] = env.records
    assert record.sql == GOLD and record.status is None and not record.is_ok
    assert HISTORY[-1][1] in observed and "Result" not in observed


def test_memory_results_shows_results_without_execution(database):
    def observe(**config: object) -> str:
        env = make_env(database, history=HISTORY, style="full", **config)
        observed = env.step(format_reply(call(GOLD, "memory_retrieve")))
        assert env.records[0].status is QueryStatus.OK
        return observed

    alone = observe(tools=MEMORY, memory_results=True)
    assert "Proposed SQL: " + GOLD + "\nResult:\n('Ann')\n\n" in alone
    assert "Result: ('Ann'); ('Bob')\n" in alone
    assert "7. Do the query and its result answer" in alone
    assert alone == observe().replace("call exec_sql", "call memory_retrieve")


def test_the_brief_memory_shows_earlier_results_and_not_that_of_the_proposed_query(database):
    history = (*HISTORY, ("who is 25 ?", "SELECT name , age FROM singer WHERE age = 25"))
    env = make_env(database, history=history)
    observed = env.step(format_reply(call(GOLD, "memory_retrieve")))
    assert observed == "who is there ? : Ann ...\nwho is 25 ? : Bob | 25\nwho is old ?"
    assert env.records[0].status is QueryStatus.OK
    short = make_env(database, history=history, preview_chars=4)
    observed = short.step(format_reply(call(GOLD, "memory_retrieve")))
    assert observed.splitlines()[1] == "who is 25 ? : Bob ... cut here"


def test_the_memory_has_results_by_default_if_exec_sql_is_in_use():
    assert EnvConfig().has_memory_results and not EnvConfig(tools=MEMORY).has_memory_results
    assert not EnvConfig(memory_results=False).has_memory_results
    assert EnvConfig(tools=MEMORY, memory_results=True).has_memory_results


def test_a_meter_is_told_what_the_queries_cost(database):
    class Counting(WorkMeter):
        total = 0

        def add(self, num_ticks: int = 1) -> None:
            self.total += num_ticks

    long = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000) "
    meter = Counting()
    make_env(database).step(format_reply(call(long + "SELECT count(*) FROM n")), meter)
    assert meter.total > 0
