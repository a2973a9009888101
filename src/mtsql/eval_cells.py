"""The cells of an evaluation: each data set with each history. What is kept of finished ones."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mtsql.files import read_json
from mtsql.rl.evaluate import HISTORIES, History
from mtsql.run.config import flat, to_dict
from mtsql.run.recipes import read_yaml
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Corpus, Dialogue

Split = Literal["dev", "dev_seen", "train"]
Domain = Literal["in-domain", "out-of-domain"]
MAY_CHANGE = ("run", "resume", "env.num_sql_workers")
"""Keys that a resumed evaluation may change: they change no result."""


class CellConfig(Protocol):
    """What the configuration of eval.py says about its cells."""

    @property
    def split(self) -> Split | None: ...

    @property
    def history(self) -> Literal["gold", "predicted", "both"]: ...

    @property
    def out_of_domain(self) -> tuple[str, ...]: ...

    @property
    def data(self) -> DataConfig: ...


@dataclass(frozen=True)
class DataSet:
    """A file of dialogues that is scored. `name` is unique in an evaluation, such as `sparc dev`,
    and the same on every machine."""

    name: str
    split: Split
    domain: Domain
    data: DataConfig
    """The file is its `split`."""


@dataclass(frozen=True)
class Cell:
    """A data set that is played with one history."""

    data_set: DataSet
    history: History

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        return f"{self.data_set.name}, {self.history}"

    @property
    def file_stem(self) -> str:
        """The beginning of the names of its files."""
        return re.sub(r"[^\w.-]+", "-", f"{self.data_set.name}-{self.history}")


def data_sets(config: CellConfig) -> list[DataSet]:
    """The data sets of an evaluation: the splits of `data`, then the files of `out_of_domain`.

    A file is called after its folder and its own name. ValueError if two are called the same.
    """
    data = config.data
    splits: tuple[Split, ...] = ("dev_seen", "dev") if config.split is None else (config.split,)
    found = []
    for split in splits:
        file: str | None = getattr(data, split)
        if file is not None or data.is_toy:
            name = _name_of(file) if file is not None else f"toyworld {split}"
            found.append(DataSet(name, split, "in-domain", data))
    for file in config.out_of_domain:
        other = replace(data, dev=file, dev_seen=None)
        found.append(DataSet(_name_of(file), "dev", "out-of-domain", other))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two files of this evaluation are called {name}, after their folders and names: "
                "rename a folder"
            )
    return found


def _name_of(file: str) -> str:
    path = Path(file)
    return f"{path.absolute().parent.name} {path.stem}"


def cells_of(config: CellConfig) -> list[Cell]:
    """The cells of an evaluation, in the order in which they are played."""
    histories = HISTORIES if config.history == "both" else (config.history,)
    return [Cell(one, history) for one in data_sets(config) for history in histories]


def num_skipped(corpus: Corpus, dialogues: Sequence[Dialogue]) -> int:
    """The turns that cannot be scored: those of the whole file if all its dialogues are played,
    else those that the dialogues which are played have lost."""
    if len(dialogues) == len(corpus.dialogues):
        return sum(skip.num_turns for skip in corpus.skipped)
    played = {int(re.findall(r":(\d+)", one.dialogue_id)[-1]) for one in dialogues}
    return sum(skip.num_turns for skip in corpus.skipped if skip.index in played)


@dataclass(frozen=True)
class Finished:
    """What a resumed evaluation finds of its cells."""

    results: list[dict[str, Any]]
    metrics_bytes: int = 0
    """The length of metrics.jsonl after the last of them."""


def read_finished(run: Path, inputs: Sequence[str]) -> Finished:
    """The finished cells of the evaluation in the folder `run`.

    `inputs` are the hashes of what each of its cells depends on. ValueError if one of the finished
    cells depended on something else, or if scores.json has another form.
    """
    file = run / "scores.json"
    if not file.is_file():
        return Finished([])
    scores = read_json(file)
    try:
        results = scores["results"]
        found = [result["inputs"] for result in results]
        num_bytes = scores["metrics_bytes"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not written by this version: {error} is missing") from error
    for result, now, before in zip(results, inputs, found, strict=False):
        if now != before:
            raise ValueError(
                f"{file}: {result['data']}, {result['history']} was played with other data, "
                "prompts or weights: start a new evaluation with --run"
            )
    return Finished(results, num_bytes)


def require_same(run: Path, config: Any) -> None:
    """ValueError if a resumed evaluation has other settings than the one in the folder `run`."""
    before = flat(read_yaml(run / "config.yaml"))
    now = flat(to_dict(config))
    changed = [
        key
        for key in {**before, **now}
        if key not in MAY_CHANGE and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{changed[0]} differs from {run / 'config.yaml'}: an evaluation is resumed with its "
            "own settings; start a new one with --run"
        )


def what_is_kept(run: Path) -> str:
    """What is kept of an evaluation that ends early, and how to continue."""
    file = run / "scores.json"
    command = f"--resume {shlex.quote(str(run))}"
    if not file.is_file():
        return f"nothing is scored yet: {command} starts over"
    num_done = len(read_json(file)["results"])
    parts = "1 finished part" if num_done == 1 else f"{num_done} finished parts"
    return f"{file} keeps {parts}: continue with {command}"
