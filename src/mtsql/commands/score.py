"""Score files in the official format and print the official tables.

    mtsql score --gold dev_gold.txt --pred predictions.sql \\
        --tables tables.json --databases database

EX and EM are those of the official test-suite evaluator. No model is needed.
For BIRD, use its predictions (.json), --ex set and --etype exec: its SQL is
outside of the grammar that EM can parse.
A blank line ends an interaction in both files. Several folders of databases
are given as --databases ONE TWO, and a switch as --keep_distinct alone.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line, write_text
from mtsql.judge.execution_match import OFFICIAL_LIMITS
from mtsql.judge.official_scorer import format_report
from mtsql.judge.score_files import ScorerConfig, score_files
from mtsql.run.config import parse_config
from mtsql.sql.dialogues import ExRule
from mtsql.sql.sandbox import QueryConfig
from mtsql.sql.worker_pool import set_num_workers


@dataclass(frozen=True)
class Config:
    """Flags of mtsql score."""

    gold: str
    """File of the gold queries: `SQL<TAB>database id` a line."""
    pred: str
    """File of the predictions: one SQL a line."""
    tables: str
    """The official tables.json."""
    databases: tuple[str, ...]
    """One or more folders with <id>/<id>.sqlite."""
    etype: Literal["all", "match", "exec"] = "all"
    """Scores to compute: exact match, execution, or both."""
    ex: ExRule = "official"
    """Execution: how results are compared. set: as BIRD's evaluator does, as sets of rows."""
    keep_distinct: bool = False
    """Execution: leave DISTINCT in the queries that run."""
    plug_value: bool = False
    """Execution: also try the gold's literals in the prediction."""
    compare_values: bool = False
    """Exact match: compare literals."""
    compare_distinct: bool = False
    """Exact match: compare DISTINCT of columns."""
    official_zip: bool = False
    """Truncate the longer of two interactions without an error, as the official program does."""
    threads: int = os.cpu_count() or 1
    """Number of queries that run at a time."""
    max_steps: int = OFFICIAL_LIMITS.max_vm_steps
    """Limit of a query, in steps of SQLite's virtual machine."""
    json: str | None = None
    """File to write figures and verdicts to."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        _limits(self.max_steps)
        self.options()

    def options(self) -> ScorerConfig:
        """How to score. ValueError for flags that do not go together."""
        return ScorerConfig(
            etype=self.etype,
            ex=self.ex,
            keep_distinct=self.keep_distinct,
            plug_value=self.plug_value,
            compare_values=self.compare_values,
            compare_distinct=self.compare_distinct,
            is_official_zip=self.official_zip,
            num_threads=self.threads,
            limits=_limits(self.max_steps),
        )


def main(words: Sequence[str]) -> None:
    """Score the files that the flags name, print the tables, and write the JSON file."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if config.etype != "match":
        for folder in config.databases:
            if not Path(folder).is_dir():
                raise ValueError(f"--databases {folder}: no such folder")
    if config.json and Path(config.json).is_dir():
        raise ValueError(f"--json {config.json}: a folder stands there, name a file")
    set_num_workers(config.threads)
    databases = [Path(folder) for folder in config.databases]
    files = Path(config.gold), Path(config.pred), Path(config.tables)
    report = score_files(*files, databases, config.options())
    if config.json:
        write_text(Path(config.json), json.dumps(asdict(report), indent=1) + "\n")
    print_line(format_report(report))


def _limits(max_steps: int) -> QueryConfig:
    try:
        return replace(OFFICIAL_LIMITS, max_vm_steps=max_steps)
    except ValueError as error:
        raise ValueError(str(error).replace("env.query.max_vm_steps", "max_steps")) from error
