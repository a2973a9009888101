"""Whether two queries, run as they are written, return the same rows: the judge of the rewards.

The official verdict (execution.py) is another one: it changes the text of both queries first, and
it takes any ORDER BY in the gold, also a nested one, for the order of the result.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtsql.judge.execution_match import results_agree
from mtsql.sql.runnable import QUOTED
from mtsql.sql.sandbox import QueryConfig, Source, run_query

NUM_DIGITS = 9
"""Of a float that are compared. The last digits of a sum depend on the order of its terms."""
_QUOTED = re.compile(QUOTED, re.VERBOSE | re.DOTALL)
_CLAUSE_OR_BRACKET = re.compile(r"\(|\)|\border\s+by\b|\blimit\b", re.IGNORECASE)
_SELECT_DISTINCT = re.compile(r"\bselect\s+distinct\b", re.IGNORECASE)

Rows = Sequence[tuple]


def without_quotes(sql: str) -> str:
    """The text without literals, quoted names and comments."""
    return _QUOTED.sub(" ", sql)


def is_ordered(sql: str) -> bool:
    """Whether the result has an order: an ORDER BY stands outside of all brackets."""
    return _outermost(sql, "order") is not None


def _outermost(sql: str, word: str, start: int = 0) -> int | None:
    """The place of the first ORDER BY or LIMIT outside of all brackets, from `start` on."""
    depth = 0
    for found in _CLAUSE_OR_BRACKET.finditer(_masked(sql)):
        if found[0] in "()":
            depth += 1 if found[0] == "(" else -1
        elif depth == 0 and found.start() >= start and found[0].lower().startswith(word):
            return found.start()
    return None


def _masked(sql: str) -> str:
    """The text with blanks in place of comments, and with x in place of other quoted text."""

    def mask(found: re.Match) -> str:
        return (" " if found[0][:2] in ("--", "/*") else "x") * len(found[0])

    return _QUOTED.sub(mask, sql)


def tie_breakers(sql: str, num_columns: int) -> tuple[str, str] | None:
    """The query with its ties broken by all columns of the result, upwards and downwards. Both
    return the same rows in the same order if no rows tie. None if the query has no order."""
    start = _outermost(sql, "order")
    if start is None:
        return None
    masked = _masked(sql)
    end = _outermost(sql, "limit", start)
    if end is None:
        end = masked.find(";", start)
        end = len(masked.rstrip()) if end < 0 else end
        end = min(end, len(masked[:end].rstrip()))  # before a comment
    up, down = (
        ", " + ", ".join(f"{i} {word}" for i in range(1, num_columns + 1))
        for word in ("ASC", "DESC")
    )
    return f"{sql[:end]}{up} {sql[end:]}", f"{sql[:end]}{down} {sql[end:]}"


def selects_distinct(sql: str) -> bool:
    """Whether the text says SELECT DISTINCT, anywhere."""
    return bool(_SELECT_DISTINCT.search(without_quotes(sql)))


def written_match(sql: str, gold_sql: str, db_path: Path, config: QueryConfig) -> bool:
    """Whether both queries run and their rows agree, in the order that the gold fixes."""
    gold = run_query(db_path, gold_sql, config)
    if not gold.is_ok:
        return False
    pred = run_query(db_path, sql, config)
    if not pred.is_ok:
        return False
    if not is_ordered(gold_sql):
        return rows_agree(pred.rows, gold.rows)
    if rows_agree(pred.rows, gold.rows, keeps_order=True):
        return True
    if not rows_agree(pred.rows, gold.rows):
        return False
    orders = ordered_both_ways(gold_sql, len(gold.columns), db_path, config)
    return orders is not None and agrees_but_for_ties(pred.rows, *orders)


def ordered_both_ways(
    gold_sql: str, num_columns: int, source: Source, config: QueryConfig
) -> tuple[Rows, Rows] | None:
    """The rows of an ordered gold with ties broken upwards and downwards. None if it has no order,
    or if these queries do not run."""
    texts = tie_breakers(gold_sql, num_columns)
    if texts is None:
        return None
    up, down = (run_query(source, text, config) for text in texts)
    return (up.rows, down.rows) if up.is_ok and down.is_ok else None


def rows_agree(pred: Rows, gold: Rows, *, keeps_order: bool = False) -> bool:
    """`results_agree`, where floats may differ in their last digits."""
    if results_agree(pred, gold, keeps_order):
        return True
    if len(pred) != len(gold) or not any(isinstance(cell, float) for row in gold for cell in row):
        return False
    return results_agree(rounded(pred), rounded(gold), keeps_order)


def agrees_but_for_ties(pred: Rows, gold: Rows, mirrored: Rows) -> bool:
    """Whether the rows stand in the gold's order, except within ties.

    gold, mirrored: the gold's rows with ties broken in two opposite ways. Each block of rows that
    change places between them must hold the same rows in the prediction.
    """
    gold, mirrored, pred = rounded(gold), rounded(mirrored), rounded(pred)
    if len(pred) != len(gold):
        return False
    # The number of its block is one more cell of each row: columns may change places in all blocks
    # alike, as rows may within one.
    blocks = list(_tie_blocks(gold, mirrored))
    numbered = [f"block {i}" for i, (start, end) in enumerate(blocks) for _ in range(start, end)]
    pred, gold = (
        [(n, *row) for n, row in zip(numbered, rows, strict=True)] for rows in (pred, gold)
    )
    return results_agree(pred, gold, False)


def _tie_blocks(rows: Rows, mirrored: Rows) -> Iterator[tuple[int, int]]:
    """-> (start, end) of the shortest blocks that hold the same rows on both sides."""
    start, missing = 0, Counter()
    for place, (one, other) in enumerate(zip(rows, mirrored, strict=False)):
        for row, step in ((one, 1), (other, -1)):
            missing[row] += step
            if not missing[row]:
                del missing[row]
        if not missing:
            yield start, place + 1
            start = place + 1
    if start < len(rows):
        yield start, len(rows)


def stable_order(rows: Rows, mirrored: Rows, gold_sql: str) -> bool | None:
    """Whether the gold fixes the order of its rows; None if not even which rows it returns.

    mirrored: its rows on the same data, stored in the opposite order.
    """
    has_order = is_ordered(gold_sql)
    if rows_agree(mirrored, rows, keeps_order=has_order):
        return has_order
    return False if rows_agree(mirrored, rows) else None


def rounded(rows: Rows) -> tuple[tuple, ...]:
    """Floats to `NUM_DIGITS` digits."""
    return tuple(
        tuple(_round(cell) if isinstance(cell, float) else cell for cell in row) for row in rows
    )


def _round(number: float) -> float:
    return float(f"{number:.{NUM_DIGITS}g}") if math.isfinite(number) else number
