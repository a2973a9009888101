"""What a run leaves behind: config, versions, metrics.jsonl, readable trajectories, and lines on
the screen.

What cannot be written ends in a WriteError that names the file: a full disk, a run folder that is
gone.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError

from mtsql.files import WriteError, print_line, read_lines, write_text
from mtsql.run.config import config_diff, save_config

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")


class NotFinite(ValueError):
    """A number of a metrics line is infinite or no number: training on is worthless."""


class RunLog:
    """A run folder. Only the main rank writes and prints; every rank may call everything."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        is_main: bool = True,
        resume_at: tuple[int, int] | None = None,
    ):
        """ValueError if the folder already holds a run: nothing is ever overwritten. A resumed run
        gives (update, bytes of metrics.jsonl) of its checkpoint: the lines of the updates to be
        done again are cut off."""
        self.folder, self.is_main = Path(folder), is_main
        self._timings: dict[str, float] = {}
        if not is_main:
            return
        if resume_at is not None:
            self._go_on(config, *resume_at)
            return
        check_free(self.folder)
        self._keep_config("config.yaml", config)
        self.write_json("versions.json", _provenance())
        self.print(f"run {folder}; " + _not_default(config))
        with writing(file := self.folder / "metrics.jsonl"):
            file.touch()

    def _go_on(self, config: Any, update: int, num_bytes: int) -> None:
        """Cut metrics.jsonl back to its first `num_bytes` and note what goes on with what."""
        with writing(file := self.folder / "metrics.jsonl"):
            file.touch()
            if (found := file.stat().st_size) < num_bytes:
                raise ValueError(
                    f"{file} has {found} bytes, but the checkpoint was written after {num_bytes}"
                )
            os.truncate(file, num_bytes)
        self._keep_config(f"config-{update:05d}.yaml", config)
        self.write_json(f"versions-{update:05d}.json", _provenance())
        self.print(f"run {self.folder} goes on after {update} updates; " + _not_default(config))

    def _keep_config(self, name: str, config: Any) -> None:
        with writing(self.folder / name):
            save_config(config, self.folder / name)

    def print(self, text: str) -> None:
        """A line on the screen."""
        if self.is_main:
            print_line(text)

    def metrics(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl with the time and the stage timers since the last one. NotFinite
        for a number that is not finite."""
        bad = [
            key
            for key, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if bad:
            raise NotFinite(
                f"{', '.join(bad)} is not finite in {values.get('stage')} "
                f"update {values.get('update')}"
            )
        if self.is_main:
            line = {
                "time": round(time.time(), 2),
                **values,
                **{k: round(v, 3) for k, v in self._timings.items()},
            }
            with writing(file := self.folder / "metrics.jsonl"):
                _append(file, json.dumps(line) + "\n")
        self._timings = {}

    def total(self, name: str) -> float:
        """The sum of a value over all lines of metrics.jsonl that have it."""
        lines = map(json.loads, read_lines(self.folder / "metrics.jsonl"))
        return sum(line.get(name) or 0 for line in lines)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Seconds spent inside go to the next metrics line as `<name>_secs`."""
        start = time.perf_counter()
        yield
        self._timings[f"{name}_secs"] = (
            self._timings.get(f"{name}_secs", 0.0) + time.perf_counter() - start
        )

    def progress(self, items: Iterable, name: str) -> Iterator:
        """Iterate with a progress bar (a terminal), or a line now and then (a file)."""
        items = list(items)
        if not self.is_main:
            yield from items
        elif sys.stdout.isatty():
            with Progress(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ) as bar:
                yield from bar.track(items, description=name)
        else:
            start, every = time.perf_counter(), max(1, len(items) // 10)
            for number, item in enumerate(items, 1):
                yield item
                if number % every == 0 or number == len(items):
                    self.print(f"{name} {number}/{len(items)}  {time.perf_counter() - start:.0f} s")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the run folder."""
        if self.is_main:
            self._write(self.folder / name, json.dumps(value, indent=1) + "\n")

    def _write(self, path: Path, text: str) -> None:
        if not self.folder.is_dir():  # not made again: without its metrics it would be no run
            raise WriteError(f"{path}: cannot be written: the run folder is gone")
        write_text(path, text)

    def trajectories(self, update: int, records: list[dict], num_each: int = 2) -> None:
        """Keep an update's best and worst trajectories as readable text."""
        if not self.is_main or not records:
            return
        ranked = sorted(records, key=lambda record: -record["reward"])
        picked = [("best", r) for r in ranked[:num_each]] + [
            ("worst", r) for r in ranked[-num_each:]
        ]
        path = self.folder / "trajectories" / f"update-{update:05d}.txt"
        blocks = []
        for name, r in picked:
            parts = " ".join(f"{k}={v:.2f}" for k, v in r["components"].items())
            blocks.append(
                f"=== {name}: turn {r['turn_id']} reward {r['reward']:.3f} ({parts}) {r['outcome']}\n"
                f"gold: {r['gold_sql']}\n{r['transcript']}\n"
            )
        text = "\n".join(blocks).encode(
            "utf-8", "backslashreplace"
        )  # a reply may be no text at all
        self._write(path, text.decode("utf-8"))


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """What fails inside the `with` because `what` (a file) cannot be written is raised as a
    WriteError that names it."""
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        # The library that writes tokenizers reports a full disk as an error of the class Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            reason = getattr(error, "strerror", None) or str(error)
            raise WriteError(f"{what}: cannot be written: {reason}") from error


def _append(file: Path, line: str) -> None:
    """Add a line to a file that is there: the whole of it or, where that fails, nothing."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        size, rest = os.fstat(handle).st_size, line.encode()
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def check_free(folder: Path, can_resume: bool = True) -> None:
    """Make the folder of a new run. ValueError if it holds a run already, or cannot be made."""
    if (folder / "metrics.jsonl").exists():
        advice = f", or --resume {folder}" if can_resume else " or remove it"
        raise ValueError(f"run {folder} already holds a run: name a new folder with --run{advice}")
    make_folder(folder, "run")


def make_folder(folder: Path, what: str) -> None:
    """Make a folder if it is not there. ValueError that begins with `what` (the flag) if it cannot
    be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} {folder}: cannot be made a folder: {error.strerror}") from error


def _not_default(config: Any) -> str:
    diff = config_diff(config, type(config)())
    return "not default: " + (", ".join(f"{k}={v}" for k, v in diff.items()) or "nothing")


def _provenance() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        **{p: version(p) for p in PACKAGES},
        "git": git_commit(),
        "command": sys.argv,
    }


def git_commit(package: Path = PACKAGE) -> str:
    """The commit of the repository that this program is part of, with a mark if it has changes.

    "unknown" without git, and for a program that is in no repository, as an installed one: where
    the run was started, or what the environment says about a repository, does not matter.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # not the repository around a site-packages
        return git("rev-parse", "HEAD") + (" (changed)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
