"""The official Spider / SParC / CoSQL verdicts: exact set match, execution match, hardness, partial scores.

Rules are those of the official test-suite evaluator with its default options (values and DISTINCT disregarded in exact
match, DISTINCT removed before execution), quirks included, because published figures contain them. What is mended: every
query runs in the sandbox, so a predicted DROP TABLE or an endless query is simply wrong.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import sqlparse
import sqlparse.engine

from mtsql.sql.database import QueryLimits, run_query
from mtsql.sql.parse import Col, ColUnit, Cond, Query, ValUnit, parse_sql
from mtsql.sql.schema import Schema

PARTS = ("select", "select(no AGG)", "where", "where(no OP)", "group(no Having)", "group", "order", "and/or", "IUEN",
         "keywords")  # fmt: skip
EMPTY = Query(select=(), distinct=False, tables=())


@dataclass(frozen=True)
class Part:
    """A partial score: how many elements gold and prediction have, and how many agree."""

    gold: int
    pred: int
    correct: int

    @property
    def f1(self) -> int:
        """1 if everything agrees, else 0 (the official partial scores are all or nothing)."""
        return int(self.gold == self.pred == self.correct)


# --- exact set match -------------------------------------------------------------------------------------------------


def exact_match(pred: str, gold: str, schema: Schema) -> bool:
    """Exact set match of two query texts. ValueError if the gold cannot be parsed."""
    result = compare(pred, gold, schema)
    return all(part.f1 for part in result[0].values()) and result[1]


def compare(pred: str, gold: str, schema: Schema) -> tuple[dict[str, Part], bool]:
    """(the ten partial scores by name, whether the FROM tables agree). An unparseable prediction is an empty query."""
    gold_query = _prepared(gold, schema)
    if gold_query is None:
        raise ValueError(f"{schema.db_id}: the gold query cannot be parsed: {gold}")
    pred_query = _prepared(pred.replace("value", "1"), schema) or EMPTY
    if any(_is_broken(query) for query in (gold_query, pred_query)):
        return {name: Part(1, 1, 0) for name in PARTS}, False
    return partial_scores(pred_query, gold_query), _same_tables(pred_query, gold_query)


def partial_scores(pred: Query, gold: Query) -> dict[str, Part]:
    """The ten partial scores of two prepared queries."""

    def overlap(of) -> Part:
        a, b = Counter(of(gold)), Counter(of(pred))
        return Part(a.total(), b.total(), (a & b).total())

    def both(has, same) -> Part:
        return Part(int(has(gold)), int(has(pred)), int(has(gold) and has(pred) and same))

    connectors = [set(q.where[1::2]) for q in (gold, pred)]
    arms = [(gold.arms()[name], pred.arms()[name]) for name in gold.arms()]
    return {
        "select": overlap(lambda q: q.select),
        "select(no AGG)": overlap(lambda q: [unit for _, unit in q.select]),
        "where": overlap(lambda q: q.where[::2]),
        "where(no OP)": overlap(lambda q: [c.unit for c in q.where[::2]]),
        "group(no Having)": overlap(lambda q: [unit.col[1] for unit in q.group]),
        "group": both(lambda q: bool(q.group), _columns(gold) == _columns(pred) and gold.having == pred.having),
        "order": both(
            lambda q: bool(q.order),
            (gold.order, gold.direction, gold.limit) == (pred.order, pred.direction, pred.limit),
        ),
        "and/or": Part(1, 1, 1) if connectors[0] == connectors[1] else Part(len(connectors[1]), len(connectors[0]), 0),
        "IUEN": Part(
            sum(g is not None for g, _ in arms),
            sum(p is not None for _, p in arms),
            sum(g is not None and p is not None and _same(p, g) for g, p in arms),
        ),
        "keywords": overlap(_keywords),
    }


def _same(pred: Query, gold: Query) -> bool:
    return all(p.f1 for p in partial_scores(pred, gold).values()) and _same_tables(pred, gold)


def _same_tables(pred: Query, gold: Query) -> bool:
    return Counter(pred.tables) == Counter(gold.tables)


def _columns(query: Query) -> list[Col]:
    return [unit.col for unit in query.group]


def _is_broken(query: Query) -> bool:
    """Conditions without a connector that leave a connector in a condition's place: the official program dies."""
    lists = (query.on, query.where, query.having)
    if any(isinstance(element, str) for conds in lists for element in conds[::2]):
        return True
    return any(isinstance(e, Cond) and (isinstance(e.value, Query) or isinstance(e.value2, Query))
               for conds in lists for e in conds[1::2])  # fmt: skip


