"""The verdicts and figures that the report of benchmarks/findings.py is made from.

    verdicts.jsonl.gz     a line for each turn, model and seed: `Verdict`, without what is null
    runs.json             what was run and how long it took; machine and versions of each seed

`gather` reads them from the run folders, `read_verdicts` and `read_runs` from these files.
"""

import gzip
import json
import os
import platform
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from findings_run import Steps
from findings_steps import Step, flops_of

from mtsql.files import parse_json, read_json, read_rows, write_text
from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, BAD_STARTS
from mtsql.rl.evaluate import dialogue_of
from mtsql.run.runlog import writing
from mtsql.sql.runnable import folded

VERDICTS, RUNS = "verdicts.jsonl.gz", "runs.json"
ABILITIES = tuple(ABILITY_DEFINITIONS)
ALONG = "process"
"""The training that is evaluated along its run."""


Kinds = dict[str, tuple[type, ...]]
"""Key -> the types that its value may have."""
NUMBER = (int, float)
ORIGIN_KINDS: Kinds = {"seed": (int,), "machine": (dict,), "versions": (dict,)}
STEP_KINDS: Kinds = {
    "seed": (int,),
    "name": (str,),
    "command": (list,),
    "is_done": (bool,),
    "secs": NUMBER,
}
MORE_KINDS: Kinds = {"flops": NUMBER, "optimizer_steps": (int,), "equal": (str,)}
"""Keys that a step may have."""
VERDICT_KINDS: Kinds = {
    **dict.fromkeys(("model", "split", "history", "turn_id", "turn", "hardness"), (str,)),
    **dict.fromkeys(("seed", "ex", "em", "replies", "is_aha", "starts_bad"), (int,)),
    "at": (int, NoneType),
    "abilities": (list,),
}
ABILITY = {int, float, NoneType}


@dataclass(frozen=True)
class Verdict:
    """How one turn went.

    model: the name of a step or of a round. at: the finished updates of the training `ALONG`, for
    an evaluation along its run; else None. abilities: those of `ABILITIES`, None where the episode
    gave no occasion. starts_bad: its first query failed or returned nothing. is_aha: it started so
    and ended right with another query. replies: number of replies.
    """

    seed: int
    model: str
    split: str
    history: str
    turn_id: str
    turn: str
    hardness: str
    ex: int
    em: int
    replies: int
    abilities: list[float | None]
    is_aha: int = 0
    starts_bad: int = 0
    at: int | None = None

    @property
    def dialogue(self) -> str:
        """The id of its dialogue, which the models of all seeds share."""
        return dialogue_of(self.turn_id)


def gather(steps: Steps) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts of all finished evaluations, and what `runs.json` holds."""
    verdicts: list[Verdict] = []
    for step in steps.steps:
        if not steps.states[step.key].is_done:
            continue
        run = steps.folder / step.key
        if step.script == "eval.py":
            verdicts += _of_evaluation(step, cells_of(run))
        elif step.name == ALONG:
            verdicts += _along(step, run)
    return verdicts, {
        "seeds": origins(steps),
        "steps": [facts_of(steps, step) for step in steps.steps],
    }


def origins(steps: Steps) -> list[dict[str, Any]]:
    """The versions that each seed has run with, and the machine that reports it. Seeds that were
    not started are left out."""
    found = []
    for seed in sorted({step.seed for step in steps.steps}):
        known = versions(steps, seed)
        if known:
            found.append({"seed": seed, "machine": machine(), "versions": known})
    return found


def write(verdicts: Iterable[Verdict], runs: dict[str, Any], folder: Path) -> None:
    """Write both files."""
    write_verdicts(verdicts, folder / VERDICTS)
    write_text(folder / RUNS, json.dumps(runs, indent=1) + "\n")


def write_verdicts(verdicts: Iterable[Verdict], file: Path) -> None:
    """Write a line for each verdict. The same verdicts give the same bytes. WriteError that names
    the file if it cannot be written."""
    lines = []
    for verdict in verdicts:
        known = {key: value for key, value in asdict(verdict).items() if value is not None}
        lines.append(json.dumps(known, separators=(",", ":")) + "\n")
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
        os.replace(partial, file)


def read_verdicts(file: Path) -> list[Verdict]:
    """The verdicts of a file. ValueError that names file and line if one cannot be read."""
    try:
        text = gzip.decompress(file.read_bytes()).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{file}, line {number}"
        values = parse_json(line, where)
        try:
            found.append(Verdict(**values))
        except TypeError as error:
            raise ValueError(f"{where}: no verdict: {error}") from error
        require_kinds(vars(found[-1]), VERDICT_KINDS, where)
        abilities = found[-1].abilities
        if len(abilities) != len(ABILITIES) or not {type(one) for one in abilities} <= ABILITY:
            raise ValueError(
                f"{where}: abilities is {abilities}: expected {len(ABILITIES)} numbers or null"
            )
    return found


def has_files(folder: Path) -> bool:
    """Whether the folder has both files. ValueError if it has one of them only, which a report
    would replace."""
    missing = [name for name in (VERDICTS, RUNS) if not (folder / name).is_file()]
    if len(missing) == 1:
        [found] = {VERDICTS, RUNS} - set(missing)
        raise ValueError(
            f"report_folder {folder}: {found} is there without {missing[0]}, and a report would "
            f"replace it: bring {missing[0]} back, delete {found}, or name another --report_folder"
        )
    return not missing


def read_runs(folder: Path) -> dict[str, Any]:
    """What `runs.json` holds. ValueError that names the file and the key if it is damaged."""
    runs = read_keys(folder / RUNS, ("seeds", "steps"))
    require_list(runs, "seeds", ORIGIN_KINDS, folder / RUNS)
    require_steps(runs, folder / RUNS)
    return runs


def require_steps(values: dict[str, Any], file: Path) -> None:
    """ValueError that names the file and the key if its `steps` are not those of `facts_of`."""
    require_list(values, "steps", STEP_KINDS, file)
    for number, step in enumerate(values["steps"]):
        where = f"{file}: steps[{number}]"
        require_kinds(step, {key: kind for key, kind in MORE_KINDS.items() if key in step}, where)
        if not all(isinstance(word, str) for word in step["command"]):
            raise ValueError(f"{where}.command is {step['command']}: expected a list of texts")


def require_list(values: dict[str, Any], key: str, kinds: Kinds, file: Path) -> None:
    """ValueError that names the file and the key if the value is no list of objects of these
    kinds."""
    require_kinds(values, {key: (list,)}, str(file))
    for number, one in enumerate(values[key]):
        require_kinds(one, kinds, f"{file}: {key}[{number}]")


def require_kinds(values: Any, kinds: Kinds, where: str) -> None:
    """ValueError that begins with `where` and names the key if a value is missing or of another
    kind."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}: expected an object")
    for key, expected in kinds.items():
        if key not in values:
            raise ValueError(f"{where}: {key} is missing")
        if type(values[key]) not in expected:  # True is no number
            names = " or ".join("null" if one is NoneType else one.__name__ for one in expected)
            raise ValueError(f"{where}: {key} is {values[key]!r}: expected {names}")


