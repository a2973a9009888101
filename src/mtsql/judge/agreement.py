"""The reward's judge: whether two queries, run as they are written, return the same rows.

The official verdict (execution_match.py) differs in two ways. It changes the text of both queries
first, and it takes any ORDER BY in the gold query, even a nested one, as the order of the result.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtsql.judge.execution_match import results_agree, set_match
from mtsql.sql.dialogues import ExRule
from mtsql.sql.runnable import QUOTED
from mtsql.sql.sandbox import QueryConfig, Source, run_query

NUM_DIGITS = 9
"""Significant digits in which floats are compared. The last digits of a sum depend on the order
of its terms."""
_QUOTED = re.compile(QUOTED, re.VERBOSE | re.DOTALL)
_CLAUSE_OR_BRACKET = re.compile(r"\(|\)|\border\s+by\b|\blimit\b", re.IGNORECASE)
_SELECT_DISTINCT = re.compile(r"\bselect\s+distinct\b", re.IGNORECASE)

Rows = Sequence[tuple]


def without_quotes(sql: str) -> str:
    """The text without literals, quoted names and comments."""
    return _QUOTED.sub(" ", sql)


def is_ordered(sql: str) -> bool:
    """Whether the query orders its result: an ORDER BY stands outside of all brackets."""
    return _outermost(sql, "order") is not None


def _outermost(sql: str, word: str, start: int = 0) -> int | None:
    """The place of the first ORDER BY or LIMIT that is outside of all brackets, from `start` on."""
    depth = 0
    for found in _CLAUSE_OR_BRACKET.finditer(_masked(sql)):
        if found[0] == "(":
            depth += 1
        elif found[0] == ")":
            depth -= 1
        elif depth == 0 and found.start() >= start and found[0].lower().startswith(word):
            return found.start()
    return None


def _masked(sql: str) -> str:
    """The text at its full length, with blanks for comments and x for other quoted text."""

    def mask(found: re.Match) -> str:
        is_comment = found[0].startswith(("--", "/*"))
        return (" " if is_comment else "x") * len(found[0])

    return _QUOTED.sub(mask, sql)


def tie_breakers(sql: str, num_columns: int) -> tuple[str, str] | None:
    """Two variants of an ordered query, which break ties in opposite ways. None without ORDER BY.

    For two columns, `ORDER BY a LIMIT 3` becomes `ORDER BY a, 1 ASC, 2 ASC LIMIT 3` and
    `ORDER BY a, 1 DESC, 2 DESC LIMIT 3`. Both return the same rows in the same order if no rows
    tie.
    """
    start = _outermost(sql, "order")
    if start is None:
        return None
    end = _end_of_order(sql, start)
    up = "".join(f", {column} ASC" for column in range(1, num_columns + 1))
    down = "".join(f", {column} DESC" for column in range(1, num_columns + 1))
    return f"{sql[:end]}{up} {sql[end:]}", f"{sql[:end]}{down} {sql[end:]}"


def _end_of_order(sql: str, start: int) -> int:
    """The place behind the ORDER BY that begins at `start`."""
    limit = _outermost(sql, "limit", start)
    if limit is not None:
        return limit
    masked = _masked(sql)
    semicolon = masked.find(";", start)
    before = masked if semicolon < 0 else masked[:semicolon]
    return len(before.rstrip())  # comments are blanks here


def selects_distinct(sql: str) -> bool:
    """Whether the text says SELECT DISTINCT, anywhere."""
    return bool(_SELECT_DISTINCT.search(without_quotes(sql)))


def written_match(
    sql: str, gold_sql: str, db_path: Path, config: QueryConfig, rule: ExRule = "official"
) -> bool:
    """Whether both queries run and their rows agree, in the order that the gold fixes. rule: "set"
    compares as BIRD does (`set_match`)."""
    if rule == "set":
        return set_match(sql, gold_sql, [db_path], config)
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
    """The rows of an ordered gold with ties broken in two opposite ways (`tie_breakers`).

    None if the gold has no order, or if one of the two queries does not run.
    """
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
    """Whether the rows stand in the gold's order, except among rows that tie.

    gold, mirrored: the gold's rows with ties broken in two opposite ways. Where the two differ,
    they form blocks of tied rows. The prediction must have the same rows in each block:

        gold      a | b c | d       agrees: a c b d
        mirrored  a | c b | d       does not: b a c d
    """
    gold = rounded(gold)
    mirrored = rounded(mirrored)
    pred = rounded(pred)
    if len(pred) != len(gold):
        return False
    # Each row gets the number of its block as one more cell. So rows may change places only within
    # a block, while columns may change places only in all blocks alike.
    names = []
    for number, (start, end) in enumerate(_tie_blocks(gold, mirrored)):
        names += [f"block {number}"] * (end - start)
    named_pred = [(name, *row) for name, row in zip(names, pred, strict=True)]
    named_gold = [(name, *row) for name, row in zip(names, gold, strict=True)]
    return results_agree(named_pred, named_gold, is_ordered=False)


def _tie_blocks(rows: Rows, mirrored: Rows) -> Iterator[tuple[int, int]]:
    """(start, end) of the shortest blocks that hold the same rows on both sides."""
    start = 0
    # Row -> how many more of it `rows` has in this block than `mirrored`.
    surplus: Counter[tuple] = Counter()
    for place, (row, other) in enumerate(zip(rows, mirrored, strict=False)):
        surplus[row] += 1
        surplus[other] -= 1
        for changed in (row, other):
            if surplus[changed] == 0:
                del surplus[changed]
        if not surplus:
            yield start, place + 1
            start = place + 1
    if start < len(rows):
        yield start, len(rows)


def stable_order(rows: Rows, mirrored: Rows, gold_sql: str) -> bool | None:
    """Whether the gold query fixes the order of its rows. None if it does not even fix which rows
    it returns.

    mirrored: its rows on the same data, stored in the opposite order.
    """
    has_order = is_ordered(gold_sql)
    if rows_agree(mirrored, rows, keeps_order=has_order):
        return has_order
    return False if rows_agree(mirrored, rows) else None


def rounded(rows: Rows) -> tuple[tuple, ...]:
    """The rows with floats rounded to `NUM_DIGITS` digits."""
    return tuple(tuple(_round(cell) for cell in row) for row in rows)


def _round(cell: object) -> object:
    if isinstance(cell, float) and math.isfinite(cell):
        return float(f"{cell:.{NUM_DIGITS}g}")
    return cell
