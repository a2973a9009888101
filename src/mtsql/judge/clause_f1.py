"""A process reward that runs no query: how much of the gold query's clauses another query has."""

from mtsql.judge.sql_parser import parse_sql
from mtsql.judge.sql_query import OrderBy, Query, SelectItem
from mtsql.sql.schema import Schema


def clause_f1(pred_sql: str, gold_sql: str, schema: Schema, strict: bool = False) -> float:
    """Compare a query with the gold clause by clause: 0 to 1, and 0 if either does not parse.

    The score is a mean over the clauses that at least one of the two queries has (R_gen in the
    paper). By default the score of a clause is the F1 of its elements as sets. DISTINCT,
    LIMIT and the connectors are elements too, and an arm of a set operator is scored by the same
    rule. strict: 1 for an identical clause, else 0, as in the released code, so order counts.
    Values count in both ways; aliases never do.
    """
    pred = parse_sql(pred_sql, schema)
    gold = parse_sql(gold_sql, schema)
    if pred is None or gold is None:
        return 0.0
    scores = _strict_scores(pred, gold) if strict else _f1_scores(pred, gold)
    return _mean(scores)


def _mean(scores: list[float]) -> float:
    """The mean; 0 for no scores, since `select from` parses to a query without clauses."""
    return sum(scores) / len(scores) if scores else 0.0


def _f1_scores(pred: Query, gold: Query) -> list[float]:
    """The F1 of each clause that is not empty in both queries."""
    scores = []
    for pred_set, gold_set in zip(_clause_sets(pred), _clause_sets(gold), strict=True):
        if pred_set or gold_set:
            scores.append(2 * len(pred_set & gold_set) / (len(pred_set) + len(gold_set)))
    for pred_arm, gold_arm in zip(pred.arms, gold.arms, strict=True):
        if pred_arm and gold_arm:
            scores.append(_mean(_f1_scores(pred_arm, gold_arm)))
        elif pred_arm or gold_arm:
            scores.append(0.0)
    return scores


def _strict_scores(pred: Query, gold: Query) -> list[float]:
    """1 or 0 for each clause that is not empty in both queries."""
    pairs = [*zip(_clauses(pred), _clauses(gold), strict=True)]
    pairs += zip(pred.arms, gold.arms, strict=True)
    return [float(of_pred == of_gold) for of_pred, of_gold in pairs if of_pred or of_gold]


def _clauses(query: Query) -> tuple[object, ...]:
    """Each clause as one value; empty if the text has no such clause. SELECT and FROM never are."""
    return (
        (query.is_distinct, query.select),
        (query.tables, query.on),
        query.where,
        query.group_by,
        query.having,
        query.order_by,
        query.has_limit,
    )


def _clause_sets(query: Query) -> tuple[set, ...]:
    """Each clause as the set of its elements.

    `SELECT DISTINCT a ... WHERE b > 1 AND c = 2` gives {a, "distinct"} and {b > 1, "and", c = 2}.
    """
    select: set[SelectItem | str] = set(query.select)
    if query.is_distinct:
        select.add("distinct")
    order_by = set()
    if query.order_by:
        direction = query.order_by.direction
        order_by = {OrderBy(direction, (item,)) for item in query.order_by.expressions}
    return (
        select,
        {*query.tables, *query.on},
        set(query.where),
        set(query.group_by),
        set(query.having),
        order_by,
        {"limit"} if query.has_limit else set(),
    )
