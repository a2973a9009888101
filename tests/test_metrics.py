import json

import pytest

from mtsql.sql.metrics import PARTS, clause_f1, compare, exact_match, execution_match, hardness, results_equal
from mtsql.sql.parse import parse_sql
from mtsql.sql.schema import Column, Schema, Table, load_schemas

SCHEMA = Schema("toy", (Table("t", (Column("a", "number"), Column("b", "text"))), Table("u", (Column("a", "number"),))))


def test_official_verdicts(shared):
    """300 pairs with the verdicts of the official evaluator, partial scores included."""
    schemas = load_schemas(shared / "data" / "tables.json")
    lines = (shared / "conformance" / "metrics_examples.jsonl").read_text().splitlines()
    for e in map(json.loads, lines):
        schema = schemas[e["db_id"]]
        parts = compare(e["pred"], e["gold"], schema)[0]
        assert exact_match(e["pred"], e["gold"], schema) == bool(e["em"]), e["id"]
        assert execution_match(e["pred"], e["gold"], shared / "data" / e["db"]) == bool(e["ex"]), e["id"]
        assert hardness(e["gold"], schema) == e["hardness"], e["id"]
        assert (parse_sql(e["pred"].replace("value", "1"), schema) is not None) == e["parsed"], e["id"]
        assert "".join(str(parts[name].f1) for name in PARTS) == e["partial"], e["id"]


def test_every_dev_gold_matches_itself(shared):
    schemas = load_schemas(shared / "data" / "tables.json")
    for name in ("sparc", "cosql"):
        for line in (shared / "data" / name / "dev_gold.txt").read_text().splitlines():
            if line.strip():
                sql, db_id = line.split("\t")
                assert exact_match(sql, sql, schemas[db_id.strip()]), sql


@pytest.mark.parametrize(
    ("pred", "gold", "same"),
    [
        ("SELECT a , b FROM t", "SELECT b , a FROM t", True),
        ("SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'y'", True),  # values are disregarded
        ("SELECT a FROM t WHERE a > 1 OR a < 3", "SELECT a FROM t WHERE a > 1 AND a < 3", False),
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a ASC", True),
        ("SELECT a FROM t ORDER BY a LIMIT 3", "SELECT a FROM t ORDER BY a", False),
        ("SELECT a FROM t WHERE a=3", "SELECT a FROM t WHERE a = 3", False),  # one glued token: unparseable
        ("SELECT a FROM t ) whatever", "SELECT a FROM t", True),  # text after a query is ignored
    ],
)
def test_exact_match(pred, gold, same):
    assert exact_match(pred, gold, SCHEMA) is same


def test_results_compare_as_the_official_evaluator_does():
    assert results_equal(((1, "x"), (2, "y")), (("y", 2), ("x", 1)), ordered=False)
    assert not results_equal(((1,), (2,)), ((2,), (1,)), ordered=True)
    assert not results_equal(((1,), (1,), (2,)), ((1,), (2,), (2,)), ordered=False)
    assert not results_equal(((1, 10),), ((1.0, 10),), ordered=False)  # the pre-check's quirk
    assert results_equal(((1,),), ((1.0,),), ordered=False)
    wide = tuple(tuple(i % 3 for _ in range(12)) for i in range(50))
    assert results_equal(wide, wide[::-1], ordered=False)


def test_clause_f1_by_hand():
    gold = "SELECT a FROM t WHERE a > 1 AND b = 'x'"
    # select 1, from 1, where: 1 of 2 and 1 (one condition, no connector): 2 * 1 / (1 + 3)
    assert clause_f1("SELECT a FROM t WHERE a > 1", gold, SCHEMA) == pytest.approx((1 + 1 + 0.5) / 3)
    assert clause_f1("SELECT a FROM t WHERE a > 1", gold, SCHEMA, strict=True) == pytest.approx(2 / 3)
    assert clause_f1("not sql", gold, SCHEMA) == 0.0
    assert clause_f1(gold, gold, SCHEMA, strict=True) == 1.0
