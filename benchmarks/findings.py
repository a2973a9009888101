"""The findings of the paper in miniature: trains every model on the embedded world, and reports.

    python benchmarks/findings.py list                       # the steps and their states
    python benchmarks/findings.py run                        # hours; after a kill the same command
    python benchmarks/findings.py report                     # docs/findings/ from the finished runs
    python benchmarks/findings.py run --scale 0.02 --seeds [0] --folder runs/try

`run` runs what is not finished. Ctrl-C stops it; the same command goes on from the checkpoints.
`report` reads the run folders, if an evaluation is finished, and writes verdicts.jsonl.gz,
runs.json, three pages and three figures to `report_folder`. A file notes.md there, written by hand,
comes into the first page. Seeds that only the two files there have are kept, so machines can run a
seed each, with the same flags and the same world. Without a finished evaluation it makes the pages
and the figures from the two files, so anyone can compute the intervals again. `list` and `report`
take the flags that `run` was given; the report of a try, or of other sizes, needs its own
`report_folder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import findings_command
from findings_data import (
    VERDICTS,
    gather,
    has_files,
    read_runs,
    read_verdicts,
    write,
)
from findings_merge import with_other_seeds
from findings_report import write_report
from findings_run import Steps
from findings_steps import Sizes, plan

from mtsql.files import print_line
from mtsql.run.config import parse_config

COMMANDS = findings_command.COMMANDS


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/findings.py, after the command: list, run or report."""

    folder: str = "runs/findings"
    """Folder of the runs."""
    report_folder: str = "docs/findings"
    """Folder of the report."""
    toy_folder: str = "data/toyworld"
    """Folder of the embedded world. It is written there once."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings. All of them see the same world."""
    jobs: int = 2
    """Steps that run at once."""
    threads: int = 1
    """Threads of a step."""
    scale: float = 1.0
    """Fraction of turns, updates and dialogues, to try the program."""
    sizes: Sizes = field(default_factory=Sizes)
    """How much each step does."""
    resamples: int = 2000
    """Resamples of an interval."""


def main(words: Sequence[str]) -> int:
    """Run a command. -> the exit code."""
    command, words = findings_command.split_command(words)
    flags = parse_config(Flags, words, __doc__)
    findings_command.require_command(command)
    plan_of_all = plan(flags.folder, flags.seeds, flags.sizes.scaled(flags.scale), flags.toy_folder)
    steps = Steps(plan_of_all, Path(flags.folder), Path(flags.toy_folder))
    if command == "list":
        findings_command.show(steps)
        return 0
    if command == "run":
        return findings_command.run_steps(steps, flags.jobs, flags.threads)
    report(flags, steps)
    return 0


def report(flags: Flags, steps: Steps) -> None:
    """Write the report, from the runs if an evaluation is finished and else from the files of an
    earlier report."""
    folder = Path(flags.report_folder)
    has_both = has_files(folder)
    size = other_size(flags.sizes)
    if findings_command.is_from_runs(flags, Flags.report_folder, steps, has_both, size):
        found = gather(steps)
        if has_both:
            found = with_other_seeds(*found, folder)
        write(*found, folder)
    write_report(read_verdicts(folder / VERDICTS), read_runs(folder), folder, flags.resamples)
    print_line(f"{folder / 'README.md'} is written")


def other_size(sizes: Sizes) -> str:
    """The first size that is not the default, in words; empty if all are."""
    for one in fields(Sizes):
        value = getattr(sizes, one.name)
        if value != one.default:
            return f"sizes.{one.name} is {value}, not {one.default}"
    return ""


if __name__ == "__main__":
    findings_command.start(main)
