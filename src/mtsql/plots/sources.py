"""What the figures of `mtsql plots` are drawn from: training runs and evaluations, by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtsql.judge.comparison import read_evaluation
from mtsql.judge.intervals import Interval, mean_interval
from mtsql.run.metrics_file import read_metrics

Row = dict[str, Any]
MAX_NAME = 40
"""Characters of a name in a figure. A longer one loses its middle."""


@dataclass(frozen=True)
class Estimate:
    """The mean of a number over `count` turns. interval: 95 %, bootstrapped by dialogue; None with
    fewer than two dialogues."""

    value: float
    count: int
    interval: Interval | None


@dataclass(frozen=True)
class Scored:
    """One checkpoint on one data set, with a row for each turn. series: the training run that it is
    from; empty for evaluations of eval.py."""

    name: str
    data: str
    rows: list[Row]
    series: str = ""

    def mean(self, key: str, which: Sequence[Row] | None = None) -> Estimate | None:
        """The mean of `ex` or `em`, in percent, over all turns or over some of them; None if there
        are none."""
        rows = self.rows if which is None else which
        return estimate([(row["dialogue_id"], 100.0 * row[key]) for row in rows])


@dataclass(frozen=True)
class Training:
    """A run of train_rl.py. updates, evals: its rows in metrics.jsonl. held_out: split and update
    of each evaluation whose turns are there."""

    name: str
    updates: list[Row]
    evals: list[Row]
    held_out: dict[tuple[str, int], Scored]


@dataclass(frozen=True)
class Sources:
    """All that is drawn. sets: the checkpoints of each data set, by its name in the figures. notes:
    what a reader of the figures must know."""

    trainings: list[Training]
    sets: dict[str, list[Scored]]
    notes: list[str]


def estimate(values: Sequence[tuple[str, float]]) -> Estimate | None:
    """The mean of (dialogue, value) pairs with its interval; None for no values."""
    if not values:
        return None
    mean = sum(value for _, value in values) / len(values)
    return Estimate(mean, len(values), mean_interval(values))


def read_sources(
    paths: Sequence[Path],
    names: Sequence[str] = (),
    history: str = "gold",
    updates: Sequence[int] = (),
) -> Sources:
    """Read run folders of train_rl.py and of eval.py, and files eval/SPLIT-UPDATE.json of a run.

    names: those of `paths` in the figures; without them the ends of the paths that tell them apart.
    history: which parts of evaluations count. updates: the evaluations of a training run that are
    compared as checkpoints; without any the first and the last.

    ValueError that names the path for anything else, and for a part that is not there.
    """
    names = [_readable(name) for name in names or distinct_names(paths)]
    trainings = []
    scored: list[Scored] = []
    others = []
    for path, name in zip(paths, names, strict=True):
        training = _training(path, name)
        if training is not None:
            trainings.append(training)
            if history == "gold":  # that of its evaluations
                scored += _checkpoints(training, updates)
            continue
        parts = read_evaluation(path)
        fitting = [part for part in parts if part.history == history]
        if not fitting:
            others.append(str(path))
        for part in fitting:
            data = part.data or part.split
            data = data if history == "gold" else f"{data}, {history} history"
            scored.append(Scored(name, data, list(part.rows.values())))
    if others:
        raise ValueError(f"{others[0]}: it has no part with {history} history")
    missing = {row for row in updates if not _has_update(trainings, row)}
    if missing:
        found = sorted({update for one in trainings for _, update in one.held_out})
        raise ValueError(
            f"updates: no run has an evaluation at update {min(missing)}; "
            f"found {', '.join(map(str, found)) or 'none'}"
        )
    sets, notes = _by_turns(scored)
    return Sources(trainings, sets, notes)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other one has. ValueError for the same path twice."""
    parts = [path.resolve().parts for path in paths]
    for number, one in enumerate(parts):
        if one in parts[:number]:
            raise ValueError(f"{paths[number]} is named twice: name it once")
    found = []
    for one in parts:
        length = 1
        while length < len(one) and sum(other[-length:] == one[-length:] for other in parts) > 1:
            length += 1
        found.append("/".join(one[-length:]))
    return found


def _readable(name: str) -> str:
    """A name as a figure and a CSV file can hold it: valid text without control characters, and
    not too long."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "?"
    if len(text) <= MAX_NAME:
        return text
    half = MAX_NAME // 2
    return f"{text[: half - 1]}\u2026{text[-half:]}"


def _training(path: Path, name: str) -> Training | None:
    """The training run in a folder, None for an evaluation. ValueError for another folder."""
    file = path / "metrics.jsonl"
    has_scores = (path / "scores.json").is_file()
    if path.is_dir() and not file.is_file() and not has_scores:
        raise ValueError(f"{path}: neither metrics.jsonl of a run nor scores.json of eval.py in it")
    if not file.is_file() or has_scores:
        return None
    rows = read_metrics(file)
    updates = [row for row in rows if row.get("stage") == "rl"]
    evals = [row for row in rows if row.get("stage") == "eval" and "data" not in row]
    if not updates and not evals:
        if any(row.get("stage") in ("sft", "collect") for row in rows):
            raise ValueError(
                f"{path}: a run of train_sft.py has no updates and no held-out scores to draw: "
                "evaluate its model by eval.py, and name that folder"
            )
        raise ValueError(f"{path}: this run has no update and no evaluation yet")
    held_out = {}
    for row in evals:
        for split in (key[:-3] for key in row if key.endswith("_ex")):
            source = path / "eval" / f"{split}-{row['update']:05d}.json"
            if source.is_file():
                [part] = read_evaluation(source)
                label = f"{name}, update {row['update']}"
                held_out[split, row["update"]] = Scored(
                    label, split, list(part.rows.values()), name
                )
    return Training(name, updates, evals, held_out)


def _checkpoints(training: Training, updates: Sequence[int]) -> list[Scored]:
    """The evaluations of a run that are compared, in the order of the updates."""
    found = []
    for split in dict.fromkeys(split for split, _ in training.held_out):
        there = sorted(update for name, update in training.held_out if name == split)
        chosen = [update for update in there if update in updates]
        if not updates:
            chosen = sorted({there[0], there[-1]})
        found += [training.held_out[split, update] for update in chosen]
    return found


def _has_update(trainings: Sequence[Training], update: int) -> bool:
    return any(update == other for one in trainings for _, other in one.held_out)


def _by_turns(scored: Sequence[Scored]) -> tuple[dict[str, list[Scored]], list[str]]:
    """The checkpoints that were played on the same turns stand together. A file of a training run
    knows its split only, so it joins a data set with the same turns."""
    groups: dict[frozenset[tuple[str, str]], list[Scored]] = {}
    for one in scored:
        # Two data sets may have the same ids, but not the same questions and gold queries.
        turns = frozenset((row["turn_id"], row.get("gold_hash", "")) for row in one.rows)
        groups.setdefault(turns, []).append(one)
    sets: dict[str, list[Scored]] = {}
    notes = []
    for turns, group in groups.items():
        name = max((one.data for one in group), key=len)  # "sparc dev" says more than "dev"
        if name in sets:
            notes.append(
                f"{name}: {len(sets[name][0].rows)} and {len(turns)} turns were played, so these "
                "checkpoints are not in the same figures"
            )
            name = next(
                f"{name} ({number})" for number in range(2, 99) if f"{name} ({number})" not in sets
            )
        sets[name] = group
    return sets, notes
