"""The command line that benchmarks/findings.py and benchmarks/real.py share: list, run and report
of a plan of steps."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from findings_run import Steps
from rich.console import Console
from rich.table import Table

from mtsql.files import print_line
from mtsql.run.screen import duration
from mtsql.run.signals import exit_code, name_of, stoppable

COMMANDS = ("list", "run", "report")


class ReportFlags(Protocol):
    """The flags of a report."""

    @property
    def report_folder(self) -> str: ...

    @property
    def scale(self) -> float: ...

    @property
    def resamples(self) -> int: ...


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """-> (the command, empty if there is none; the flags)."""
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    return "", list(words)


def require_command(command: str) -> None:
    """ValueError for an unknown command. Called after the flags are read, so that --help works."""
    if command not in COMMANDS:
        found = f"; found {command}" if command else ""
        raise ValueError(f"name a command first: {', '.join(COMMANDS)}{found}")


def run_steps(steps: Steps, num_jobs: int, threads: int) -> int:
    """Run what is not finished, and say what is left. -> the exit code."""
    failed = steps.run(num_jobs, threads)
    for step in failed:
        print_line(f"{step.key} failed: see {steps.folder / step.key}.log")
    num_left = sum(not state.is_done for state in steps.states.values())
    print_line(f"{num_left} steps are not done" if num_left else "all steps are done")
    return 1 if num_left else 0


def show(steps: Steps) -> None:
    """Print the plan with states and times, and the commands of the first seed."""
    table = Table("step", "needs", "state", box=None)
    for step in steps.steps:
        table.add_row(step.key, ", ".join(step.needs), steps.describe(step))
    Console().print(table)
    first = steps.steps[0].seed
    print_line(f"\nThe commands of seed {first}:")
    for step in steps.steps:
        if step.seed == first:
            print_line(shlex.join(steps.command(step)))
    secs = sum(state.secs for state in steps.states.values())
    left = steps.secs_left()
    rest = f", about {duration(left)} left" if left is not None else ""
    print_line(f"\n{duration(secs)} so far{rest}, if the steps run one after another")


def is_from_runs(
    flags: ReportFlags, usual_folder: str, steps: Steps, has_files: bool, other_size: str = ""
) -> bool:
    """Whether a report is made from the runs, of which an evaluation is finished; else from the
    files of an earlier report. Prints which.

    usual_folder: the default of report_folder. has_files: whether the files of an earlier report
    are there. other_size: what is not as in the whole experiment, besides the scale. ValueError if
    there is neither, for a number of resamples below 1, and if the report of a try would replace
    that of the whole experiment.
    """
    if flags.resamples < 1:
        raise ValueError(f"resamples is {flags.resamples}: it must be at least 1")
    reason = f"scale is {flags.scale:g}" if flags.scale < 1 else other_size
    if reason and Path(flags.report_folder).resolve() == Path(usual_folder).resolve():
        raise ValueError(
            f"{reason}: the report of a try would replace the one in {flags.report_folder}: name "
            "another --report_folder"
        )
    evaluations = [step for step in steps.steps if step.script == "eval.py"]
    num_done = sum(steps.states[step.key].is_done for step in evaluations)
    if num_done:
        print_line(f"from {num_done} of {len(evaluations)} evaluations in {steps.folder}")
        return True
    if not has_files:
        raise ValueError(
            f"neither folder {steps.folder} has a finished evaluation nor report_folder "
            f"{flags.report_folder} the files of a report: run the steps first"
        )
    print_line(
        f"{steps.folder} has no finished evaluation: from the files in {flags.report_folder}"
    )
    return False


def start(main: Callable[[Sequence[str]], int]) -> None:
    """Call `main` with the words of the command line and leave with its exit code. A mistake of
    the user is one line, and a signal says how to go on."""
    with stoppable():
        try:
            sys.exit(main(sys.argv[1:]))
        except ValueError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            print_line(f"{name_of(stop)}: the same command goes on")
            sys.exit(exit_code(stop))
