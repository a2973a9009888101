"""A turn from which a demonstration is made, with everything that edits of its query need."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import show_result
from mtsql.judge.agreement import written_match
from mtsql.judge.execution_match import execution_match
from mtsql.sql.dialogues import Turn
from mtsql.sql.reader import read_sql
from mtsql.sql.sandbox import QueryResult, QueryStatus, run_query
from mtsql.sql.schema import Database, Schema, Table, fold
from mtsql.sql.statement import Source, Span, Statement, Unreadable


@dataclass(frozen=True)
class FirstTry:
    """A query that is tried before the gold one, and what is thought afterwards.

    sql: the wrong query; None if the demonstration begins with `look`.
    look: a query that looks up a value, run before the gold query; empty without one.
    noticed: what shows that `sql` is wrong: an error that contains `evidence`, a result without
        rows, or the memory.
    before: the thought of the first reply. Empty: what the question asks.
    after: the thought that the observation of `sql` leads to.
    found: the thought that the observation of `look` leads to.
    """

    sql: str | None
    noticed: str = "nothing"
    after: str = ""
    evidence: str = ""
    look: str = ""
    before: str = ""
    found: str = ""


@dataclass(frozen=True)
class Scene:
    """A turn with its database, the limits of the environment, and the turn's own random numbers.

    schema: the one of the database file, by which SQLite resolves names.
    """

    turn: Turn
    database: Database
    schema: Schema
    config: EnvConfig
    rng: random.Random

    def run(self, sql: str) -> QueryResult:
        """The result that a call of exec_sql with this query returns."""
        return run_query(self.database.path, sql, self.config.query)

    @cached_property
    def gold(self) -> QueryResult:
        """The result of the gold query."""
        return self.run(self.turn.sql)

    @cached_property
    def statement(self) -> Statement | None:
        """The gold query, read; None if its meaning is not known for sure."""
        return self.read(self.turn.sql)

    def read(self, sql: str) -> Statement | None:
        """A query with the roles of its words; None if its meaning is not known for sure."""
        try:
            return read_sql(sql, self.schema)
        except Unreadable:
            return None

    def is_right(self, sql: str) -> bool:
        """Whether a query agrees with the gold one by the reward's judge, or by the official one,
        which overlooks DISTINCT."""
        path, limits = self.database.path, self.config.query
        if written_match(sql, self.turn.sql, path, limits):
            return True
        return execution_match(sql, self.turn.sql, path, limits=limits)

    def is_noticed(self, first: FirstTry) -> bool:
        """Whether what the environment shows after a wrong query shows that it is wrong."""
        if first.sql is None:
            return True
        result = self.run(first.sql)
        match first.noticed:
            case "error":
                return result.status is QueryStatus.ERROR and first.evidence in self.shown(result)
            case "nothing":
                return result.is_empty
            case _:  # the memory shows it, and the result shows nothing strange
                return result.is_ok and any(cell for row in result.rows for cell in row)

    def nothing(self, sql: str) -> str:
        """What a query without a result shows, in words."""
        return "only NULL" if self.run(sql).rows else "no rows"

    def shown(self, result: QueryResult) -> str:
        """A result as the model reads it in the brief style, which shows no more than the full
        one."""
        limits = self.config.max_observation_rows, self.config.max_observation_chars
        return show_result(result, *limits, "brief")

    def shows_value(self, result: QueryResult, value: str) -> bool:
        """Whether the result of one column shows this text, in both styles."""
        limits = self.config.max_observation_rows, self.config.max_observation_chars
        lines = show_result(result, *limits, "full").splitlines()
        return f"({value!r})" in lines and value in self.shown(result).splitlines()

    def table(self, name: str | None) -> Table | None:
        """The table with this folded name."""
        found = [table for table in self.schema.tables if fold(table.name) == name]
        return found[0] if found else None

    def choices(self, items: list) -> Iterator:
        """The items in random order."""
        yield from self.rng.sample(items, len(items))


def plain_sources(statement: Statement, sources: list[Source]) -> bool:
    """Whether all sources are tables, which inner joins connect."""
    return all(source.table and source.join in ("", "join", "inner join") for source in sources)


def source_text(statement: Statement, source: Source) -> str:
    """The name of a source's table, as the query writes it."""
    return statement.tokens[source.span[0]].text


def cased(statement: Statement, word: str) -> str:
    """A keyword, in lower case if the query writes its first one so."""
    return word.lower() if statement.tokens[0].text.islower() else word


def column_start(statement: Statement, at: int) -> int:
    """The place of the first token of the column whose name stands at `at`: `t` in `t.a`."""
    return at - 2 if statement.word(at - 1) == "." else at


def bare(statement: Statement, span: Span) -> str:
    """The text of some tokens without the qualifiers of their columns, in single spaces."""
    edits: dict[int, str] = {}
    for at in range(*span):
        if statement.roles[at] == "qualifier":
            name = statement.tokens[at + 2].text  # in place of `t.name`, with the blanks before it
            edits |= {at: name, at + 1: "", at + 2: ""}
    return " ".join(statement.text(span, edits).split())