def _keywords(query: Query) -> set[str]:
    """The query's keywords, as the official `keywords` part counts them."""
    words = {name for name, arm in query.arms().items() if arm is not None}
    words |= {word for word in ("where", "group", "having", "limit") if getattr(query, word)}
    if query.order:
        words |= {"order", query.direction}
    lists = (query.on, query.where, query.having)
    conds = [c for conds in lists for c in conds[::2] if isinstance(c, Cond)]
    words |= {"or"} & {e for conds in lists for e in conds[1::2] if isinstance(e, str)}
    words |= {"not" for c in conds if c.negated} | ({"in", "like"} & {c.op for c in conds})
    return words


# --- what is dropped before the comparison ---------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def _prepared(text: str, schema: Schema) -> Query | None:
    """The parsed query without literals, without DISTINCT, with columns led back through foreign keys."""
    query = parse_sql(text, schema)
    if query is None:
        return None
    return _merged(_without_values(query), _foreign_key_map(schema), frozenset(t for t in query.tables if t.__class__ is str))


def _without_values(query: Query) -> Query:
    """Literals and column values become None in conditions, nested queries in them included; not inside FROM."""

    def value(v):
        return _without_values(v) if isinstance(v, Query) else None

    def conds(elements):
        return tuple(
            replace(e, value=value(e.value), value2=value(e.value2)) if i % 2 == 0 and isinstance(e, Cond) else e
            for i, e in enumerate(elements)
        )

    return replace(
        query, on=conds(query.on), where=conds(query.where), having=conds(query.having),
        **{("except_" if n == "except" else n): a and _without_values(a) for n, a in query.arms().items()},
    )  # fmt: skip


def _merged(query: Query, twins: dict[Col, Col], tables: frozenset[str]) -> Query:
    """Drop DISTINCT and replace foreign-key twins, in the outermost query and its arms. `tables` are those of the
    outermost FROM, for the arms too (quirk)."""

    def col(unit: ColUnit | None) -> ColUnit | None:
        if unit is None:
            return None
        target = twins.get(unit.col, unit.col) if unit.col[0] in tables else unit.col
        return ColUnit(unit.agg, target, False)

    def val(unit: ValUnit) -> ValUnit:
        return ValUnit(unit.op, col(unit.left), col(unit.right))

    def conds(elements):
        return tuple(
            replace(e, unit=val(e.unit)) if i % 2 == 0 and isinstance(e, Cond) else e for i, e in enumerate(elements)
        )

    return replace(
        query,
        select=tuple((agg, val(unit)) for agg, unit in query.select),
        distinct=False,
        on=conds(query.on),
        where=conds(query.where),
        group=tuple(col(unit) for unit in query.group),
        having=conds(query.having),
        order=tuple(val(unit) for unit in query.order),
        **{("except_" if n == "except" else n): a and _merged(a, twins, tables) for n, a in query.arms().items()},
    )


@lru_cache(maxsize=512)
def _foreign_key_map(schema: Schema) -> dict[Col, Col]:
    """Column -> the first column of its foreign-key group; groups are never merged, a later group wins."""
    order = {(t.name.lower(), c.name.lower()): i for i, (t, c) in
             enumerate((t, c) for t in schema.tables for c in t.columns)}  # fmt: skip
    groups: list[list[Col]] = []
    for pair in schema.foreign_keys:
        ends = [(table.lower(), column.lower()) for table, column in pair]
        group = next((g for g in groups if ends[0] in g or ends[1] in g), None)
        if group is None:
            groups.append(ends)
        else:
            group += ends
    twins: dict[Col, Col] = {}
    for group in groups:
        first = min(group, key=order.__getitem__)
        twins.update((member, first) for member in group)
    return twins


# --- hardness --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def hardness(gold: str, schema: Schema) -> str | None:
    """easy, medium, hard or extra, by component counts of the outermost query. None if it cannot be parsed."""
    query = parse_sql(gold, schema)
    if query is None:
        return None
    lists = (query.on, query.where, query.having)
    conds = [c for elements in lists for c in elements[::2] if isinstance(c, Cond)]
    c1 = sum(map(bool, (query.where, query.group, query.order, query.limit)))
    c1 += max(0, len(query.tables) - 1)
    c1 += sum(e == "or" for elements in lists for e in elements[1::2]) + sum(c.op == "like" for c in conds)
    c2 = sum(isinstance(v, Query) for c in conds for v in (c.value, c.value2))
    c2 += sum(arm is not None for arm in query.arms().values())
    aggs = sum(agg != "none" for agg, _ in query.select)
    aggs += sum(c.negated for c in query.where[::2] if isinstance(c, Cond))
    aggs += sum(unit.agg != "none" for unit in query.group)
    aggs += sum(u.agg != "none" for unit in query.order for u in (unit.left, unit.right) if u is not None)
    aggs += sum(not isinstance(e, Cond) or e.negated for e in query.having)
    others = (aggs > 1) + (len(query.select) > 1) + (len(query.where) > 1) + (len(query.group) > 1)
    if c1 <= 1 and others == 0 and c2 == 0:
        return "easy"
    if c2 == 0 and ((others <= 2 and c1 <= 1) or (c1 <= 2 and others < 2)):
        return "medium"
    if (others > 2 and c1 <= 2 and c2 == 0) or (2 < c1 <= 3 and others <= 2 and c2 == 0):
        return "hard"
    return "hard" if c1 <= 1 and others == 0 and c2 <= 1 else "extra"


