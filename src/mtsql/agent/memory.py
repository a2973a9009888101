"""The dialogue memory: every earlier turn with its question, its SQL, the query's clauses and its
result."""

from dataclasses import dataclass
from pathlib import Path

from mtsql.sql.dialogues import Turn
from mtsql.sql.meter import WorkMeter
from mtsql.sql.sandbox import QueryConfig, run_query

CLAUSES = (
    "select",
    "from",
    "where",
    "group by",
    "having",
    "order by",
    "limit",
    "intersect",
    "union",
    "except",
)


@dataclass(frozen=True)
class MemoryEntry:
    """One earlier turn. `result` is None if the query did not run or failed."""

    question: str
    sql: str
    clauses: tuple[str, ...]
    result: tuple[tuple, ...] | None


def recall(
    turn: Turn,
    db_path: Path,
    config: QueryConfig,
    with_results: bool,
    meter: WorkMeter | None = None,
) -> list[MemoryEntry]:
    """The turn's history, oldest first. Its SQL is the gold SQL in training and the agent's own
    under predicted history.

    The earlier queries run only if `with_results`. The current turn's gold SQL is never read.
    """
    entries = []
    for question, sql in turn.history:
        result = run_query(db_path, sql, config, meter) if with_results else None
        rows = result.rows if result is not None and result.is_ok else None
        entries.append(MemoryEntry(question, sql, clauses_of(sql), rows))
    return entries


def clauses_of(sql: str) -> tuple[str, ...]:
    """The clauses whose words stand in a query, in the order of `CLAUSES`."""
    text = f" {' '.join(sql.lower().split())} "
    return tuple(clause for clause in CLAUSES if f" {clause} " in text)
