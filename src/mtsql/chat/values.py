"""Values of a database as a sample: how it spells what a question may name."""

from collections.abc import Iterator
from dataclasses import replace

from mtsql.sql.names import quoted
from mtsql.sql.query import QueryConfig
from mtsql.sql.sandbox import run_query
from mtsql.sql.schema import Database

MAX_VALUE_CHARS = 40
"""A longer value is no name that a question spells, so it is left out."""
MAX_CHARS = 2000
"""Characters of a sample. Further columns are left out."""
MAX_VM_STEPS = 2_000_000
"""Steps that a column may take. Views may be slow, and a column that is has no sample."""


def sampled_values(database: Database, num_values: int, limits: QueryConfig) -> str:
    """Different texts from each column that holds texts, at most `num_values` of a column, as SQL
    writes them: `singer.country: 'USA', 'Peru'; singer.name: 'Ann'`. Empty if `num_values` is 0.
    """
    parts: list[str] = []
    num_chars = 0
    for part in _samples(database, num_values, limits) if num_values else ():
        num_chars += len(part) + 2
        if num_chars > MAX_CHARS:
            break
        parts.append(part)
    return "; ".join(parts)


def _samples(database: Database, num_values: int, limits: QueryConfig) -> Iterator[str]:
    limits = replace(limits, max_vm_steps=min(limits.max_vm_steps, MAX_VM_STEPS))
    for table in database.schema.tables:
        for column in table.columns:
            name = quoted(column.name)
            sql = (
                f"SELECT DISTINCT {name} FROM {quoted(table.name)} WHERE typeof({name}) = 'text' "
                f"AND length({name}) BETWEEN 1 AND {MAX_VALUE_CHARS} LIMIT {num_values}"
            )
            result = run_query(database.path, sql, limits)
            texts = ["'" + str(value).replace("'", "''") + "'" for (value,) in result.rows]
            if texts:
                yield f"{quoted(table.name)}.{name}: {', '.join(texts)}"
