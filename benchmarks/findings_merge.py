"""The seeds of several machines in one report of benchmarks/findings.py.

A seed comes from the runs of this machine if an evaluation of it is finished here, and else from
the files of the earlier report in the folder of the report. Nothing of these files is lost: a run
that has less of a seed than they have is refused.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from findings_data import RUNS, VERDICTS, Verdict, read_runs, read_verdicts

Cell = tuple[str, str, int | None, str]
"""(model, history, at, split)."""


def with_other_seeds(
    verdicts: list[Verdict], runs: dict[str, Any], folder: Path
) -> tuple[list[Verdict], dict[str, Any]]:
    """The same with the seeds of the files in the folder that have no finished evaluation here.

    ValueError that names the seed if the files have more of a seed that is evaluated here, and if a
    seed that only they have comes from other commands or another world.
    """
    old_runs, old = read_runs(folder), read_verdicts(folder / VERDICTS)
    here = {one.seed for one in verdicts}
    done = _done(runs)
    for seed, name in _done(old_runs):
        if seed in here and (seed, name) not in done:
            raise ValueError(_less(folder / RUNS, seed, f"step {name} finished"))
    known = {(one.seed, _cell(one), one.turn_id) for one in verdicts}
    for one in old:
        if one.seed in here and (one.seed, _cell(one), one.turn_id) not in known:
            what = f"the verdict on {one.turn_id} by {one.model}"
            raise ValueError(_less(folder / VERDICTS, one.seed, what))
    others = {one.seed for one in old} | {seed for seed, _ in _done(old_runs)}
    others -= here
    kept = [one for one in old if one.seed in others]
    _require_same_commands(old_runs, others, runs, here, folder / RUNS)
    _require_same_world(kept, verdicts, folder / VERDICTS)
    merged = {}
    for key in ("seeds", "steps"):
        found = [one for one in old_runs[key] if one["seed"] in others]
        found += [one for one in runs[key] if one["seed"] not in others]
        merged[key] = sorted(found, key=lambda one: one["seed"])  # stable
    return sorted(kept + verdicts, key=lambda one: one.seed), merged


def _done(runs: dict[str, Any]) -> list[tuple[int, str]]:
    """Seed and name of each finished step."""
    return [(step["seed"], step["name"]) for step in runs["steps"] if step["is_done"]]


def _less(file: Path, seed: int, what: str) -> str:
    """The error for a seed of which the file has more than the runs."""
    return (
        f"{file}: has {what} for seed {seed}, which the runs here have not, and it would be lost: "
        "finish the seed here, leave it out of --seeds, or name another --report_folder"
    )


def _require_same_commands(
    old: dict[str, Any], others: set[int], new: dict[str, Any], here: set[int], file: Path
) -> None:
    """ValueError if a seed of the files had other commands than one here."""
    for seed in sorted(others):
        theirs = _commands(old, seed)
        for seed_now in sorted(here):
            ours = _commands(new, seed_now)
            if theirs != ours:
                name = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
                raise ValueError(
                    f"{file}: {name} of seed {seed} has another command than that of seed "
                    f"{seed_now}: give the flags that it had, or name another --report_folder"
                )


def _commands(runs: dict[str, Any], seed: int) -> dict[str, list[str]]:
    """Name of a step -> its command, without the seed, the folder of its runs and the flag that
    depends on other steps."""
    found = {}
    for step in runs["steps"]:
        if step["seed"] != seed:
            continue
        words = step["command"]
        run = next((word for word in words if word.startswith("--run=")), "")
        place = Path(run.removeprefix("--run=")).parent
        equal = f"{step['equal']}=" if step.get("equal") else None
        found[step["name"]] = [
            _inside(word, place)
            for word in words
            if word != f"--seed={seed}" and not (equal and word.startswith(equal))
        ]
    return found


def _inside(word: str, place: Path) -> str:
    """The flag with its path from the folder of the seed on, if it leads into that folder."""
    flag, _, value = word.partition("=")
    if value and Path(value).is_relative_to(place):
        return f"{flag}={Path(value).relative_to(place)}"
    return word


def _require_same_world(old: list[Verdict], new: list[Verdict], file: Path) -> None:
    """ValueError if a turn has another hardness, or an evaluation other turns, in the files."""

    def refuse(one: Verdict, other: Verdict, difference: str) -> None:
        raise ValueError(
            f"{file}: seed {other.seed} is of another world than seed {one.seed} here: {one.split} "
            f"{difference}: name another --report_folder"
        )

    known = {(one.split, one.turn_id): one for one in old}
    for one in new:
        other = known.get((one.split, one.turn_id), one)
        if other.hardness != one.hardness:
            refuse(one, other, f"{one.turn_id} is {other.hardness} there and {one.hardness} here")
    theirs = _by_cell(old)
    for cell, seeds in _by_cell(new).items():
        for ours in seeds.values():
            for turns in theirs.get(cell, {}).values():
                for turn_id in sorted(turns.keys() ^ ours.keys()):
                    where = "there" if turn_id in turns else "here"
                    one, other = next(iter(ours.values())), next(iter(turns.values()))
                    refuse(one, other, f"{turn_id} was played by {one.model} {where} only")


def _cell(one: Verdict) -> Cell:
    return (one.model, one.history, one.at, one.split)


def _by_cell(verdicts: Iterable[Verdict]) -> dict[Cell, dict[int, dict[str, Verdict]]]:
    """Cell -> seed -> turn id -> verdict."""
    found: dict[Cell, dict[int, dict[str, Verdict]]] = {}
    for one in verdicts:
        found.setdefault(_cell(one), {}).setdefault(one.seed, {})[one.turn_id] = one
    return found
