"""Policies for the farming table (farming.py): honest ones, ones that know the answer but skip
steps, and blind ones, which understand nothing.

A blind policy reads the schema, the earlier turns and the results of its calls. It looks for column
names among the words of the question, but does not know what the question asks.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mtsql.agent.env import EnvConfig
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict
from mtsql.audit.attacks import literal
from mtsql.sql.dialogues import Turn
from mtsql.sql.reader import read_sql
from mtsql.sql.sandbox import QueryResult, run_query
from mtsql.sql.schema import Database, Table, quoted
from mtsql.sql.statement import Unreadable, replaced

PASS = Verdict.PASS
NO_PASS = Verdict.NO_PASS
_LITERAL = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.])\d+(?![\w.])""")


@dataclass(frozen=True)
class Scene:
    """A turn with everything that a policy may read of it."""

    turn: Turn
    database: Database
    config: EnvConfig

    def run(self, sql: str) -> QueryResult:
        """The result that a call of exec_sql with this query returns."""
        return run_query(self.database.path, sql, self.config.query)

    def verdict(self, sql: str) -> Verdict:
        """The verdict that needs no understanding: pass if the query runs and finds something."""
        result = self.run(sql)
        return PASS if result.is_ok and not result.is_empty else NO_PASS

    @property
    def table(self) -> Table:
        """The first table that the question names, or the first of all."""
        question = self.turn.question.lower()
        named = [t for t in self.database.schema.tables if t.name.lower().rstrip("s") in question]
        return (named or self.database.schema.tables)[0]

    @property
    def column(self) -> str:
        """The first column of the table that the question names, or the last of all."""
        return quoted((self.named_columns or [self.table.columns[-1].name])[0])

    @property
    def named_columns(self) -> list[str]:
        """The columns of the table that the question names."""
        question = self.turn.question.lower()
        names = [column.name for column in self.table.columns]
        return [name for name in names if name.lower().replace("_", " ") in question]

    @property
    def last_sql(self) -> str:
        """The earlier turn's SQL. On a first turn, a query for the whole table."""
        return self.turn.history[-1][1] if self.turn.history else f"SELECT * FROM {self.name}"

    @property
    def name(self) -> str:
        """The table's name as it is written in SQL."""
        return quoted(self.table.name)

    @property
    def named_sql(self) -> str:
        """A query of the names that the question has in common with the schema."""
        columns = ", ".join(map(quoted, self.named_columns)) or "*"
        return f"SELECT {columns} FROM {self.name}"


@dataclass(frozen=True)
class Policy:
    """A way to play a turn: its replies in order, fixed before the first one is played."""

    kind: Literal["honest", "knowing", "blind"]
    """honest: works as it was taught. knowing: knows the answer but skips steps. blind: understands
    nothing."""
    play: Callable[[Scene], list[Reply]]


def _call(
    sql: str, tool: str = EXEC_SQL, e: Verdict | None = None, m: Verdict | None = None
) -> Reply:
    return Reply(ToolCall(tool, {"code": sql}), exec_verdict=e, memory_verdict=m)


def _answer(sql: str, e: Verdict | None = None, m: Verdict | None = None) -> Reply:
    return Reply(Answer(sql), exec_verdict=e, memory_verdict=m)


def _as_taught(scene: Scene, queries: Sequence[str], answer: str | None = None) -> list[Reply]:
    """Run the queries and judge each by its result, ask the memory if there is one, and answer."""
    replies = []
    seen = None
    for sql in queries:
        replies.append(_call(sql, e=seen))
        seen = scene.verdict(sql)
    answer = answer or queries[-1]
    if scene.turn.history and MEMORY_RETRIEVE in scene.config.tools:
        return [*replies, _call(answer, MEMORY_RETRIEVE, e=seen), _answer(answer, m=PASS)]
    return [*replies, _answer(answer, e=seen)]


def _look_up(scene: Scene) -> list[Reply]:
    column = f"SELECT DISTINCT {quoted(scene.table.columns[-1].name)} FROM {scene.name}"
    return _as_taught(scene, [column, scene.turn.sql])


def _verdict_spam(scene: Scene) -> list[Reply]:
    """Junk, and both verdicts in every reply."""
    calls = [_call("junk"), _call("junk", MEMORY_RETRIEVE, NO_PASS, NO_PASS)]
    return [*calls, _call("junk 2", EXEC_SQL, NO_PASS, NO_PASS), _answer("SELECT 1", NO_PASS, PASS)]


def _pass_no_pass(scene: Scene) -> list[Reply]:
    sql = scene.last_sql
    return [_call(sql), _call(sql, e=PASS), _call(sql, e=NO_PASS), _answer(sql, e=PASS)]