# --- execution match -------------------------------------------------------------------------------------------------


def execution_match(
    pred: str, gold: str, db_path: Path, *, limits: QueryLimits = QueryLimits(), keep_distinct: bool = False
) -> bool:
    """Whether both queries run and their results agree: as ordered lists if the gold text says "order by", else as
    multisets, under some permutation of the prediction's columns."""
    gold_text = _runnable(gold, keep_distinct)
    gold_result = _cached_run(Path(db_path), Path(db_path).stat().st_mtime_ns, gold_text, limits)
    if not gold_result.is_ok:
        return False
    pred_result = run_query(db_path, _runnable(pred.replace("value", "1"), keep_distinct), limits)
    return pred_result.is_ok and results_equal(pred_result.rows, gold_result.rows, "order by" in gold_text.lower())


@lru_cache(maxsize=1024)
def _cached_run(db_path: Path, version: int, sql: str, limits: QueryLimits):
    return run_query(db_path, sql, limits)


@lru_cache(maxsize=8192)
def _runnable(sql: str, keep_distinct: bool) -> str:
    """The text that is run: split operators joined, DISTINCT removed, only the first statement, CURDATE fixed."""
    for op in ("> =", "< =", "! ="):
        sql = sql.replace(op, op.replace(" ", ""))
    if not keep_distinct and ("distinct" in sql.lower() or ";" in sql):
        statements = list(sqlparse.engine.FilterStack().run(sql))  # tokens only: no grouping, no depth limit
        tokens = statements[0].flatten() if statements else ()
        sql = "".join(token.value for token in tokens if token.value.lower() != "distinct")
    return re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)", "2020", sql, flags=re.IGNORECASE)


def results_equal(pred: tuple[tuple, ...], gold: tuple[tuple, ...], ordered: bool) -> bool:
    """Whether one permutation of the prediction's columns makes the results equal. Cells compare as Python values."""
    if not pred and not gold:
        return True
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False
    # The official pre-check sorts each row's cells by text and type; it can refuse 1 against 1.0 (quirk).
    shapes = [[tuple(sorted(row, key=lambda x: str(x) + str(type(x)))) for row in rows] for rows in (pred, gold)]
    if shapes[0] != shapes[1] if ordered else set(shapes[0]) != set(shapes[1]):
        return False
    collect = tuple if ordered else Counter
    columns = [[collect(column) for column in zip(*rows, strict=True)] for rows in (pred, gold)]
    choices = [[j for j, column in enumerate(columns[0]) if column == wanted] for wanted in columns[1]]
    if ordered:  # equal columns are interchangeable: any one-to-one choice will do
        return _permutation(choices, lambda chosen: True)
    wanted = [Counter(row[: k + 1] for row in gold) for k in range(len(gold[0]))]
    return _permutation(
        choices, lambda chosen: Counter(tuple(row[j] for j in chosen) for row in pred) == wanted[len(chosen) - 1]
    )


def _permutation(choices: list[list[int]], fits, chosen: tuple[int, ...] = ()) -> bool:
    """Whether every gold column can be given its own prediction column; `fits` judges each partial choice."""
    if len(chosen) == len(choices):
        return True
    return any(
        fits((*chosen, j)) and _permutation(choices, fits, (*chosen, j))
        for j in choices[len(chosen)]
        if j not in chosen
    )


# --- clause F1, for process rewards ----------------------------------------------------------------------------------


def clause_f1(pred: str, gold: str, schema: Schema, strict: bool = False) -> float:
    """Mean agreement over the clauses that either query has, in [0, 1]; 0 if the prediction cannot be parsed.

    strict: a clause counts only if it is identical, values and order included (released code). Otherwise the F1 of its
    elements as sets, values ignored (paper section 4.3).
    """
    prepare = parse_sql if strict else _prepared
    queries = prepare(pred, schema), prepare(gold, schema)
    if None in queries:
        return 0.0
    scores = []
    for a, b in zip(*map(_clauses, queries), strict=True):
        if a or b:
            common = (Counter(a) & Counter(b)).total()
            scores.append(float(a == b) if strict else 2 * common / (len(a) + len(b)))
    return sum(scores) / len(scores)


def _clauses(query: Query) -> list[tuple]:
    """The ten clauses as tuples of elements."""
    order = (*query.order, query.direction) if query.order else ()
    limit = ("limit",) if query.limit else ()
    arms = [(arm,) if arm is not None else () for arm in query.arms().values()]
    return [query.select, query.tables + query.on, query.where, query.group, query.having, order, limit, *arms]
