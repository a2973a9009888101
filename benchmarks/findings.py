"""The findings of the paper in miniature: trains every model on the embedded world, and reports.

    python benchmarks/findings.py list                       # the steps and their states
    python benchmarks/findings.py run                        # hours; after a kill the same command
    python benchmarks/findings.py report                     # docs/findings/ from the finished runs
    python benchmarks/findings.py run --scale 0.02 --seeds [0] --folder runs/try    # minutes

`run` runs what is not finished. Ctrl-C stops it; the same command goes on from the checkpoints.
`report` reads the run folders, if there are any, and writes verdicts.jsonl.gz, runs.json, three
pages and three figures to `report_folder`. Without run folders it makes the pages and the figures
from the two files that are there, so anyone can compute the intervals again.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from findings_data import RUNS, VERDICTS, gather, read_runs, read_verdicts, write
from findings_report import write_report
from findings_run import Steps
from findings_steps import Sizes, plan
from rich.console import Console
from rich.table import Table

from mtsql.files import print_line
from mtsql.run.config import parse_config
from mtsql.run.screen import duration
from mtsql.run.signals import exit_code, name_of, stoppable

COMMANDS = ("list", "run", "report")


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
    words = list(words)
    command = words.pop(0) if words and not words[0].startswith("-") else ""
    flags = parse_config(Flags, words, __doc__)
    if command not in COMMANDS:
        raise ValueError(f"name a command first: {', '.join(COMMANDS)}; found {command!r}")
    steps = plan(flags.folder, flags.seeds, flags.sizes.scaled(flags.scale), flags.toy_folder)
    if command == "report":
        return report(flags, Steps(steps, Path(flags.folder), Path(flags.toy_folder)))
    states = Steps(steps, Path(flags.folder), Path(flags.toy_folder))
    if command == "list":
        show(states)
        return 0
    failed = states.run(flags.jobs, flags.threads)
    num_left = sum(not state.is_done for state in states.states.values())
    for step in failed:
        print_line(f"{step.key} failed: see {flags.folder}/{step.key}.log")
    print_line(f"{num_left} steps are not done" if num_left else "all steps are done")
    return 1 if num_left else 0


def show(steps: Steps) -> None:
    """Print the plan with states and times, and the commands."""
    table = Table("step", "needs", "state", box=None)
    for step in steps.steps:
        table.add_row(step.key, ", ".join(step.needs), steps.describe(step))
    Console().print(table)
    for step in steps.steps:
        print_line(shlex.join(steps.command(step)))
    secs = sum(state.secs for state in steps.states.values())
    left = steps.secs_left()
    rest = f", about {duration(left)} left" if left is not None else ""
    print_line(f"{duration(secs)} of one process so far{rest}")


def report(flags: Flags, steps: Steps) -> int:
    """Write the report, from the runs if any is finished and else from the files of an earlier
    report."""
    folder = Path(flags.report_folder)
    if any(state.is_done for state in steps.states.values()):
        verdicts, runs = gather(steps)
        write(verdicts, runs, folder)
    elif not (folder / VERDICTS).is_file():
        raise ValueError(
            f"neither {flags.folder} holds a finished step nor {folder} the files {VERDICTS} and "
            f"{RUNS}: run the steps first"
        )
    write_report(read_verdicts(folder / VERDICTS), read_runs(folder), folder, flags.resamples)
    print_line(f"{folder / 'README.md'} is written")
    return 0


if __name__ == "__main__":
    with stoppable():
        try:
            sys.exit(main(sys.argv[1:]))
        except ValueError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            print_line(f"{name_of(stop)}: the same command goes on")
            sys.exit(exit_code(stop))
