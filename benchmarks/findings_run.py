"""Runs the steps of benchmarks/findings.py, several at once, and keeps what each of them took.

    <folder>/seed0/outcome/         the run folder of a step
    <folder>/seed0/outcome.log      what it has printed
    <folder>/seed0/outcome.json     its state: command, seconds, whether it is finished

A step whose state says that it is finished is not run again. One that was stopped or killed is
continued with --resume.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from findings_steps import ROOT, Step, flags_of, write_turns

from mtsql.files import print_line, read_json, write_text
from mtsql.run.launch import NOTHING_LEARNED
from mtsql.run.locks import RunLock
from mtsql.run.screen import duration

POLL_SECS = 0.2
LINE_SECS = 60.0
"""Seconds between two lines of progress."""
STOP_SECS = 120.0
"""Seconds that a stopped step has to write its checkpoint."""
PR_SET_PDEATHSIG = 1
LAUNCHER = ("-m", "accelerate.commands.launch")


def launched(step: Step) -> list[str]:
    """The words before the script, as a user types them."""
    if step.num_processes == 1:
        return ["python"]
    ranks = f"--num_processes={step.num_processes}"
    return ["accelerate", "launch", ranks, "--main_process_port=0"]  # 0: a free one


@dataclass
class State:
    """What is kept of a step. flags: those of its first start, without --run. secs: of all its
    processes. num_starts: how often it was started. exit_code: of its last process."""

    flags: list[str]
    secs: float = 0.0
    num_starts: int = 0
    is_done: bool = False
    exit_code: int | None = None


@dataclass
class Running:
    """A step that runs."""

    step: Step
    state: State
    process: subprocess.Popen[bytes]
    started: float
    """In seconds of time.monotonic()."""
    secs_before: float


class Steps:
    """The steps of a plan and their states in the folder. ValueError if a step was started with
    other flags than the plan has now.

    scripts: the folder of train_sft.py, train_rl.py and eval.py.
    """

    def __init__(
        self, steps: Sequence[Step], folder: Path, toy_folder: Path, scripts: Path = ROOT
    ) -> None:
        self.steps = list(steps)
        self.folder = folder
        self.toy_folder = toy_folder
        self.scripts = scripts
        self.states = {step.key: self._read(step) for step in self.steps}

    def run(self, num_jobs: int, threads: int) -> list[Step]:
        """Run what is not finished, `num_jobs` steps at once with `threads` threads each. -> the
        steps that failed. What depends on them is not run.

        At Ctrl-C, SIGTERM (a KeyboardInterrupt) and an error, the running steps are stopped first,
        each after it has written its checkpoint. ValueError if another process uses the folder, or
        if a file of a finished step cannot be read.
        """
        if num_jobs < 1 or threads < 1:
            raise ValueError("jobs and threads must be at least 1")
        failed: list[Step] = []
        running: list[Running] = []
        said = time.monotonic()
        with RunLock(self.folder, "folder"):
            self.states = {step.key: self._read(step) for step in self.steps}  # nobody else writes
            try:
                while True:
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        if not self._end(one):
                            failed.append(one.step)
                    while len(running) < num_jobs and (step := self._next(running, failed)):
                        running.append(self._start(step, threads))
                    if not running:
                        return failed
                    if time.monotonic() - said > LINE_SECS:
                        said = time.monotonic()
                        self._say(running)
                    time.sleep(POLL_SECS)
            finally:
                self._stop(running)

    def secs_left(self) -> float | None:
        """An estimate of the seconds of one process that the unfinished steps take: those of the
        same steps of other seeds. None if one of them was never finished."""
        known: dict[str, list[float]] = {}
        for step in self.steps:
            state = self.states[step.key]
            if state.is_done:
                known.setdefault(step.name, []).append(state.secs)
        left = 0.0
        for step in self.steps:
            state = self.states[step.key]
            if not state.is_done:
                if step.name not in known:
                    return None
                usual = sum(known[step.name]) / len(known[step.name])
                left += max(0.0, usual - state.secs)
        return left

    def describe(self, step: Step) -> str:
        """Its state in a word or two."""
        state = self.states[step.key]
        if state.is_done:
            return f"done in {duration(state.secs)}"
        if state.exit_code is not None and state.exit_code not in (130, 143, -15, -9):
            return f"failed after {duration(state.secs)}"
        return f"begun, {duration(state.secs)}" if state.num_starts else "to do"

    def command(self, step: Step) -> list[str]:
        """The words of its command, as a user types them. A flag that depends on steps that are not
        finished is described."""
        state = self.states[step.key]
        flags = state.flags
        if not flags:
            flags = [*step.flags, *([step.equal.describe()] if step.equal else [])]
        return [*launched(step), step.script, *flags, f"--run={self._run_folder(step)}"]

    def _run_folder(self, step: Step) -> Path:
        return self.folder / step.key

    def _file(self, step: Step, suffix: str) -> Path:
        return self.folder / f"{step.key}{suffix}"

    def _read(self, step: Step) -> State:
        file = self._file(step, ".json")
        if not file.is_file():
            return State([])
        values = read_json(file)
        try:
            state = State(**values)
            is_state = isinstance(state.flags, list) and isinstance(state.secs, int | float)
        except TypeError:
            is_state = False
        if not is_state:
            raise ValueError(
                f"{file}: not the state of a step: delete it, and {step.key} is continued"
            )
        fixed = state.flags[: len(step.flags)]
        if fixed != list(step.flags):
            now, before = next(
                (now, before)
                for now, before in zip([*step.flags, ""], [*fixed, ""], strict=False)
                if now != before
            )
            raise ValueError(
                f"folder {self.folder}: {step.key} was started with {before or 'fewer flags'} and "
                f"would be continued with {now or 'fewer flags'}: name another --folder"
            )
        return state

    def _write(self, step: Step) -> None:
        text = json.dumps(asdict(self.states[step.key]), indent=1)
        write_text(self._file(step, ".json"), f"{text}\n")

    def _next(self, running: list[Running], failed: list[Step]) -> Step | None:
        """The first step that can be started."""
        busy = {one.step.key for one in running} | {step.key for step in failed}
        for step in self.steps:
            if self.states[step.key].is_done or step.key in busy:
                continue
            needed = [f"seed{step.seed}/{name}" for name in step.needs]
            if all(self.states[key].is_done for key in needed):
                return step
        return None

    def _start(self, step: Step, threads: int) -> Running:
        state = self.states[step.key]
        if not state.flags:
            state.flags = flags_of(step, self.folder)
        write_turns(step, self.folder, self.toy_folder)
        run = self._run_folder(step)
        is_begun = (run / "config.yaml").is_file()
        if is_begun:  # if the runner was killed, its step may still be writing a checkpoint
            with RunLock(run, step.key, wait=True):
                pass
        # --run comes last: a recipe that comes later would win over it.
        words = [f"--resume={run}"] if is_begun else [*state.flags, f"--run={run}"]
        launcher = [*LAUNCHER, *launched(step)[2:]] if step.num_processes > 1 else []
        command = [sys.executable, *launcher, str(self.scripts / step.script), *words]
        self._file(step, ".log").parent.mkdir(parents=True, exist_ok=True)
        state.num_starts += 1
        state.exit_code = None
        self._write(step)
        with open(self._file(step, ".log"), "ab") as log:
            log.write(f"$ {shlex.join([*launched(step), step.script, *words])}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(threads),
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops it
                preexec_fn=_follow_parent,
            )
        print_line(f"{step.key}: {'continued' if is_begun else 'started'}")
        return Running(step, state, process, time.monotonic(), state.secs)

    def _end(self, one: Running) -> bool:
        """Keep how a process ended. -> whether its step is finished."""
        code = one.process.returncode
        state = one.state
        state.secs = round(one.secs_before + time.monotonic() - one.started, 3)
        state.exit_code = code
        state.is_done = code in (0, NOTHING_LEARNED)
        self._write(one.step)
        left = sum(not state.is_done for state in self.states.values())
        text = f"done in {duration(state.secs)}, {left} of {len(self.steps)} steps left"
        if code == NOTHING_LEARNED:
            text = f"nothing was learned, {text}"
        if not state.is_done:
            text = f"failed (exit code {code}): {self._last_line(one.step)}"
        print_line(f"{one.step.key}: {text}")
        return state.is_done

    def _stop(self, running: list[Running]) -> None:
        """Stop what runs. Each process writes a checkpoint and ends."""
        for one in running:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECS
        for one in running:
            try:
                one.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            self._keep_secs(one)
            one.state.exit_code = one.process.returncode
            one.state.is_done = one.process.returncode in (0, NOTHING_LEARNED)
            self._write(one.step)

    def _say(self, running: list[Running]) -> None:
        """A line about each running step. Its seconds are kept, in case this process is killed."""
        num_done = sum(state.is_done for state in self.states.values())
        left = self.secs_left()
        rest = f", about {duration(left)} of one process left" if left is not None else ""
        print_line(f"{num_done} of {len(self.steps)} steps done{rest}")
        for one in running:
            self._keep_secs(one)
            last = self._last_line(one.step)
            print_line(f"  {one.step.key} ({duration(one.state.secs)}): {last}")

    def _keep_secs(self, one: Running) -> None:
        one.state.secs = round(one.secs_before + time.monotonic() - one.started, 3)
        self._write(one.step)

    def _last_line(self, step: Step) -> str:
        with open(self._file(step, ".log"), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def environment(threads: int) -> dict[str, Any]:
    """The environment of a step: our sources, no network, so many threads."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _follow_parent() -> None:
    """Have the system send SIGTERM when the parent process ends, however it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
