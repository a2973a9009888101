"""Rewritings of the golds of real data: each returns the gold's rows, and the reward pays it."""

import random
from dataclasses import replace

import pytest

from mtsql.agent.env import EnvConfig
from mtsql.audit.config import Config
from mtsql.audit.golds import audit
from mtsql.audit.rewritings import REWRITINGS
from mtsql.sql.datasets import DataConfig, load_split
from mtsql.sql.dialogues import Corpus

PAID_SHARE = 0.98
"""Of the golds of real data that have a kind of rewriting, so many at least must be paid for it."""
NUM_DIALOGUES = 60
"""Of each file that the slow test looks at."""
MIN_TRIED = 20
"""A kind that fewer golds have is not judged by its share."""


@pytest.fixture(scope="module")
def report(shared):
    """The audit of a sample of each file's dialogues, rewritings included."""
    reports = {}
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
            reports[f"{name} {split}"] = audit(corpus, config)
    return reports


def _sample(corpus: Corpus) -> Corpus:
    dialogues = random.Random(0).sample(corpus.dialogues, NUM_DIALOGUES)
    return replace(corpus, dialogues=dialogues)


@pytest.mark.slow
def test_rewritings_of_real_golds_return_their_rows(report):
    for name, found in report.items():
        # A sub-query that runs once for each row may be too slow for the limits; nothing else.
        wrong = [c for c in found.rewritings_set_aside if ": timeout: " not in c.detail]
        assert wrong == [], name


@pytest.mark.slow
def test_rewritings_of_real_golds_are_paid(report):
    shares = {}
    for kind in REWRITINGS:
        tallies = [found.rewritings[kind] for found in report.values()]
        num_turns = sum(tally.num_turns for tally in tallies)
        if num_turns >= MIN_TRIED:
            shares[kind] = sum(tally.num_paid_ex for tally in tallies) / num_turns
    assert len(shares) >= 10
    assert {kind: share for kind, share in shares.items() if share < PAID_SHARE} == {}
