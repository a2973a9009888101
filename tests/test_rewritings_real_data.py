"""Rewritings of real gold queries return their rows, and the reward pays them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from mtsql.agent.env import EnvConfig
from mtsql.audit.checks import audit
from mtsql.audit.config import Config
from mtsql.audit.report import Report
from mtsql.audit.rewritings import REWRITINGS
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.dialogues import Corpus

PAID_SHARE = 0.98
"""Least share of paid rewritings, for each kind."""
NUM_DIALOGUES = 60
"""Number of dialogues that are sampled from each file."""
MIN_TRIED = 20
"""The share of a kind counts if at least this many gold queries have it."""


@pytest.fixture(scope="module")
def reports(shared: Path) -> dict[str, Report]:
    """The audit of a sample of each file's dialogues, with rewritings."""
    found = {}
    data = shared / "data"
    for name in ("sparc", "cosql"):
        for split in ("train", "dev"):
            files = DataConfig(
                train=str(data / name / "train.json"),
                dev=str(data / name / "dev.json"),
                tables=str(data / "tables.json"),
                databases=str(data / "database"),
            )
            corpus = _sample(load_split(files, split))
            config = Config(data=files, rewritings=True, env=EnvConfig(num_sql_workers=1))
            found[f"{name} {split}"] = audit(corpus, config)
    return found


def _sample(corpus: Corpus) -> Corpus:
    dialogues = random.Random(0).sample(corpus.dialogues, NUM_DIALOGUES)
    return replace(corpus, dialogues=dialogues)


@pytest.mark.slow
def test_rewritings_of_real_gold_queries_return_their_rows(reports: dict[str, Report]) -> None:
    for name, report in reports.items():
        # A sub-query that runs once for each row may be too slow for the limits. Nothing else may
        # go wrong.
        set_aside = report.rewritings_set_aside
        assert [case for case in set_aside if ": timeout: " not in case.detail] == [], name


@pytest.mark.slow
def test_rewritings_of_real_gold_queries_are_paid(reports: dict[str, Report]) -> None:
    shares = {}
    for kind in REWRITINGS:
        tallies = [report.rewritings[kind] for report in reports.values()]
        num_turns = sum(tally.num_turns for tally in tallies)
        if num_turns >= MIN_TRIED:
            shares[kind] = sum(tally.num_paid_ex for tally in tallies) / num_turns
    assert len(shares) >= 10
    assert {kind: share for kind, share in shares.items() if share < PAID_SHARE} == {}
