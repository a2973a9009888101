"""Exact set match: equal to the official program's verdicts where these are known, else worked out
by hand from its rules."""

from pathlib import Path

import pytest

from helpers.official import SHOWS, all_golds, conformance_pairs, table_rows
from mtsql.judge.exact_match import PARTS, exact_match, match_clauses
from mtsql.judge.execution_match import official_prediction
from mtsql.judge.sql_parser import parse_sql
from mtsql.sql.schema import Column, Schema, Table, load_schemas


@pytest.fixture(scope="module")
def schemas(shared: Path) -> dict[str, Schema]:
    return load_schemas(shared / "data" / "tables.json")


def em(pred: str, gold: str, **switches: bool) -> bool:
    return exact_match(pred, gold, SHOWS, **switches)


def test_verdicts_and_partial_scores_are_the_official_ones(
    shared: Path, schemas: dict[str, Schema]
) -> None:
    wrong = []
    for pair in conformance_pairs(shared):
        match = match_clauses(pair["pred"], pair["gold"], schemas[pair["db_id"]])
        found = {
            "em": int(match.is_match),
            "parsed": match.is_parsed,
            "partial": "".join(str(part.f1) for part in match.parts),
        }
        wrong += [(pair["id"], key, value) for key, value in found.items() if value != pair[key]]
    assert wrong == []


@pytest.mark.parametrize("row", table_rows("official_verdicts.tsv"), ids=lambda row: row["what"])
def test_each_rule_gives_the_official_verdict(
    row: dict[str, str], schemas: dict[str, Schema]
) -> None:
    match = match_clauses(row["pred"], row["gold"], schemas[row["db_id"]])
    assert (int(match.is_match), int(match.is_parsed)) == (int(row["em"]), int(row["parsed"]))


def test_gold_queries_match_themselves_unless_they_contain_value(
    shared: Path, schemas: dict[str, Schema]
) -> None:
    golds = all_golds(shared)
    unparseable = [sql for db_id, sql in golds if parse_sql(sql, schemas[db_id]) is None]
    assert len(unparseable) == 1 and "Third_Party_Companies" in unparseable[0]
    failing = [sql for db_id, sql in golds if not exact_match(sql, sql, schemas[db_id])]
    failing_but_parsed = [sql for sql in failing if sql not in unparseable]
    assert failing_but_parsed
    assert all(official_prediction(sql) != sql for sql in failing_but_parsed)


def test_literals_count_with_compare_values_only() -> None:
    gold = "SELECT count(DISTINCT name) FROM singer WHERE age > 30"
    pred = gold.replace("30", "40")
    assert em(pred, gold)
    assert not em(pred, gold, compare_values=True)


def test_distinct_counts_with_compare_distinct_only() -> None:
    gold = "SELECT count(DISTINCT name) FROM singer WHERE age > 30"
    pred = gold.replace("DISTINCT ", "")
    assert em(pred, gold)
    assert not em(pred, gold, compare_distinct=True)
    assert em(gold, gold, compare_values=True, compare_distinct=True)


def test_each_partial_score_counts_its_elements() -> None:
    gold = (
        "SELECT name , max(age) FROM singer WHERE age > 1 AND name = 'a' "
        "GROUP BY name ORDER BY age LIMIT 3"
    )
    pred = (
        "SELECT name , min(age) FROM singer WHERE age < 1 OR name = 'b' "
        "GROUP BY singer.name ORDER BY age"
    )
    parts = match_clauses(pred, gold, SHOWS).parts
    counts = [(part.num_gold, part.num_pred, part.num_correct) for part in parts]
    assert dict(zip(PARTS, counts, strict=True)) == {
        "select": (2, 2, 1),
        "select(no AGG)": (2, 2, 2),
        "where": (2, 2, 1),
        "where(no OP)": (2, 2, 2),
        "group(no Having)": (1, 1, 1),
        "group": (1, 1, 1),
        "order": (1, 1, 0),
        "and/or": (1, 1, 0),
        "IUEN": (0, 0, 0),
        "keywords": (5, 5, 4),
    }
    assert [part.f1 for part in parts] == [0, 1, 0, 1, 1, 1, 0, 0, 1, 0]


def test_the_and_or_score_has_gold_and_prediction_swapped() -> None:
    gold = "SELECT name FROM singer WHERE age > 1 AND age < 3 OR name = 'a'"
    pred = "SELECT name FROM singer WHERE age > 1"
    part = match_clauses(pred, gold, SHOWS).parts[PARTS.index("and/or")]
    assert (part.num_gold, part.num_pred, part.num_correct) == (0, 2, 0)


def test_an_unparseable_prediction_counts_as_a_query_without_clauses() -> None:
    match = match_clauses("no query", "SELECT name FROM singer", SHOWS)
    assert (match.is_match, match.is_parsed) == (False, False)
    assert "".join(str(part.f1) for part in match.parts) == "0011111111"


def test_nothing_matches_an_unparseable_gold() -> None:
    assert not em("SELECT name FROM singer", "SELECT name FROM nowhere")


@pytest.mark.parametrize(
    "text",
    [
        # A connector stands in the place of a condition.
        "SELECT name FROM singer WHERE age > 1 age < 2 AND age = 3",
        # A sub-query stands in the place of a connector.
        "SELECT name FROM singer WHERE age > 1 age IN (SELECT age FROM singer)",
    ],
)
def test_a_text_on_which_the_official_program_crashes_matches_nothing(text: str) -> None:
    assert parse_sql(text, SHOWS) is not None
    assert not em(text, text)


def test_foreign_key_groups_that_a_later_pair_connects_are_not_merged() -> None:
    tables = tuple(Table(name, (Column("x", "number"),)) for name in "abcd")
    keys = ((("b", "x"), ("a", "x")), (("d", "x"), ("c", "x")), (("c", "x"), ("a", "x")))
    schema = Schema("keys", tables, keys)

    def same(one: str, other: str) -> bool:
        text = "SELECT {}.x FROM a JOIN b JOIN c JOIN d"
        return exact_match(text.format(one), text.format(other), schema)

    # {b, a} is the first group and takes the third pair too: {a, b, c}. {d, c} stays, and since it
    # comes later, it decides for c.
    assert same("a", "b")
    assert same("c", "d")
    assert not same("a", "c")
