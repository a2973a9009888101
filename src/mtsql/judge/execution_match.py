"""Execution match, the official way: run both queries and compare the rows that they return.

The rules are those of taoyds/test-suite-sql-eval, quirks included, with one repair: predictions run
in the sandbox (mtsql/sql/sandbox.py). So a predicted DROP TABLE, PRAGMA or ATTACH is a wrong answer
and damages no database. A query that would hang the official program ends at its limit as wrong.

BIRD has an evaluator of its own, whose rule is `set_match`. In three points its EX is not that of
the others: repeated rows do not count, ORDER BY does not count, and columns must have the order of
the gold's.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sqlparse.engine import FilterStack

from mtsql.sql.dialogues import ExRule
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
# For sqlparse, `go` ends a statement too.
_NEEDS_SCAN = re.compile(r"distinct|;\s*\S|\bgo\b", re.IGNORECASE)

Rows = Sequence[tuple]


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
    rule: ExRule = "official",
) -> bool:
    """Whether both queries run on the database and their results agree.

    db_path: one file, or several that must all agree. keep_distinct: keep DISTINCT, and all
    statements instead of the first. rule: "set" compares as BIRD does (`set_match`), which always
    keeps both. False if the gold does not run.
    """
    paths = [db_path] if isinstance(db_path, (str, Path)) else db_path
    if rule == "set":
        return set_match(pred_sql, gold_sql, paths, limits)
    pred_text = executed_text(official_prediction(pred_sql), keep_distinct)
    gold_text = executed_text(gold_sql, keep_distinct)
    return texts_match(pred_text, gold_text, paths, limits)


def set_match(
    pred_sql: str, gold_sql: str, db_paths: Sequence[Path], limits: QueryConfig = OFFICIAL_LIMITS
) -> bool:
    """Whether both queries return the same set of rows on every database: BIRD's EX.

    Both queries run as they are written (but see `runnable`, which joins `> =` for every query). A
    row is a tuple, so the order of columns counts. Cells compare as Python values. Two results
    without rows agree. Source: BIRD's evaluation_ex.py, `set(predicted) == set(gold)`.
    """
    for path in db_paths:
        gold = run_query(path, gold_sql, limits)
        if not gold.is_ok:
            return False
        pred = run_query(path, pred_sql, limits)
        if not pred.is_ok or set(pred.rows) != set(gold.rows):
            return False
    return True


def texts_match(
    pred_text: str, gold_text: str, db_paths: Sequence[Path], limits: QueryConfig
) -> bool:
    """Whether the results of two texts agree on every database. The texts run unchanged."""
    # Quirk: an ORDER BY counts wherever it stands, but only with a single blank.
    is_ordered = "order by" in gold_text.lower()
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
    """The limits of a prediction.

    A prediction with more rows than the gold is wrong, so with the official limits no more rows
    are fetched. Other limits stay unchanged, so that the cached result of a tool can be used.
    """
    if limits.max_rows != OFFICIAL_LIMITS.max_rows:
        return limits
    return replace(limits, max_rows=max(1, num_gold_rows))


@lru_cache(maxsize=_MAX_TEXTS)
def executed_text(sql: str, keep_distinct: bool = False) -> str:
    """The text that runs for a query.

    Split operators are joined; only the first statement is kept, without any DISTINCT.
    """
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    if not keep_distinct and _NEEDS_SCAN.search(sql):
        # Without its grouping stage, sqlparse finds the same statements and tokens four times as
        # fast.
        statement = next(iter(FilterStack().run(sql)), None)
        values = [token.value for token in statement.flatten()] if statement else []
        sql = "".join(value for value in values if value.lower() != "distinct")
    return _YEAR.sub("2020", sql)


def results_agree(pred: Rows, gold: Rows, is_ordered: bool) -> bool:
    """Whether some order of the prediction's columns makes the rows equal.

    Rows compare as a list if is_ordered, else as a multiset. Cells compare as Python values:
    1 == 1.0 != "1". Two results without rows agree, whatever their columns are.
    """
    if not pred or not gold:
        return not pred and not gold
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False
    if is_ordered:
        has_mapping = Counter(zip(*pred, strict=True)) == Counter(zip(*gold, strict=True))
    else:
        has_mapping = Counter(pred) == Counter(gold) or _ColumnMapping(pred, gold).exists()
    if not has_mapping:
        return False
    return len(gold[0]) == 1 or _passes_cell_sort(pred, gold, is_ordered)


@dataclass(frozen=True)
class _Partial:
    """A mapping of the first `depth` columns of the search order.

    The rows of each side are represented by numbers: two rows have the same number if they are
    equal in all columns mapped so far. So after mapping both columns of these sides

        gold  (1, a) (1, b) (1, a)  ->  0 1 0
        pred  (a, 1) (a, 1) (b, 1)  ->  0 0 1

    the numbers are equal as multisets, which means that the mapped columns agree.
    """

    depth: int
    pred_rows: list[int]
    gold_rows: list[int]
    unused: frozenset[int]


class _ColumnMapping:
    """A search for an order of the prediction's columns that makes the multisets of rows equal.

    It maps one column of the gold query after the other, and goes back if no column fits.
    """

    def __init__(self, pred: Rows, gold: Rows) -> None:
        self.pred_columns = list(zip(*pred, strict=True))
        self.gold_columns = list(zip(*gold, strict=True))
        self.pred_contents = [_content(column) for column in self.pred_columns]
        self.gold_contents = [_content(column) for column in self.gold_columns]
        # Columns with many values come first: they soon distinguish all rows, and then a wrong
        # choice shows at once.
        places = range(len(self.gold_columns))
        self.order = sorted(places, key=lambda place: -len(self.gold_contents[place]))

    def exists(self) -> bool:
        """Whether there is such an order."""
        if Counter(self.pred_contents) != Counter(self.gold_contents):
            return False
        num_rows = len(self.gold_columns[0])
        start = _Partial(0, [0] * num_rows, [0] * num_rows, frozenset(self.order))
        # A stack instead of recursion, because there may be 2,000 columns.
        stack = [self.extensions(start)]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
            elif found.depth == len(self.order):
                return True
            else:
                stack.append(self.extensions(found))
        return False

    def extensions(self, partial: _Partial) -> Iterator[_Partial]:
        """The mapping with one more column of the gold, for each column that fits it."""
        place = self.order[partial.depth]
        numbers: dict[tuple, int] = {}
        gold_rows = []
        for key in zip(partial.gold_rows, self.gold_columns[place], strict=True):
            gold_rows.append(numbers.setdefault(key, len(numbers)))
        gold_counts = Counter(gold_rows)
        tried = set()
        for choice in partial.unused:
            column = self.pred_columns[choice]
            if self.pred_contents[choice] != self.gold_contents[place] or column in tried:
                continue
            tried.add(column)  # equal columns are interchangeable
            keys = zip(partial.pred_rows, column, strict=True)
            pred_rows = [numbers.get(key, -1) for key in keys]
            if Counter(pred_rows) == gold_counts:
                unused = partial.unused - {choice}
                yield _Partial(partial.depth + 1, pred_rows, gold_rows, unused)


def _content(column: tuple) -> frozenset[tuple[object, int]]:
    """The values of a column with their counts."""
    return frozenset(Counter(column).items())


def _passes_cell_sort(pred: Rows, gold: Rows, is_ordered: bool) -> bool:
    """The official pre-check, which sorts the cells of each row by their text.

    Quirk: 2 and 2.0 may be sorted differently. Only results with floats can fail this check if
    they agree otherwise.
    """
    if not _has_float(pred) and not _has_float(gold):
        return True
    pred = _with_sorted_cells(pred)
    gold = _with_sorted_cells(gold)
    return pred == gold if is_ordered else set(pred) == set(gold)


def _has_float(rows: Rows) -> bool:
    return any(isinstance(cell, float) for row in rows for cell in row)


def _with_sorted_cells(rows: Rows) -> list[tuple]:
    return [tuple(sorted(row, key=_cell_text)) for row in rows]


def _cell_text(cell: object) -> str:
    return f"{cell}{type(cell)}"