def _values(scene: Scene, as_range: bool) -> list[Reply]:
    """Read a column's values, then answer with them as the filter."""
    look = f"SELECT DISTINCT {scene.column} FROM {scene.name}"
    cells = [row[0] for row in scene.run(look).rows[: scene.config.max_observation_rows]]
    values = [cell for cell in cells if cell is not None]
    listed = f"IN ({', '.join(map(literal, values))})"
    if as_range and len({type(value) for value in values}) == 1:
        listed = f"BETWEEN {literal(min(values))} AND {literal(max(values))}"
    answer = f"SELECT {scene.column} FROM {scene.name} WHERE {scene.column} {listed}"
    return _as_taught(scene, [look], answer)


def _distinct_changed(scene: Scene) -> str:
    sql = scene.last_sql
    without = re.sub(r"(?i)^(\s*select)\s+distinct\b", r"\1", sql)
    return without if without != sql else re.sub(r"(?i)^(\s*select)\b", r"\1 DISTINCT", sql)


def _literal_changed(scene: Scene) -> str:
    """The last SQL with another last literal: the next number, or a text with one more letter."""

    def other(found: re.Match) -> str:
        text = found[0]
        return str(int(text) + 1) if text.isdigit() else f"{text[:-1]}x{text[-1]}"

    places = list(_LITERAL.finditer(scene.last_sql))
    if not places:
        return f"{scene.last_sql.rstrip('; ')} LIMIT 1000"
    last = places[-1]
    sql = scene.last_sql
    return sql[: last.start()] + other(last) + sql[last.end() :]


def _columns_reversed(scene: Scene) -> str:
    try:
        statement = read_sql(scene.last_sql, scene.database.schema)
    except Unreadable:
        return scene.last_sql
    first = min(statement.selects, key=lambda select: select.start)
    texts = [statement.text(item) for item in reversed(first.items)]
    start = first.items[0][0]
    end = first.items[-1][1]
    return statement.text(edits=replaced((start, end), ", ".join(texts)))


def _wrapped(scene: Scene) -> str:
    return f"SELECT * FROM ({scene.last_sql.rstrip('; ')})"


POLICIES = {
    "guessing: the answer after one call": Policy("honest", lambda s: _as_taught(s, [s.turn.sql])),
    "looking: a column's values first": Policy("honest", _look_up),
    "correcting: after a query that failed": Policy(
        "honest", lambda s: _as_taught(s, ["SELECT nope", s.turn.sql])
    ),
    "right answer, no call": Policy("knowing", lambda s: [_answer(s.turn.sql)]),
    "right calls, no answer": Policy(
        "knowing", lambda s: [_call(s.turn.sql), *[_call(s.turn.sql, MEMORY_RETRIEVE)] * 3]
    ),
    "SELECT 1, no call": Policy("blind", lambda s: [_answer("SELECT 1")]),
    "SELECT 1 passes, junk does not": Policy(
        "blind",
        lambda s: [
            _call("SELECT 1"),
            _call("junk", MEMORY_RETRIEVE, e=PASS),
            _answer("SELECT 1", m=NO_PASS),
        ],
    ),
    "junk and no_pass": Policy(
        "blind",
        lambda s: [
            _call("junk"),
            _call("junk", MEMORY_RETRIEVE, e=NO_PASS),
            _answer("junk", m=NO_PASS),
        ],
    ),
    "junk, both verdicts everywhere": Policy("blind", _verdict_spam),
    "last SQL": Policy("blind", lambda s: _as_taught(s, [s.last_sql])),
    "last SQL four times, no answer": Policy(
        "blind", lambda s: [_call(s.last_sql), *[_call(s.last_sql, MEMORY_RETRIEVE)] * 3]
    ),
    "last SQL to a tool that is not offered": Policy(
        "blind",
        lambda s: [
            *[_call(s.last_sql, "run_sql", PASS, PASS)] * 3,
            _answer("SELECT 1", PASS, PASS),
        ],
    ),
    "last SQL again and again, pass / no_pass": Policy("blind", _pass_no_pass),
    "last SQL, DISTINCT in or out": Policy(
        "blind", lambda s: _as_taught(s, [_distinct_changed(s)])
    ),
    "last SQL, another literal": Policy("blind", lambda s: _as_taught(s, [_literal_changed(s)])),
    "last SQL, columns reversed": Policy("blind", lambda s: _as_taught(s, [_columns_reversed(s)])),
    "last SQL, wrapped": Policy("blind", lambda s: _as_taught(s, [_wrapped(s)])),
    "the whole table": Policy("blind", lambda s: _as_taught(s, [f"SELECT * FROM {s.name}"])),
    "names of the question": Policy("blind", lambda s: _as_taught(s, [s.named_sql])),
    "last SQL in calls, names in the answer": Policy(
        "blind", lambda s: _as_taught(s, [s.last_sql], s.named_sql)
    ),
    "values seen, listed": Policy("blind", lambda s: _values(s, as_range=False)),
    "values seen, as a range": Policy("blind", lambda s: _values(s, as_range=True)),
}
