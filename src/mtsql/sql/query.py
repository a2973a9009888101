"""What one query may use, and what it returns."""

from dataclasses import dataclass, field
from enum import Enum

from mtsql.choices import NumBytes


class QueryStatus(Enum):
    """How a query ended. The values are those that a worker sends (connection.py)."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    DENIED = "denied"


@dataclass(frozen=True)
class QueryConfig:
    """Limits of one query. ValueError that names the field if a limit is not positive, or is too
    large for SQLite or the system."""

    max_vm_steps: int = 50_000_000
    """Steps of SQLite's virtual machine. 50 million take 0.5 to 1.5 s. This limit gives the same
    verdict on every machine."""
    timeout_secs: float = 30.0
    """Seconds on the clock, for work that takes time but few steps. Each use is logged and
    counted."""
    max_rows: int = 100_000
    """Rows of a result."""
    max_cells: int = 2_000_000
    """Cells of a result."""
    max_bytes: NumBytes = 64_000_000
    """Bytes of a result. A cell counts as a Python object does: a short text about 60."""
    max_value_bytes: NumBytes = 40_000
    """Bytes of any text, blob or table row that a query reads completely or computes."""
    max_sql_bytes: NumBytes = 20_000
    """Bytes of the query itself, in UTF-8."""
    max_expr_depth: int = 200
    """Nesting depth of an expression."""
    max_compound_selects: int = 100
    """Number of SELECTs that UNION, INTERSECT or EXCEPT connect."""
    max_memory_bytes: NumBytes = 2**30
    """Bytes of memory of a worker beyond what it needs at rest. SQLite may use half of it; the
    result needs the rest."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_seconds = name == "timeout_secs"
            is_number = isinstance(value, (int, float) if is_seconds else int)
            if not is_number or not value > 0:  # `not >` refuses NaN, too
                kind = "number" if is_seconds else "whole number"
                raise ValueError(f"env.query.{name}: expected a positive {kind}, found {value!r}")
            most = _LARGEST.get(name)
            if most is not None and value > most:
                raise ValueError(f"env.query.{name}: expected at most {most}, found {value!r}")
        if self.max_memory_bytes < 32 * 2**20:
            raise ValueError(
                f"env.query.max_memory_bytes: a worker needs at least 33554432, "
                f"found {self.max_memory_bytes}"
            )


_LARGEST = {
    "timeout_secs": 10**6,
    "max_value_bytes": 10**9,
    "max_expr_depth": 10**6,
    "max_compound_selects": 10**6,
    "max_vm_steps": 10**15,
    "max_memory_bytes": 2**50,
}
"""Field of QueryConfig -> its largest value."""


@dataclass(frozen=True)
class QueryResult:
    """Rows in SQLite's order, with duplicates. If the status is not OK: no rows, and a message.

    num_ticks: what the query cost, in ticks of a million virtual-machine steps (fewer steps if the
    budget is smaller).
    is_repeatable: whether another run gives the same result. It is False if the clock ended the
    query, something killed its process, or the file changed meanwhile. Such a result is not stored.
    secs: seconds in the worker. A cached result keeps those of its only run.
    """

    status: QueryStatus
    rows: tuple[tuple, ...] = ()
    columns: tuple[str, ...] = ()
    message: str = ""
    num_ticks: int = 0
    num_bytes: int = 0
    is_repeatable: bool = True
    secs: float = field(default=0.0, compare=False)

    @property
    def is_ok(self) -> bool:
        """Whether the query ran."""
        return self.status is QueryStatus.OK

    @property
    def is_empty(self) -> bool:
        """Whether the query ran but returned no rows or only NULL."""
        return self.is_ok and all(cell is None for row in self.rows for cell in row)
