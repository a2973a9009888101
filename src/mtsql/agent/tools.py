"""The tools that the model may call. `env.tools` names those in use.

To add a tool, write a function that runs it and add an entry to `TOOLS`. Nothing else changes: the
schemas, the check of arguments and the list of tools in the prompt are made from the entry.

    def _list_tables(episode: Episode, arguments: dict[str, Any]) -> ToolResult:
        tables = episode.database.schema.tables[: arguments["limit"]]
        return ToolResult(", ".join(table.name for table in tables))

    Tool(
        name="list_tables",
        description="Return the names of the first tables.",
        parameters=(Parameter("limit", "integer", "How many names to return."),),
        run=_list_tables,
    )
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtsql.agent import prompts
from mtsql.agent.memory import recall
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.protocol import (
    EXEC_SQL,
    EXEC_VERIFY,
    MEMORY_RETRIEVE,
    MEMORY_VERIFY,
    Parameter,
    code,
)
from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryResult, QueryStatus, run_query
from mtsql.sql.schema import Database

if TYPE_CHECKING:  # env.py imports this module
    from mtsql.agent.env import EnvConfig


@dataclass(frozen=True)
class Episode:
    """What a tool may read of the episode in which it is called."""

    turn: Turn
    database: Database
    config: "EnvConfig"
    style: PromptStyle
    meter: WorkMeter | None = None
    """Counts what the queries of the call cost: pass it to `run_query`."""


@dataclass(frozen=True)
class ToolResult:
    """What a call returns."""

    observation: str
    """The text that the model reads next. It is not shortened: a tool keeps to
    `config.max_observation_chars` itself. One that does not fit into the trajectory ends the
    episode."""
    sql: str | None = None
    """The query that the call proposes, if it proposes one. Rewards compare it with the gold
    SQL."""
    status: QueryStatus | None = None
    """How that query ended; None if it did not run."""
    is_empty: bool = False
    """Whether its result has no row or only NULLs."""


@dataclass(frozen=True)
class Tool:
    """A tool as the model sees it, and the function that runs it."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    run: Callable[[Episode, dict[str, Any]], ToolResult]
    """Runs a call. The arguments have the declared types, and those that are not required may be
    missing."""
    step: str = ""
    """A sentence in the numbered steps of the full prompt: when to call the tool. `{when}` becomes
    "once the query runs well" if exec_sql is in use, and "with a candidate query" if not."""
    verdict_tag: str = ""
    """The tag in which the model judges what the tool returned: `exec_verify` or `memory_verify`,
    the two that a reply is read for. Empty: it does not judge."""


def _exec_sql(episode: Episode, arguments: dict[str, Any]) -> ToolResult:
    sql = arguments["code"]
    result, shown = _run(episode, sql)
    text = prompts.exec_observation(
        episode.turn, sql, shown, episode.style, offered=episode.config.tools
    )
    return ToolResult(text, sql, result.status, result.is_empty)


def _memory_retrieve(episode: Episode, arguments: dict[str, Any]) -> ToolResult:
    sql = arguments["code"]
    config = episode.config
    result, shown = _run(episode, sql) if config.has_memory_results else (None, None)
    with_results = result is not None
    memory = recall(episode.turn, episode.database, config.query, with_results, episode.meter)
    text = prompts.memory_observation(
        episode.turn,
        sql,
        shown,
        memory,
        episode.style,
        config.preview_chars,
        offered=config.tools,
    )
    if result is None:
        return ToolResult(text, sql)
    return ToolResult(text, sql, result.status, result.is_empty)


def _run(episode: Episode, sql: str) -> tuple[QueryResult, str]:
    """A query's result, and the same as text for the model."""
    config = episode.config
    result = run_query(episode.database.path, sql, config.query, episode.meter)
    shown = prompts.show_result(
        result, config.max_observation_rows, config.max_observation_chars, episode.style
    )
    return result, shown


TOOLS: tuple[Tool, ...] = (
    Tool(
        name=EXEC_SQL,
        description="Run a SQLite query on the database and return its result.",
        parameters=code("The SQL query to run."),
        run=_exec_sql,
        step=prompts.STEP_EXEC,
        verdict_tag=EXEC_VERIFY,
    ),
    Tool(
        name=MEMORY_RETRIEVE,
        description=(
            "Return the earlier questions of this dialogue with their SQL, "
            "to check that a query is coherent."
        ),
        parameters=code("The SQL query whose coherence is to be checked."),
        run=_memory_retrieve,
        step=prompts.STEP_MEMORY,
        verdict_tag=MEMORY_VERIFY,
    ),
)


def check_tools(tools: Sequence[Tool]) -> None:
    """ValueError for two tools of one name, and for a verdict tag that no reply is read for."""
    for name, count in Counter(tool.name for tool in tools).items():
        if count > 1:
            raise ValueError(f"agent/tools.py: TOOLS has {count} tools named {name}")
    for tool in tools:
        if tool.verdict_tag not in ("", EXEC_VERIFY, MEMORY_VERIFY):
            raise ValueError(
                f"agent/tools.py: {tool.name}: verdict_tag is {tool.verdict_tag!r}, "
                f"neither {EXEC_VERIFY} nor {MEMORY_VERIFY} nor empty"
            )


check_tools(TOOLS)


def tools_named(names: Sequence[str]) -> tuple[Tool, ...]:
    """The tools with these names, in the order of the names. ValueError for a name that is unknown
    or comes twice."""
    known = {tool.name: tool for tool in TOOLS}
    for name, count in Counter(names).items():
        if name not in known:
            raise ValueError(f"env.tools: there is no tool {name!r}, only {', '.join(known)}")
        if count > 1:
            raise ValueError(f"env.tools: {name} stands there {count} times; once is enough")
    return tuple(known[name] for name in names)


@contextmanager
def bugs_of(what: str) -> Iterator[None]:
    """A ValueError inside is a bug of `what`, such as a new tool, and becomes a RuntimeError. The
    scripts take a ValueError for a mistake in flags or files and show one line of it, but a bug
    needs its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"{what} raised a ValueError: {error}") from error


def tool_schemas(tools: Collection[Tool]) -> list[dict[str, Any]]:
    """OpenAI-style function schemas of the tools."""
    return [{"type": "function", "function": _function_schema(tool)} for tool in tools]


def _function_schema(tool: Tool) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {parameter.name: parameter.schema() for parameter in tool.parameters},
        "required": [parameter.name for parameter in tool.parameters if parameter.is_required],
    }
    return {"name": tool.name, "description": tool.description, "parameters": parameters}
