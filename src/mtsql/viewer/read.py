"""Read the trajectories that a run has kept."""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtsql.files import parse_json

SUFFIX = ".jsonl.gz"
Record = dict[str, Any]
FORMAT = 1
TEXTS = "part turn_id dialogue_id db_id hardness question gold_sql prompt outcome answer error"
LISTS = "history replies tokens ids loss_mask logprobs ratios entropies"
KINDS = {
    **dict.fromkeys(TEXTS.split(), str),
    **dict.fromkeys(LISTS.split(), list),
    **dict.fromkeys(("update", "turn", "sample"), int),
    **dict.fromkeys(("ex", "em"), bool),
    **dict.fromkeys(("gold_result", "components"), dict),
    **dict.fromkeys(("curriculum_stage", "reward", "kl", "answer_result"), object),
}
"""Keys that a page needs, with the types of their values."""


@dataclass(frozen=True)
class KeptFile:
    """A file of trajectories."""

    path: Path
    num_bytes: int

    @property
    def update(self) -> int | None:
        """The number at the end of the name, as files of a training run have it."""
        found = re.search(r"-(\d+)\.jsonl\.gz$", self.path.name)
        return int(found[1]) if found else None

    @property
    def part(self) -> str:
        """The beginning of the name: `update`, a split, or a part of an evaluation."""
        return re.sub(r"(-\d+)?\.jsonl\.gz$", "", self.path.name)


def kept_files(run: Path, updates: Sequence[int] = ()) -> list[KeptFile]:
    """The files of a run folder (or `run` itself, if it is such a file), those of `updates` if any
    are named. ValueError if there are none."""
    if run.is_file():
        return [KeptFile(run, run.stat().st_size)]
    if not run.is_dir():
        raise ValueError(f"run {run}: no such folder")
    paths = sorted((run / "trajectories").glob(f"*{SUFFIX}"))
    files = [KeptFile(path, path.stat().st_size) for path in paths if path.name[0] != "."]
    if not files:
        raise ValueError(
            f"run {run} has no trajectories/*{SUFFIX}: train_rl.py and eval.py write them, unless "
            "trajectories.keep_frac is 0"
        )
    if not updates:
        return files
    missing = sorted(set(updates) - {file.update for file in files})
    if missing:
        raise ValueError(f"run {run} has no trajectories of update {missing[0]}")
    return [file for file in files if file.update in updates]


def that_fit(files: Sequence[KeptFile], max_bytes: int) -> list[KeptFile]:
    """As many of the files as have at most `max_bytes` together: of each part the last and the
    first, then those in the middle of the largest gaps. At least one."""
    parts: dict[str, list[KeptFile]] = {}
    for file in files:
        parts.setdefault(file.part, []).append(file)
    queues = [[some[place] for place in spread_places(len(some))] for some in parts.values()]
    queues.sort(key=lambda queue: queue[0].part == "update")  # evaluations first
    chosen: list[KeptFile] = []
    room = max_bytes
    for number in range(max(map(len, queues))):
        for queue in queues:
            if number < len(queue) and (queue[number].num_bytes <= room or not chosen):
                room -= queue[number].num_bytes
                chosen.append(queue[number])
    return [file for file in files if file in chosen]


def spread_places(count: int) -> list[int]:
    """The places 0 to count - 1: the last, the first, then again and again the middle of gaps."""
    places = list(dict.fromkeys([count - 1, 0]))
    step = count - 1
    while step > 1:
        step = (step + 1) // 2
        places += range(0, count, step)
    return list(dict.fromkeys([*places, *range(count)]))


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file. ValueError that names the file, and the line of a damaged record."""
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                yield _checked(parse_json(line, f"{file}, line {number}"), f"{file}, line {number}")
    except gzip.BadGzipFile as error:
        advice = f"name a run folder, or a file trajectories/*{SUFFIX} of it"
        raise ValueError(f"{file}: not compressed by gzip, or damaged: {advice}") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged, copy it again: {error}") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error


def _checked(record: Any, where: str) -> Record:
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError(f"{where}: not a trajectory of a run (docs/trajectories.md)")
    if record["format"] != FORMAT:
        raise ValueError(
            f"{where}: its format is {record['format']!a:.20}, and this version reads {FORMAT}"
        )
    for key, kind in KINDS.items():
        if key not in record:
            raise ValueError(f"{where}: the key {key} is missing")
        if not isinstance(record[key], kind):
            raise ValueError(f"{where}: {key} is {record[key]!a:.40}")
    return record
