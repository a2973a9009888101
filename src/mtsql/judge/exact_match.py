"""The official verdicts on a prediction: exact set match, partial scores, hardness; a clause F1 for rewards.

They are those of taoyds/test-suite-sql-eval with its default switches, quirks included: published figures
contain them. `execution_match`, the other official verdict, lives in execution.py and can be had from here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mtsql.judge.execution_match import execution_match, official_prediction
from mtsql.judge.sql_parser import (
    MAX_CACHED,
    SET_OPERATORS,
    ColumnName,
    ColumnUse,
    Condition,
    Conditions,
    Expression,
    Names,
    OrderBy,
    Query,
    SelectItem,
    Value,
    names_of,
    parse_sql,
)
from mtsql.sql.schema import Schema

__all__ = [
    "HARDNESS",
    "PARTS",
    "ExactMatch",
    "Part",
    "clause_f1",
    "compare",
    "exact_match",
    "execution_match",
    "hardness",
]

HARDNESS = ("easy", "medium", "hard", "extra")
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
    """A partial score: elements in the gold, in the prediction, and in both."""

    num_gold: int
    num_pred: int
    num_correct: int

    @property
    def f1(self) -> int:
        """All or nothing, and so are accuracy and recall."""
        return int(self.num_gold == self.num_pred == self.num_correct)


@dataclass(frozen=True)
class ExactMatch:
    """`parts` in the order of PARTS. A prediction that does not parse is a query with nothing in
    it."""

    is_match: bool
    is_parsed: bool
    parts: tuple[Part, ...]


def exact_match(
    pred_sql: str,
    gold_sql: str,
    schema: Schema,
    *,
    compare_values: bool = False,
    compare_distinct: bool = False,
    is_official: bool = True,
) -> bool:
    """Whether the clauses are equal as sets. False where either text does not parse.

    Values and DISTINCT are disregarded, as the official program does unless its source is changed.
    is_official: make the official change to the prediction first (`official_prediction`).
    """
    names = names_of(schema)
    pred_text = official_prediction(pred_sql) if is_official else pred_sql
    pred = _prepared(pred_text, names, compare_values, compare_distinct)
    gold = _prepared(gold_sql, names, compare_values, compare_distinct)
    return (
        pred is not None
        and gold is not None
        and (pred == gold or _is_equal(gold, pred, _parts(gold, pred)))
    )


def compare(
    pred_sql: str,
    gold_sql: str,
    schema: Schema,
    *,
    compare_values: bool = False,
    compare_distinct: bool = False,
) -> ExactMatch:
    """`exact_match` with its partial scores. A gold that does not parse matches nothing."""
    names = names_of(schema)
    pred_text = official_prediction(pred_sql)
    pred = _prepared(pred_text, names, compare_values, compare_distinct)
    gold = _prepared(gold_sql, names, compare_values, compare_distinct)
    is_parsed = parse_sql(pred_text, schema) is not None
    if gold is None or (pred is None and is_parsed):
        return ExactMatch(False, is_parsed, (Part(1, 1, 0),) * len(PARTS))
    parts = tuple(_parts(gold, _NOTHING if pred is None else pred))
    return ExactMatch(pred is not None and _is_equal(gold, pred, parts), is_parsed, parts)


_NOTHING = Query(False, (), (), (), (), (), (), None, False, None, None, None)


def _is_equal(gold: Query, pred: Query, parts: Iterable[Part]) -> bool:
    return all(part.f1 for part in parts) and _overlap(gold.tables, pred.tables).f1 == 1


def _parts(gold: Query, pred: Query) -> Iterator[Part]:
    """In the order of PARTS, each when it is asked for: most wrong predictions show early."""
    yield _overlap(gold.select, pred.select)
    yield _overlap(
        [item.expression for item in gold.select], [item.expression for item in pred.select]
    )
    gold_where, pred_where = gold.where[::2], pred.where[::2]
    yield _overlap(gold_where, pred_where)
    yield _overlap(
        [item.expression for item in gold_where], [item.expression for item in pred_where]
    )
    gold_group, pred_group = ([use.column for use in query.group_by] for query in (gold, pred))
    yield _overlap([column.name for column in gold_group], [column.name for column in pred_group])
    yield _both(gold_group, pred_group, gold_group == pred_group and gold.having == pred.having)
    is_same_order = gold.order_by == pred.order_by and gold.has_limit == pred.has_limit
    yield _both(gold.order_by, pred.order_by, is_same_order)
    gold_words, pred_words = set(gold.where[1::2]), set(pred.where[1::2])
    is_same = gold_words == pred_words
    yield (
        Part(1, 1, 1) if is_same else Part(len(pred_words), len(gold_words), 0)
    )  # quirk: totals are swapped
    yield _arms_part(gold, pred)
    yield _overlap(_keywords(gold), _keywords(pred))


def _overlap(gold: Sequence | set, pred: Sequence | set) -> Part:
    """Sizes of two multisets and of their intersection."""
    if gold == pred:
        return Part(len(gold), len(gold), len(gold))
    rest = list(gold)
    for item in pred:
        if item in rest:
            rest.remove(item)
    return Part(len(gold), len(pred), len(gold) - len(rest))


def _both(gold: object, pred: object, is_same: bool) -> Part:
    return Part(bool(gold), bool(pred), bool(gold and pred) and is_same)


def _arms_part(gold: Query, pred: Query) -> Part:
    num_gold = num_pred = num_correct = 0
    for gold_arm, pred_arm in zip(_arms(gold), _arms(pred), strict=True):
        num_gold += gold_arm is not None
        num_pred += pred_arm is not None
        if gold_arm is not None and pred_arm is not None:
            num_correct += _is_equal(gold_arm, pred_arm, _parts(gold_arm, pred_arm))
    return Part(num_gold, num_pred, num_correct)


def _arms(query: Query) -> tuple[Query | None, Query | None, Query | None]:
    return query.intersect, query.union, query.except_


def _keywords(query: Query) -> set[str]:
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
    words |= {word for word, arm in zip(SET_OPERATORS, _arms(query), strict=True) if arm}
    for conditions in (query.on, query.where, query.having):
        if "or" in conditions[1::2]:
            words.add("or")
        for condition in conditions[::2]:
            if condition.is_negated:
                words.add("not")
            if condition.operator in ("in", "like"):
                words.add(condition.operator)
    return words


# What is dropped before the comparison.


@lru_cache(maxsize=2 * MAX_CACHED)
def _prepared(text: str, names: Names, keeps_values: bool, keeps_distinct: bool) -> Query | None:
    """The query as it is compared. None if it does not parse, or if the official program dies of
    it."""
    query = parse_sql(text, names.schema)
    if query is None:
        return None
    # Quirk: the tables of the outermost FROM decide for the arms of set operators too.
    renames = {
        old: new for old, new in _representatives(names).items() if old.table in query.tables
    }
    try:
        return _Preparation(renames, keeps_values, keeps_distinct).outer(query)
    except _NoVerdict:
        return None


class _NoVerdict(Exception):
    """A connector was missing, so that a connector now stands where a condition should."""


@dataclass(frozen=True)
class _Preparation:
    """Drops literals and DISTINCT, and replaces columns by those that stand for their foreign-key
    groups."""

    renames: dict[ColumnName, ColumnName]
    keeps_values: bool
    keeps_distinct: bool

    def outer(self, query: Query) -> Query:
        """The outermost query, and the arms of its set operators."""
        order_by = query.order_by
        return Query(
            query.is_distinct and self.keeps_distinct,
            tuple(
                SelectItem(item.aggregate, self.expression(item.expression))
                for item in query.select
            ),
            query.tables,
            self.conditions(query.on),
            self.conditions(query.where, are_hashed=True),
            tuple(self.use(use) for use in query.group_by),
            self.conditions(query.having),
            order_by
            and OrderBy(order_by.direction, tuple(map(self.expression, order_by.expressions))),
            query.has_limit,
            *(arm and self.outer(arm) for arm in _arms(query)),
        )

    def nested(self, query: Query) -> Query:
        """A query in a condition loses its literals only. Quirk: one in FROM loses nothing."""
        return Query(
            query.is_distinct,
            query.select,
            query.tables,
            *(
                self.conditions(conditions, is_nested=True)
                for conditions in (query.on, query.where)
            ),
            query.group_by,
            self.conditions(query.having, is_nested=True),
            query.order_by,
            query.has_limit,
            *(arm and self.nested(arm) for arm in _arms(query)),
        )

    def conditions(
        self, conditions: Conditions, is_nested: bool = False, are_hashed: bool = False
    ) -> Conditions:
        prepared = list(conditions)
        for place, condition in enumerate(conditions):
            if place % 2 == 0:
                if isinstance(condition, str):
                    raise _NoVerdict
                expression = (
                    condition.expression if is_nested else self.expression(condition.expression)
                )
                values = self.value(condition.value), self.value(condition.high_value)
                prepared[place] = Condition(
                    condition.is_negated, condition.operator, expression, *values
                )
            elif (
                are_hashed
                and isinstance(condition, Condition)
                and isinstance(condition.value, Query)
            ):
                raise _NoVerdict
        return tuple(prepared)

    def value(self, value: Value) -> Value:
        if self.keeps_values:
            return value
        return self.nested(value) if isinstance(value, Query) else None

    def expression(self, expression: Expression) -> Expression:
        left = self.use(expression.left)
        right = expression.right and self.use(expression.right)
        if left is expression.left and right is expression.right:
            return expression
        return Expression(expression.sign, left, right)

    def use(self, use: ColumnUse) -> ColumnUse:
        column = self.renames.get(use.column, use.column)
        is_distinct = use.is_distinct and self.keeps_distinct
        if column is use.column and is_distinct == use.is_distinct:
            return use
        return ColumnUse(use.aggregate, column, is_distinct)


@lru_cache(maxsize=1024)
def _representatives(names: Names) -> dict[ColumnName, ColumnName]:
    """Foreign-key twin -> the first column of its group. Quirk: groups that meet later are not
    merged."""
    columns = [
        names.columns[t.name.lower()][c.name.lower()]
        for t in names.schema.tables
        for c in t.columns
    ]
    index_of = {column: index for index, column in reversed(list(enumerate(columns)))}
    groups: list[set[int]] = []
    for pair in names.schema.foreign_keys:
        ends = {index_of[names.columns[table.lower()][column.lower()]] for table, column in pair}
        group = next((group for group in groups if group & ends), None)
        if group is None:
            groups.append(ends)
        else:
            group |= ends
    return {columns[index]: columns[min(group)] for group in groups for index in group}


def hardness(gold_sql: str, schema: Schema) -> str | None:
    """One of HARDNESS, from the outermost query alone; None if the text does not parse."""
    query = parse_sql(gold_sql, schema)
    if query is None:
        return None
    lists = (query.on, query.where, query.having)
    conditions = [item for items in lists for item in items[::2] if isinstance(item, Condition)]
    num_clauses = sum(map(bool, (query.where, query.group_by, query.order_by, query.has_limit)))
    num_clauses += max(0, len(query.tables) - 1)
    num_clauses += sum(items[1::2].count("or") for items in lists)
    num_clauses += sum(condition.operator == "like" for condition in conditions)
    values = [
        value for condition in conditions for value in (condition.value, condition.high_value)
    ]
    num_nested = sum(isinstance(value, Query) for value in values)
    num_nested += sum(arm is not None for arm in _arms(query))
    # Quirk: negations, and connectors in HAVING, count as aggregates; real aggregates in conditions do not.
    num_aggregates = sum(item.aggregate != "none" for item in query.select)
    items = query.where[::2] + query.having
    num_aggregates += sum(isinstance(item, str) or item.is_negated for item in items)
    num_aggregates += sum(use.aggregate != "none" for use in query.group_by)
    if query.order_by:
        uses = [
            use for item in query.order_by.expressions for use in (item.left, item.right) if use
        ]
        num_aggregates += sum(use.aggregate != "none" for use in uses)
    num_others = (num_aggregates > 1) + sum(
        len(part) > 1 for part in (query.select, query.where, query.group_by)
    )
    if num_nested == 0:
        if num_clauses <= 1 and num_others == 0:
            return "easy"
        if (num_clauses <= 1 and num_others <= 2) or (num_clauses <= 2 and num_others < 2):
            return "medium"
        if (num_clauses <= 2 and num_others > 2) or (num_clauses == 3 and num_others <= 2):
            return "hard"
    return "hard" if num_nested == 1 and num_clauses <= 1 and num_others == 0 else "extra"


# Process rewards.


def clause_f1(pred_sql: str, gold_sql: str, schema: Schema, strict: bool = False) -> float:
    """How much of the gold's clauses a query has, in [0, 1]; 0 where either text does not parse.

    A mean over the clauses that are not empty in both queries (reward R_gen of the paper, section
    4.3 of our notes). Not strict: the F1 of their elements as sets, where DISTINCT, LIMIT and the
    connectors are elements too, and an arm of a set operator is judged by this same rule. strict: 1
    for an identical clause, else 0, as in the released code, so order counts. Values count in both;
    aliases never do.
    """
    pred, gold = parse_sql(pred_sql, schema), parse_sql(gold_sql, schema)
    return 0.0 if pred is None or gold is None else _mean_clause_score(pred, gold, strict)


def _mean_clause_score(pred: Query, gold: Query, strict: bool) -> float:
    scores = []
    clauses = _clauses if strict else _clause_elements
    for mine, wanted in zip(clauses(pred), clauses(gold), strict=True):
        if mine or wanted:
            score = (
                float(mine == wanted)
                if strict
                else 2 * len(mine & wanted) / (len(mine) + len(wanted))
            )
            scores.append(score)
    for mine, wanted in zip(_arms(pred), _arms(gold), strict=True):
        if mine and wanted:
            scores.append(
                float(mine == wanted) if strict else _mean_clause_score(mine, wanted, strict)
            )
        elif mine or wanted:
            scores.append(0.0)
    return (
        sum(scores) / len(scores) if scores else 0.0
    )  # `select from` parses: two queries of nothing


def _clauses(query: Query) -> tuple[object, ...]:
    """Empty where the text has no such clause; SELECT and FROM never are."""
    select, tables = (query.is_distinct, query.select), (query.tables, query.on)
    return (
        select,
        tables,
        query.where,
        query.group_by,
        query.having,
        query.order_by,
        query.has_limit,
    )


def _clause_elements(query: Query) -> tuple[set, ...]:
    order_by = query.order_by.expressions if query.order_by else ()
    return (
        {*query.select, *(("distinct",) if query.is_distinct else ())},
        {*query.tables, *query.on},
        set(query.where),
        set(query.group_by),
        set(query.having),
        {OrderBy(query.order_by.direction, (expression,)) for expression in order_by},
        {"limit"} if query.has_limit else set(),
    )
