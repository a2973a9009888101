"""Hardness is the official level."""

from pathlib import Path

import pytest

from helpers.official import SHOWS, conformance_pairs, table_rows
from mtsql.judge.hardness import hardness
from mtsql.sql.schema import Schema, load_schemas


@pytest.fixture(scope="module")
def schemas(shared: Path) -> dict[str, Schema]:
    return load_schemas(shared / "data" / "tables.json")


def test_levels_of_the_examples_are_the_official_ones(
    shared: Path, schemas: dict[str, Schema]
) -> None:
    for pair in conformance_pairs(shared):
        assert hardness(pair["gold"], schemas[pair["db_id"]]) == pair["hardness"], pair["id"]
    for row in table_rows("official_verdicts.tsv"):
        assert hardness(row["gold"], schemas[row["db_id"]]) == row["hardness"], row["what"]


@pytest.mark.parametrize("row", table_rows("official_hardness.tsv"), ids=lambda row: row["gold"])
def test_each_rule_gives_the_official_level(
    row: dict[str, str], schemas: dict[str, Schema]
) -> None:
    assert hardness(row["gold"], schemas["concert_singer"]) == row["hardness"]


def test_a_text_that_does_not_parse_has_no_level() -> None:
    assert hardness("SELECT name FROM nowhere", SHOWS) is None
