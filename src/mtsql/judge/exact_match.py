"""Exact set match: the official comparison of two queries by clauses, with its partial scores.

The verdicts are those of taoyds/test-suite-sql-eval with its default switches, quirks included,
because published figures contain the quirks. execution_match.py has the other official verdict.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mtsql.judge.execution_match import official_prediction
from mtsql.judge.normalized_query import normalized
from mtsql.judge.sql_parser import names_of, parse_sql
from mtsql.judge.sql_query import SET_OPERATORS, Query
from mtsql.sql.schema import Schema

PARTS = (
    "select",
    "select(no AGG)",
    "where",
    "where(no OP)",
    "group(no Having)",
    "group",
    "order",
    "and/or",
    "IUEN",
    "keywords",
)
"""The ten partial scores, by their official names and in their official order."""


@dataclass(frozen=True)
class Part:
    """The counts of a partial score: elements in the gold, in the prediction, and in both."""

    num_gold: int
    num_pred: int
    num_correct: int

    @property
    def f1(self) -> int:
        """1 if the three counts are equal, else 0. Accuracy and recall have the same value."""
        return int(self.num_gold == self.num_pred == self.num_correct)


@dataclass(frozen=True)
class ExactMatch:
    """The verdict on a prediction, with its partial scores in the order of PARTS.

    A prediction that does not parse counts as a query without any clause.
    """

    is_match: bool
    is_parsed: bool
    parts: tuple[Part, ...]


_EMPTY_QUERY = Query(False, (), (), (), (), (), (), None, False, None, None, None)
_NOTHING_CORRECT = (Part(1, 1, 0),) * len(PARTS)


def exact_match(
    pred_sql: str,
    gold_sql: str,
    schema: Schema,
    *,
    compare_values: bool = False,
    compare_distinct: bool = False,
    is_official: bool = True,
) -> bool:
    """Whether the clauses are equal as sets. False if either text does not parse.

    Values and DISTINCT are ignored by default, as the official program does unless its source is
    changed. is_official: first make the official change to the prediction (`official_prediction`).
    """
    names = names_of(schema)
    pred_text = official_prediction(pred_sql) if is_official else pred_sql
    pred = normalized(pred_text, names, compare_values, compare_distinct)
    gold = normalized(gold_sql, names, compare_values, compare_distinct)
    if pred is None or gold is None:
        return False
    return pred == gold or _is_equal(gold, pred, _parts(gold, pred))


def match_clauses(
    pred_sql: str,
    gold_sql: str,
    schema: Schema,
    *,
    compare_values: bool = False,
    compare_distinct: bool = False,
) -> ExactMatch:
    """`exact_match` with its partial scores. Nothing matches a gold that does not parse."""
    names = names_of(schema)
    pred_text = official_prediction(pred_sql)
    pred = normalized(pred_text, names, compare_values, compare_distinct)
    gold = normalized(gold_sql, names, compare_values, compare_distinct)
    is_parsed = parse_sql(pred_text, schema) is not None
    if gold is None or (pred is None and is_parsed):
        return ExactMatch(False, is_parsed, _NOTHING_CORRECT)
    if pred is None:
        return ExactMatch(False, is_parsed, tuple(_parts(gold, _EMPTY_QUERY)))
    parts = tuple(_parts(gold, pred))
    return ExactMatch(_is_equal(gold, pred, parts), is_parsed, parts)


def _is_equal(gold: Query, pred: Query, parts: Iterable[Part]) -> bool:
    return all(part.f1 for part in parts) and _overlap(gold.tables, pred.tables).f1 == 1


def _parts(gold: Query, pred: Query) -> Iterator[Part]:
    """The partial scores in the order of PARTS.

    Each is computed when it is asked for, because most wrong predictions fail an early one.
    """
    yield _overlap(gold.select, pred.select)
    yield _overlap(_expressions(gold.select), _expressions(pred.select))

    gold_where = gold.where[::2]
    pred_where = pred.where[::2]
    yield _overlap(gold_where, pred_where)
    yield _overlap(_expressions(gold_where), _expressions(pred_where))

    gold_group = [use.column for use in gold.group_by]
    pred_group = [use.column for use in pred.group_by]
    yield _overlap([column.name for column in gold_group], [column.name for column in pred_group])
    is_same_group = gold_group == pred_group and gold.having == pred.having
    yield _all_or_nothing(gold_group, pred_group, is_same_group)

    is_same_order = gold.order_by == pred.order_by and gold.has_limit == pred.has_limit
    yield _all_or_nothing(gold.order_by, pred.order_by, is_same_order)

    yield _connectors_part(gold, pred)
    yield _arms_part(gold, pred)
    yield _overlap(_keywords(gold), _keywords(pred))


def _expressions(items: Sequence) -> list:
    """The expressions of SELECT items or conditions."""
    return [item.expression for item in items]


def _overlap(gold: Sequence | set, pred: Sequence | set) -> Part:
    """The sizes of two multisets and of their intersection."""
    if gold == pred:
        return Part(len(gold), len(gold), len(gold))
    unmatched = list(gold)
    for item in pred:
        if item in unmatched:
            unmatched.remove(item)
    return Part(len(gold), len(pred), len(gold) - len(unmatched))


def _all_or_nothing(gold: object, pred: object, is_same: bool) -> Part:
    """A clause as one element, which counts where the clause is not empty."""
    has_both = bool(gold and pred)
    return Part(bool(gold), bool(pred), has_both and is_same)


def _connectors_part(gold: Query, pred: Query) -> Part:
    """The score of AND and OR in WHERE. Quirk: the counts of both queries are swapped."""
    gold_words = set(gold.where[1::2])
    pred_words = set(pred.where[1::2])
    if gold_words == pred_words:
        return Part(1, 1, 1)
    return Part(num_gold=len(pred_words), num_pred=len(gold_words), num_correct=0)


def _arms_part(gold: Query, pred: Query) -> Part:
    """The score of INTERSECT, UNION and EXCEPT: an arm is correct if it is an exact match."""
    num_gold = num_pred = num_correct = 0
    for gold_arm, pred_arm in zip(gold.arms, pred.arms, strict=True):
        num_gold += gold_arm is not None
        num_pred += pred_arm is not None
        if gold_arm is not None and pred_arm is not None:
            num_correct += _is_equal(gold_arm, pred_arm, _parts(gold_arm, pred_arm))
    return Part(num_gold, num_pred, num_correct)


def _keywords(query: Query) -> set[str]:
    """The official keywords that the query uses."""
    words = set()
    if query.where:
        words.add("where")
    if query.group_by:
        words.add("group")
    if query.having:
        words.add("having")
    if query.order_by:
        words |= {"order", query.order_by.direction}
    if query.has_limit:
        words.add("limit")
    for operator, arm in zip(SET_OPERATORS, query.arms, strict=True):
        if arm:
            words.add(operator)
    for conditions in (query.on, query.where, query.having):
        if "or" in conditions[1::2]:
            words.add("or")
        for condition in conditions:
            if isinstance(condition, str):  # a connector
                continue
            if condition.is_negated:
                words.add("not")
            if condition.operator in ("in", "like"):
                words.add(condition.operator)
    return words
