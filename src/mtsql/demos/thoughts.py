"""The thoughts of a demonstration that do not depend on a mistake: short sentences that say only
what the question, the schema or the observation shows."""

from collections.abc import Sequence

from mtsql.demos.filters import held_conditions
from mtsql.demos.scene import Scene, bare, source_text
from mtsql.sql.query import QueryResult
from mtsql.sql.statement import Statement

MAX_ITEMS = 3
"""Results of a query that are named."""
MAX_CHARS = 80
"""Longer parts of a query are not repeated in a thought."""


def asked(scene: Scene, sql: str, names_conditions: bool = True) -> str:
    """What the question asks, as the results and tables of the first query, and the conditions that
    hold as before, unless this query loses one of them."""
    statement = scene.read(sql)
    if statement is None:
        return try_first(scene)
    what, tables = _results(statement), _tables(statement)
    texts = [
        f"The question asks for {what} from {tables}.",
        f"This needs {what} from {tables}.",
        f"Wanted: {what}, to be read from {tables}.",
    ]
    text = scene.rng.choice(texts)
    kept = held_conditions(scene)
    if kept and names_conditions and len(kept[0]) <= MAX_CHARS:
        held = [
            f"{kept[0]} holds as before.",
            f"It goes on from the last question: keep {kept[0]}.",
        ]
        text += f" {scene.rng.choice(held)}"
    return text


def try_first(scene: Scene) -> str:
    """A first thought that names no part of the query."""
    texts = ["Try a query first.", "Write a query and see whether it runs.", "Start with a query."]
    return scene.rng.choice(texts)


def ran(result: QueryResult, scene: Scene) -> str:
    """What the result of the gold query shows."""
    rows = "one row" if len(result.rows) == 1 else f"{len(result.rows)} rows"
    statement = scene.statement
    texts = [f"It runs and returns {rows}.", f"No error, and {rows}.", f"It returns {rows}."]
    if statement is not None:
        texts.append(f"It runs: {rows} with {_results(statement)}.")
    return scene.rng.choice(texts)


def coherent(scene: Scene) -> str:
    """How the gold query goes with the last turn's."""
    statement = scene.statement
    last = scene.read(scene.turn.history[-1][1])
    if statement is None or last is None:
        return scene.rng.choice(["It fits the question.", "The query answers this question."])
    kept = held_conditions(scene)
    texts = ["It fits the question and what was asked before."]
    if kept and len(kept[0]) <= MAX_CHARS:
        texts = [f"It keeps {kept[0]}, as it should.", f"{kept[0]} is kept from the last query."]
    elif _table_names(statement) == _table_names(last):
        tables = _tables(statement)
        texts += [f"It stays with {tables}, as the last query.", f"Still about {tables}: it fits."]
    elif not _table_names(statement) & _table_names(last):
        texts.append(f"The question turns to {_tables(statement)}, which the last query has not.")
    return scene.rng.choice(texts)


def _results(statement: Statement) -> str:
    """The results of the outermost SELECT: `name, age`, `everything`."""
    first = min(statement.selects, key=lambda select: select.start)
    texts = [bare(statement, item) for item in first.items]
    if len(set(texts)) < len(texts):  # T1.name, T2.name
        texts = [" ".join(statement.text(item).split()) for item in first.items]
    if texts == ["*"]:
        return "all columns"
    if len(texts) > MAX_ITEMS:
        return f"{', '.join(texts[:MAX_ITEMS])} and more"
    text = _listed(texts)
    return text if len(text) <= MAX_CHARS else f"{len(texts)} results"


def _tables(statement: Statement) -> str:
    """The tables of the query, each once, in its order."""
    sources = [source for select in statement.selects for source in select.sources]
    names: dict[str, str] = {}
    for source in sorted(sources, key=lambda source: source.span):
        if source.table:
            names.setdefault(source.table, source_text(statement, source))
    return _listed(list(names.values())) or "the database"


def _table_names(statement: Statement) -> set[str]:
    sources = [source for select in statement.selects for source in select.sources]
    return {source.table for source in sources if source.table}


def _listed(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
