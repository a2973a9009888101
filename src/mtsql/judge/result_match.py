"""How much of the gold query's result another query returns: a dense score beside clause F1."""

from collections import Counter
from collections.abc import Sequence

from mtsql.judge.agreement import rounded
from mtsql.judge.execution_match import results_agree

MAX_GROWTH = 10
MAX_SMALL = 100
"""A result of more than MAX_SMALL rows and more than MAX_GROWTH times the gold's scores 0 without
being looked at. The F1 of its rows would be below 0.19."""

Rows = Sequence[tuple]


def result_match(pred: Rows, gold: Rows) -> tuple[float, float]:
    """-> (F1 of columns, F1 of rows), each 0 to 1. Both are 1 if the results agree as multisets of
    rows in some order of the columns.

    Columns: two columns are the same if they hold the same set of values. Rows: each column of the
    gold is paired with the column that shares most values with it. The rows are compared as a
    multiset in these columns, and the F1 is multiplied by the share of columns that have a partner.

        gold  (Ann, 41) (Bob, 25)    columns  2 * 1 / (2 + 1) = 2/3
        pred  (Ann)     (Bob)        rows     1/2 * 2 * 2 / (2 + 2) = 1/2

    Both are 0 if either result holds nothing but NULLs, because any query without rows would agree
    with a gold without rows. Floats are rounded as in the guard.
    """
    if _is_nothing(pred) or _is_nothing(gold):
        return 0.0, 0.0
    if len(pred) > max(MAX_SMALL, MAX_GROWTH * len(gold)):
        return 0.0, 0.0
    pred, gold = rounded(pred), rounded(gold)
    if results_agree(pred, gold, is_ordered=False):
        return 1.0, 1.0
    pred_columns = list(zip(*pred, strict=True))
    gold_columns = list(zip(*gold, strict=True))
    return _columns_f1(pred_columns, gold_columns), _rows_f1(pred_columns, gold_columns)


def _is_nothing(rows: Rows) -> bool:
    return all(cell is None for row in rows for cell in row)


def _columns_f1(pred: list[tuple], gold: list[tuple]) -> float:
    same = Counter(map(frozenset, pred)) & Counter(map(frozenset, gold))
    return 2 * same.total() / (len(pred) + len(gold))


def _rows_f1(pred: list[tuple], gold: list[tuple]) -> float:
    pairs = _pairs(pred, gold)
    pred_rows = Counter(zip(*(pred[at] for at, _ in pairs), strict=True))
    gold_rows = Counter(zip(*(gold[at] for _, at in pairs), strict=True))
    num_same = (pred_rows & gold_rows).total()
    f1 = 2 * num_same / (pred_rows.total() + gold_rows.total())
    return f1 * len(pairs) / max(len(pred), len(gold))


def _pairs(pred: list[tuple], gold: list[tuple]) -> list[tuple[int, int]]:
    """(place in pred, place in gold) of columns, those that share most values first. Of equal ones
    those at the same place come first."""
    counts = [Counter(column) for column in pred]
    ranked = []
    for place, column in enumerate(gold):
        values = Counter(column)
        for other, count in enumerate(counts):
            ranked.append((-(count & values).total(), place != other, place, other))
    pairs: list[tuple[int, int]] = []
    for _, _, place, other in sorted(ranked):
        if all(other != p and place != g for p, g in pairs):
            pairs.append((other, place))
    return pairs
