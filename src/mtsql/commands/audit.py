"""Look at a data set before training on it.

    mtsql audit                                         # the embedded world
    mtsql audit --data.train train.json --data.dev dev.json \\
        --data.tables tables.json --data.databases database \\
        --run runs/audit-sparc

The audit finds gold queries that cannot be judged, correct answers that the
reward does not pay, and wrong answers that it pays. It prints the worst cases
and writes audit.json (every case) and leave_out.tsv (turn id and reason) to
the run folder. With --data.leave_out runs/audit-sparc/leave_out.tsv, a
training leaves those turns out. What a gold query or an attack earns is
computed by the reward itself, with the limits of env.query.

--rewritings also answers with other texts of each gold query that mean the
same. --farming makes no audit. It prints what policies that understand nothing
earn, beside honest ones.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from mtsql.audit.checks import audit
from mtsql.audit.config import Config
from mtsql.audit.farming import farm, show_farming
from mtsql.audit.report import CHECKS, leave_out_lines, show
from mtsql.commands.arguments import spelled_out
from mtsql.files import printing, write_text
from mtsql.run.config import parse_config, to_dict
from mtsql.run.locks import RunLock
from mtsql.sql.datasets import describe_skipped, load_split
from mtsql.sql.dialogues import Corpus
from mtsql.sql.held_out import require_whole
from mtsql.sql.worker_pool import set_num_workers

FILE_WIDTH = 140
"""Width of the tables, in characters, if the output is not a terminal."""


def main(words: Sequence[str]) -> None:
    """Load the split that the flags name, check it, print the tables, write the files."""
    look(parse_config(Config, spelled_out(words, Config), __doc__))


def look(config: Config) -> None:
    """Do what the configuration says. ValueError if the run folder already holds the result."""
    folder = Path(config.run)
    with RunLock(folder):
        file = folder / ("farming.json" if config.farming else "audit.json")
        if file.exists():
            raise ValueError(
                f"run {folder} already holds an audit ({file.name}): "
                "name another folder or remove it"
            )
        _look(config, file)


def _look(config: Config, file: Path) -> None:
    set_num_workers(config.env.num_sql_workers)
    require_whole(config.data, "mtsql audit")
    corpus = load_split(config.data, config.split)
    corpus = replace(corpus, dialogues=corpus.dialogues[: config.max_dialogues or None])
    width = None if sys.stdout.isatty() else FILE_WIDTH
    # Ids and gold queries may hold any text, so brackets in them must not be read as markup.
    console = Console(width=width, markup=False, emoji=False)
    if skipped := describe_skipped(corpus):
        with printing():
            console.print(f"{config.split}: {skipped}")
    if config.farming:
        _farm(corpus, config, file, console)
    else:
        _audit(corpus, config, file, console)


def _audit(corpus: Corpus, config: Config, file: Path, console: Console) -> None:
    report = audit(corpus, config)
    lines = leave_out_lines(report, config.leave_out)
    left_out = file.with_name("leave_out.tsv")
    try:
        with printing():
            show(report, config.split, config.rewritings, console)
    finally:  # a report that cannot be printed can still be written
        counts = {"checks": CHECKS, "skipped": len(corpus.skipped)}
        _write(file, {"config": to_dict(config), **counts, **asdict(report)})
        write_text(left_out, "".join(f"{line}\n" for line in lines))
    with printing():
        console.print(f"{len(lines)} turns in {left_out}; every case in {file}")


def _farm(corpus: Corpus, config: Config, file: Path, console: Console) -> None:
    report = farm(corpus, config)
    try:
        with printing():
            show_farming(report, config.split, console)
    finally:
        _write(file, {"config": to_dict(config), **asdict(report)})
    with printing():
        console.print(f"written to {file}")


def _write(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=1) + "\n")
