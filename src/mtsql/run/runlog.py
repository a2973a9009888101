"""Write the log of a run: configuration, versions, metrics.jsonl, readable trajectories; and print
lines and progress on the screen.

If a file cannot be written, because the disk is full or the run folder was deleted, the WriteError
names it.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mtsql.files import (
    WriteError,
    append_line,
    has_half_character,
    print_line,
    read_rows,
    write_bytes,
    write_text,
)
from mtsql.run.commit import git_commit
from mtsql.run.config import save_config
from mtsql.run.recipes import in_a_line
from mtsql.run.screen import activity, wrapped
from mtsql.run.trackers import Row, tracked_numbers

PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")

KEPT = ("inputs.json", "gold.json", "checkpoints", "rounds", "probe", "model")
"""What a run keeps for its resumption. If another run in the same folder was resumed, it would take
these for its own."""
COPY_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a figure or a tracker that fails may raise. Both show what metrics.jsonl holds, so they must
not end a run."""


class NotFinite(ValueError):
    """A number of a metrics line is infinite or not a number, so further training is useless."""


class RunLog:
    """The log in a run folder. Only the main rank writes and prints; all ranks may call
    everything."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        is_main: bool = True,
        resume_at: tuple[int, int] | None = None,
        track: Callable[[dict[str, float], int | None], None] | None = None,
        track_table: Callable[[str, Sequence[str], Sequence[Row], int], None] | None = None,
    ) -> None:
        """ValueError if the folder already holds a run, because nothing is ever overwritten.

        `resume_at` is (update, bytes of metrics.jsonl) of the checkpoint of a resumed run. Lines
        after it are deleted, because their updates are repeated. `track(numbers, update)` gets the
        numbers of each new line, and `track_table(name, columns, rows, update)` each table.
        """
        self.folder = Path(folder)
        self.is_main = is_main
        self._track = track
        self._track_table = track_table
        self._tracker_failed = False
        self.rows: list[dict[str, Any]] = []
        """The lines of metrics.jsonl, on the main rank."""
        self._timings: dict[str, float] = {}  # seconds and memory by key
        self._last_row = time.perf_counter()
        if not is_main:
            return
        if resume_at is not None:
            self._continue(config, *resume_at)
            return
        check_free(self.folder)
        self._keep_config("config.yaml", config)
        self.write_json("versions.json", _provenance())
        with writing(self.metrics_file):
            self.metrics_file.touch()

    @property
    def metrics_file(self) -> Path:
        """metrics.jsonl in the run folder."""
        return self.folder / "metrics.jsonl"

    def _continue(self, config: Any, update: int, num_bytes: int) -> None:
        """Truncate metrics.jsonl to its first `num_bytes` and store the configuration and versions
        that the run continues with."""
        file = self.metrics_file
        with writing(file):
            file.touch()
            found = file.stat().st_size
            if found < num_bytes:
                raise ValueError(
                    f"{file} has {found} bytes, but the checkpoint was written after {num_bytes}"
                )
            os.truncate(file, num_bytes)
        self.rows = read_rows(file)
        self._keep_config(f"config-{update:05d}.yaml", config)
        self.write_json(f"versions-{update:05d}.json", _provenance())

    def _keep_config(self, name: str, config: Any) -> None:
        with writing(self.folder / name):
            save_config(config, self.folder / name)

    def print(self, text: str) -> None:
        """Print a text on the screen, on the main rank only. A long line is broken between
        words."""
        if self.is_main:
            print_line("\n".join(wrapped(line) for line in text.split("\n")))

    def metrics(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl with the time, the seconds since the last line and what the
        timers have measured since then. NotFinite for a number that is not finite."""
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        bad = [key for key, value in numbers.items() if not math.isfinite(value)]
        if bad:
            raise NotFinite(
                f"{', '.join(bad)} is not finite in {values.get('stage')} "
                f"update {values.get('update')}"
            )
        now = time.perf_counter()
        if self.is_main:
            timings = {name: round(secs, 3) for name, secs in self._timings.items()}
            wall = {"wall_secs": round(now - self._last_row, 3)}
            line = {"time": round(time.time(), 2), **values, **timings, **wall}
            with writing(self.metrics_file):
                append_line(self.metrics_file, json.dumps(line))
            self.rows.append(line)
            self._copy_to_trackers(line)
        self._timings = {}
        self._last_row = now

    def _copy_to_trackers(self, row: dict[str, Any]) -> None:
        """Give a row to the trackers. The first time that one of them fails, a warning says why."""
        if self._track is not None:
            with self._tracking("a row"):
                self._track(tracked_numbers(row), row.get("update"))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Row], update: int) -> None:
        """Give a table of an update to the trackers, on the main rank. Nothing else keeps it."""
        if self._track_table is not None and self.is_main and rows:
            with self._tracking("a table"):
                self._track_table(name, columns, rows, update)

    @contextmanager
    def _tracking(self, what: str) -> Iterator[None]:
        """A tracker that fails inside the `with` does not end the run."""
        try:
            yield
        except COPY_ERRORS as error:
            if not self._tracker_failed:
                reason = f"{type(error).__name__}: {in_a_line(error)}"
                self.print(f"warning: tracker: {what} was not logged, the run goes on ({reason})")
            self._tracker_failed = True

    def total(self, name: str) -> float:
        """The sum of a value over all lines of metrics.jsonl that have it, on the main rank."""
        return sum(row.get(name) or 0 for row in self.rows)

    @contextmanager
    def work(
        self, name: str, title: str, unit: str = "episodes", has_lines: bool = True
    ) -> Iterator[Callable[[int, int], None]]:
        """Time what goes on inside the `with` (see `timer`) and show it (see `activity` in
        screen.py)."""
        with self.timer(name), activity(title, self.is_main, unit, has_lines) as show:
            yield show

    def secs(self, name: str) -> float:
        """The seconds of a timer since the last line of metrics.jsonl."""
        return self._timings.get(f"{name}_secs", 0.0)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """The seconds spent inside the `with` are in the next metrics line as `<name>_secs`, and
        the memory that it needed as `<name>_peak_memory_mb` (see `peak_memory_mb`)."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        secs, peak = f"{name}_secs", f"{name}_peak_memory_mb"
        self._timings[secs] = self._timings.get(secs, 0.0) + time.perf_counter() - start
        self._timings[peak] = max(self._timings.get(peak, 0.0), peak_memory_mb())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the run folder."""
        if self.is_main:
            self._write(self.folder / name, json.dumps(value, indent=1) + "\n")

    def _write(self, path: Path, content: str | bytes) -> None:
        if not self.folder.is_dir():  # it is not made again, because its metrics are lost
            raise WriteError(f"{path}: cannot be written: the run folder was deleted")
        if isinstance(content, bytes):
            write_bytes(path, content)
        else:
            write_text(path, content)

    def trajectories(self, name: str, content: str | bytes) -> None:
        """Write a file of trajectories: as text for a reader, or compressed records."""
        if self.is_main:
            self._write(self.folder / "trajectories" / name, content)


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn an error inside the `with` that means that the file `what` cannot be written into a
    WriteError that names the file."""
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        # The library that writes tokenizers reports a full disk as an error of the class Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            reason = getattr(error, "strerror", None) or str(error)
            raise WriteError(f"{what}: cannot be written: {reason}") from error


def check_free(folder: Path, can_resume: bool = True) -> None:
    """Create the folder of a new run. ValueError if it already holds a run, with or without its
    log, or cannot be created, or if no model can be written there because its name is not UTF-8.
    """
    if has_half_character(str(folder)):
        raise ValueError(f"run {str(folder)!a}: the name is not UTF-8; is LANG a UTF-8 locale?")
    if (folder / "metrics.jsonl").exists():
        advice = f", or --resume {folder}" if can_resume else " or remove it"
        raise ValueError(f"run {folder} already holds a run: name a new folder with --run{advice}")
    left = [name for name in KEPT if (folder / name).exists()]
    if left:
        raise ValueError(
            f"run {folder} holds {left[0]} of a run whose metrics.jsonl was deleted: name a new "
            "folder with --run or remove it"
        )
    make_folder(folder, "run")


def make_folder(folder: Path, what: str) -> None:
    """Create a folder if there is none. ValueError that begins with `what` (the flag) if it cannot
    be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} {folder}: cannot create this folder: {error.strerror}") from error


def peak_memory_mb() -> float:
    """In MiB: on a GPU the most memory of tensors since the statistics were reset, otherwise the
    most resident memory of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**10 if sys.platform != "darwin" else kib / 2**20  # macOS counts bytes


def _provenance() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        **{p: version(p) for p in PACKAGES},
        "git": git_commit(),
        "command": sys.argv,
    }