def read_keys(file: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The object in a JSON file. ValueError that names the file if one of the keys is missing."""
    values = read_json(file)
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise ValueError(f"{file}: {missing[0]} is missing")
    found: dict[str, Any] = values
    return found


def cells_of(run: Path) -> list[dict[str, Any]]:
    """The results of a finished evaluation. ValueError that names the file if a part of it is
    missing."""
    file = run / "scores.json"
    scores = read_keys(file, ("results", "is_complete"))
    if not scores["is_complete"]:
        raise ValueError(f"{file}: not complete: continue it with eval.py --resume '{run}'")
    cells: list[dict[str, Any]] = scores["results"]
    return cells


def _of_evaluation(step: Step, cells: Iterable[dict[str, Any]]) -> Iterator[Verdict]:
    model = step.name.removeprefix("eval-")
    for cell in cells:
        for row in cell["turns"]:
            yield verdict_of(step.seed, model, cell["split"], cell["history"], row)


def _along(step: Step, run: Path) -> Iterator[Verdict]:
    """The evaluations along a training, from its first to its last update."""
    for file in sorted((run / "eval").glob("*.json")):
        split, _, update = file.stem.rpartition("-")
        for row in read_json(file)["turns"]:
            yield verdict_of(step.seed, step.name, split, "gold", row, int(update))


def verdict_of(
    seed: int, model: str, split: str, history: str, row: dict[str, Any], at: int | None = None
) -> Verdict:
    """The verdict in a row of scores.json."""
    has_bad_start = row["first_execution"] in BAD_STARTS
    is_mended = folded(row["first_sql"] or "") != folded(row["prediction"])
    values = [row["abilities"][name] for name in ABILITIES]
    return Verdict(
        seed=seed,
        model=model,
        split=split,
        history=history,
        turn_id=row["turn_id"],
        turn=row["turn"],
        hardness=row["hardness"],
        ex=int(row["ex"]),
        em=int(row["em"]),
        replies=row["num_replies"],
        abilities=[None if value is None else round(value, 4) for value in values],
        is_aha=int(row["ex"] and has_bad_start and is_mended),
        starts_bad=int(has_bad_start),
        at=at,
    )


def facts_of(steps: Steps, step: Step) -> dict[str, Any]:
    """What is kept of a step: command, seconds, and for a training its operations and tokens."""
    state = steps.states[step.key]
    facts: dict[str, Any] = {
        "seed": step.seed,
        "name": step.name,
        "command": steps.command(step),
        "is_done": state.is_done,
        "secs": state.secs,
        "num_starts": state.num_starts,
    }
    if step.equal is not None:
        facts["equal"] = step.equal.flag
    run = steps.folder / step.key
    if state.is_done and step.script != "eval.py":
        rows = read_rows(run / "metrics.jsonl")
        facts["flops"] = flops_of(run)
        facts["optimizer_steps"] = sum(
            row.get("num_steps", 1) for row in rows if "loss" in row and row["stage"] != "eval"
        )
        facts["updates"] = sum(row["stage"] == "rl" for row in rows)
        facts["episodes"] = sum(row.get("num_trajectories", 0) for row in rows)
        solved = [row["num_solved"] for row in rows if row["stage"] == "collect"]
        if solved:
            facts["solved"] = solved
    return facts


def machine() -> dict[str, Any]:
    return {"processor": platform.machine(), "cores": os.cpu_count()}


def versions(steps: Steps, seed: int) -> dict[str, Any]:
    """The versions and the commit with which the first step of a seed has run."""
    for step in steps.steps:
        file = steps.folder / step.key / "versions.json"
        if step.seed == seed and file.is_file():
            versions: dict[str, Any] = read_json(file)
            return {key: value for key, value in versions.items() if key != "command"}
    return {}
