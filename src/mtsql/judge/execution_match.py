"""Execution match, the official way: run both queries, compare what comes back.

The rules are those of taoyds/test-suite-sql-eval, quirks included. One thing is mended: predictions run in
the sandbox (sandbox.py), so that a predicted DROP TABLE, PRAGMA or ATTACH is a wrong answer and not a
damaged database, and a query that would hang the official program ends at its limit as wrong.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from sqlparse.engine import FilterStack

from mtsql.sql.sandbox import QueryConfig, run_query

OFFICIAL_LIMITS = QueryConfig(
    max_vm_steps=5_000_000_000,
    timeout_secs=300.0,
    max_rows=10_000_000,
    max_cells=50_000_000,
    max_bytes=500_000_000,
    max_value_bytes=1_000_000_000,
    max_sql_bytes=1_000_000,
    max_expr_depth=1000,
    max_compound_selects=500,
    max_memory_bytes=2 * 2**30,
)
"""The official program has no limits. These are wide enough for every known gold: the most
expensive one takes a billion steps."""

_MAX_TEXTS = 16384
_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)", re.IGNORECASE)
_NEEDS_SCAN = re.compile(
    r"distinct|;\s*\S|\bgo\b", re.IGNORECASE
)  # `go` ends a statement for sqlparse


def official_prediction(sql: str) -> str:
    """The change made to every prediction, for systems that write `value` for a literal.

    Quirk: it happens anywhere in the text, so a column `value_points` becomes `1_points` and fails.
    """
    return sql.replace("value", "1")


def execution_match(
    pred_sql: str,
    gold_sql: str,
    db_path: Path | Sequence[Path],
    *,
    keep_distinct: bool = False,
    limits: QueryConfig = OFFICIAL_LIMITS,
) -> bool:
    """Whether both queries run on the database, or on every one of several, and their results
    agree.

    False where the gold does not run. keep_distinct: do not delete DISTINCT, nor all but the first
    statement.
    """
    pred_text = executed_text(official_prediction(pred_sql), keep_distinct)
    paths = [db_path] if isinstance(db_path, (str, Path)) else db_path
    return texts_match(pred_text, executed_text(gold_sql, keep_distinct), paths, limits)


def texts_match(
    pred_text: str, gold_text: str, db_paths: Sequence[Path], limits: QueryConfig
) -> bool:
    """The verdict on texts that are run as they are."""
    is_ordered = (
        "order by" in gold_text.lower()
    )  # quirk: wherever it stands, and only with one blank
    for path in db_paths:
        gold = run_query(path, gold_text, limits)
        if not gold.is_ok:
            return False
        pred = run_query(path, pred_text, _pred_limits(limits, len(gold.rows)))
        if not pred.is_ok or not results_agree(pred.rows, gold.rows, is_ordered):
            return False
    return True


@lru_cache(maxsize=1024)
def _pred_limits(limits: QueryConfig, num_gold_rows: int) -> QueryConfig:
    """A prediction with more rows than the gold is wrong, so the official limits fetch no more rows
    than that.

    Other limits stay unchanged, because then the cached result of a tool can be used.
    """
    return (
        replace(limits, max_rows=max(1, num_gold_rows))
        if limits.max_rows == OFFICIAL_LIMITS.max_rows
        else limits
    )


@lru_cache(maxsize=_MAX_TEXTS)
def executed_text(sql: str, keep_distinct: bool = False) -> str:
    """What is run for a query: split operators joined, the first statement, without any
    DISTINCT."""
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    if not keep_distinct and _NEEDS_SCAN.search(sql):
        # Without its grouping stage sqlparse splits statements and tokens the same, in a quarter of the time.
        statement = next(iter(FilterStack().run(sql)), None)
        values = [token.value for token in statement.flatten()] if statement else []
        sql = "".join(value for value in values if value.lower() != "distinct")
    return _YEAR.sub("2020", sql)


def results_agree(pred: Sequence[tuple], gold: Sequence[tuple], is_ordered: bool) -> bool:
    """Whether one permutation of the prediction's columns makes the rows equal, as a list or as a
    multiset.

    Cells compare as Python values: 1 == 1.0 != "1". Two results without rows agree, whatever their
    columns.
    """
    if not pred or not gold:
        return not pred and not gold
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False
    if is_ordered:
        has_mapping = Counter(zip(*pred, strict=True)) == Counter(zip(*gold, strict=True))
    else:
        has_mapping = Counter(pred) == Counter(gold) or _has_column_mapping(pred, gold)
    return has_mapping and (len(gold[0]) == 1 or _passes_cell_sort(pred, gold, is_ordered))


def _has_column_mapping(pred: Sequence[tuple], gold: Sequence[tuple]) -> bool:
    """Whether a permutation makes the multisets of rows equal; column by column, going back where
    stuck."""
    columns = {"pred": list(zip(*pred, strict=True)), "gold": list(zip(*gold, strict=True))}
    contents = {
        side: [frozenset(Counter(column).items()) for column in columns[side]] for side in columns
    }
    if Counter(contents["pred"]) != Counter(contents["gold"]):
        return False
    # Columns with many values first: they soon tell all rows apart, and then a wrong choice shows at once.
    order = sorted(range(len(gold[0])), key=lambda place: -len(contents["gold"][place]))

    def choices(
        depth: int, pred_rows: list[int], gold_rows: list[int], unused: frozenset[int]
    ) -> Iterator[tuple[int, list[int], list[int], frozenset[int]]]:
        """The arguments of the next depth, for each column of the prediction that fits this one.

        Rows come as numbers, equal where the columns mapped so far are equal.
        """
        place = order[depth]
        numbers: dict[tuple, int] = {}
        gold_rows = [
            numbers.setdefault(key, len(numbers))
            for key in zip(gold_rows, columns["gold"][place], strict=True)
        ]
        wanted = Counter(gold_rows)
        tried = set()
        for choice in unused:
            column = columns["pred"][choice]
            if contents["pred"][choice] != contents["gold"][place] or column in tried:
                continue
            tried.add(column)  # equal columns are interchangeable
            new_rows = [numbers.get(key, -1) for key in zip(pred_rows, column, strict=True)]
            if Counter(new_rows) == wanted:
                yield depth + 1, new_rows, gold_rows, unused - {choice}

    start = [0] * len(gold)
    # Not recursive, because there may be 2,000 columns.
    stack = [choices(0, start, start, frozenset(order))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif found[0] == len(order):
            return True
        else:
            stack.append(choices(*found))
    return False


def _passes_cell_sort(pred: Sequence[tuple], gold: Sequence[tuple], is_ordered: bool) -> bool:
    """The official pre-check. Quirk: it sorts each row's cells by their text; 2 and 2.0 may sort
    differently.

    Of results that agree otherwise, only those with floats can fail it.
    """
    if not any(isinstance(cell, float) for rows in (pred, gold) for row in rows for cell in row):
        return True
    pred, gold = ([tuple(sorted(row, key=_cell_text)) for row in rows] for rows in (pred, gold))
    return pred == gold if is_ordered else set(pred) == set(gold)


def _cell_text(cell: object) -> str:
    return f"{cell}{type(cell)}"
