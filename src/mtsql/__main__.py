"""The command `mtsql`, also `python -m mtsql`."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

from mtsql.files import fault_of_name, in_one_line, prepare_output, print_line, print_page
from mtsql.run.signals import exit_code, ignore_stops, name_of, stoppable

COMMANDS = {
    "audit": "look at a data set, and at what the reward pays, before training",
    "score": "score a file of predictions by the official rules (EX and EM)",
    "plots": "draw the figures of the paper from runs and evaluations",
    "runs": "list the runs in a folder: scores, hours, what differs",
    "compare": "compare two evaluations turn by turn, with intervals",
    "view": "write a page to look at the trajectories of one run or two",
    "schema": "write the tables.json of database files",
    "plan": "say whether a recipe fits on GPUs, and how long it takes",
    "chat": "talk to a model about a database, in the terminal or the browser",
    "demos": "write demonstrations made from gold SQL, for a cold start",
    "measure": "find out which settings are fastest on this machine",
    "env": "print the versions and the hardware, for a bug report",
}
"""Each sub-command, in one line. The module of the same name in `mtsql/commands/` runs it; it is
imported only then, so that a command that needs no torch starts at once."""
HELP = ("-h", "--help")


def main(words: Sequence[str] | None = None) -> None:
    """Run the sub-command that the first word names (default: the words of the command line).

    Exit codes: 0; 1 for the user's mistakes (ValueError), in one line; 130 for Ctrl-C and 143 for
    SIGTERM.
    """
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if words is None:
        sys.argv[0] = f"mtsql {name}"  # what the parsers call the program in their help
    with stoppable():
        try:
            prepare_output()
            if name in HELP:
                print_page(_help())
            elif name == "--version":
                print_line(f"mtsql {version('mtsql')}")
            else:
                _run(name, rest)
        except ValueError as error:
            text = in_one_line(f"error: {error}")
            raise SystemExit(text.encode("utf-8", "backslashreplace").decode()) from error
        except OSError as error:
            fault = fault_of_name(error)
            if fault is None:
                raise
            raise SystemExit(f"error: {fault}") from error
        except KeyboardInterrupt as stop:
            ignore_stops()
            print(name_of(stop), file=sys.stderr, flush=True)
            raise SystemExit(exit_code(stop)) from None


def _run(name: str, words: list[str]) -> None:
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown command {name}{hint}; mtsql --help lists all")
    try:
        command = importlib.import_module(f"mtsql.commands.{name}")
    except ModuleNotFoundError as error:
        reason = f"needs the package {error.name}, which is not installed"
        raise ValueError(f"mtsql {name} {reason}") from error
    command.main(words)


def _help() -> str:
    lines = [f"  {name:<8}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mtsql COMMAND ...",
            "",
            "Tools for multi-turn text-to-SQL data and runs. The trainer itself is the",
            "scripts train_sft.py, train_rl.py and eval.py of the repository.",
            "",
            "commands:",
            *lines,
            "",
            "mtsql COMMAND --help explains a command. mtsql --version prints the version.",
        ]
    )


if __name__ == "__main__":
    main()
