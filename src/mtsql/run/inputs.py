"""What goes into a run besides its configuration: kept with the run, and compared when it goes on.

    <run>/inputs.json
        "the turns": "b7..", ...         hashes of what was made of the files: see Workbench.inputs
        "files": {"data.train": {"path": "sparc/train.json", "hashes": {"train.json": "5e.."}}, ...}

A resumed run may name a file anew, because files move; but their content must be the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtsql.files import read_json, write_text

FILE_NAME = "inputs.json"
FILES = "files"
WHOLE_BYTES = 32 << 20
"""A file of at most so many bytes is hashed whole."""
BLOCK_BYTES = 1 << 16
NUM_BLOCKS = 64
"""Of a larger file so many blocks, evenly spread, and its size are hashed. The first one is among
them: it holds a counter that SQLite raises when it writes."""
SQLITE_WRITER = slice(92, 100)
"""The part of an SQLite file that only says which version of SQLite wrote it."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
NO_MATTER = ("mtsql.json",)
"""Files of a model folder that only set defaults, which the run's configuration has in full."""
BY_STEM = ("data.train", "data.dev", "data.dev_seen")
"""Files whose name, without its ending, is the beginning of the ids of their turns."""
MAY_MOVE = (
    *BY_STEM,
    "data.tables",
    "data.databases",
    "data.leave_out",
    "data.toy_folder",
    "demonstrations",
    "model.path",
)
"""Keys that name files, and that a resumed run may change if the content is the same."""


def hash_inputs(config: Any, splits: Iterable[str], databases: Iterable[Path]) -> dict[str, Any]:
    """The entry "files" of inputs.json: of each key of `config` that names files, the path and the
    hash of each file that is used. `splits` and `databases` say which files of the data those are.

    ValueError, naming the key and the file, for one that cannot be read.
    """
    data_keys = ("toy_folder",) if config.data.is_toy else (*splits, "tables", "databases")
    keys = [*(f"data.{key}" for key in data_keys), "model.path"]
    keys += ["data.leave_out"] if "train" in splits else []
    keys += ["demonstrations"] if getattr(config, "source", None) == "demonstrations" else []
    used = {key: Path(path) for key in keys if (path := _path(config, key)) is not None}
    found = {}
    for key, path in used.items():
        if key in ("data.databases", "data.toy_folder"):
            names = {_under(path, file) for file in databases}
            if key == "data.toy_folder":
                names |= {f"{split}.json" for split in splits} | {"tables.json"}
        elif path.is_dir():
            files = [file for pattern in MODEL_FILES for file in path.glob(pattern)]
            names = {file.name for file in files if file.name not in NO_MATTER}
        else:
            names = {path.name}
        folder = path.parent if names == {path.name} else path
        hashes = {name: _hash(folder / name, key) for name in sorted(names)}
        found[key] = {"path": str(path), "hashes": hashes}
    return {FILES: found}


def _path(config: Any, key: str) -> str | None:
    """What a key of the configuration names."""
    if key == "demonstrations":
        return config.demonstrations or f"{config.data.toy_folder}/demonstrations.jsonl"
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def check_places(run: Path, config: Any) -> None:
    """ValueError, naming the key, where files that a run to go on with was started with are not
    there, or have a name that gives other ids to their turns. Nothing is read but inputs.json."""
    for key, entry in _read(run).get(FILES, {}).items():
        then, now = Path(entry["path"]), _path(config, key)
        if now is None:
            raise ValueError(f"resume {run}: {key} is not set, but the run was started with {then}")
        path = Path(now)
        flag = f"resume {run}: {key} {path}"
        if not path.exists() and key != "data.toy_folder":  # which is written again
            raise ValueError(
                f"{flag}: no such file or folder: where it was moved, name it anew with --{key}"
            )
        if key in BY_STEM and path.stem != then.stem:
            raise ValueError(
                f"{flag}: the ids of its turns begin with the file's name, which was {then.name} "
                "when the run was started: give the file that name again"
            )


def check_files(run: Path, config: Any) -> None:
    """ValueError, naming the key and the file, where a file of a run to go on with has another
    content than at its start, or is not there. Runs that did not write down their files pass."""
    check_places(run, config)
    for key, entry in _read(run).get(FILES, {}).items():
        path, hashes = Path(_path(config, key)), entry["hashes"]
        if not path.exists():
            continue
        is_file = list(hashes) == [Path(entry["path"]).name]
        for name, value in hashes.items():
            file = path if is_file else path / name
            if not file.is_file():
                raise ValueError(
                    f"resume {run}: {key} {file}: no such file: put it back or, where the files "
                    f"were moved, name their place with --{key}"
                )
            if _hash(file, key) != value:
                raise ValueError(
                    f"resume {run}: {key} {file} changed since the run was started: undo the "
                    "change, or start a new run: --model.path CHECKPOINT/model"
                )


def moved_keys(run: Path) -> set[str]:
    """The keys that a run may be resumed with another value of: because `check_files` compares the
    content, or because they name splits that the run does not use, as train_sft.py uses data.train
    only."""
    used, held_out = set(_read(run).get(FILES, {})), {"data.dev", "data.dev_seen"}
    return used | held_out if "data.train" in used and not used & held_out else used


def keep_inputs(run: Path, inputs: Mapping[str, Any]) -> None:
    """Write inputs.json. An older one stays."""
    file = run / FILE_NAME
    if not file.is_file():
        write_text(file, json.dumps(inputs, indent=1) + "\n")


def check_inputs(run: Path, inputs: Mapping[str, str]) -> None:
    """ValueError for an input that is another one than `keep_inputs` has written down."""
    saved = _read(run)
    for name, value in inputs.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume {run}: {name} changed since the run was started: undo the change, or "
                "start a new run: --model.path CHECKPOINT/model"
            )


def _read(run: Path) -> dict[str, Any]:
    """The content of inputs.json, empty for a run without one."""
    file = run / FILE_NAME
    if not file.is_file():
        return {}
    saved = read_json(file)
    files = saved.get(FILES, {}) if isinstance(saved, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        raise ValueError(f"{file}: not written by this program, or damaged: put it back as it was")
    return saved


def _is_entry(key: str, entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and key in MAY_MOVE
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("hashes"), dict)
    )


def _under(folder: Path, file: Path) -> str:
    """The path of a file from a folder that it lies in, or its whole path."""
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file.absolute())


def _hash(file: Path, key: str) -> str:
    """A hash of a file's content. ValueError, naming the key, if it cannot be read."""
    total = hashlib.blake2b(digest_size=8)
    try:
        with open(file, "rb", buffering=0) as source:
            size = file.stat().st_size
            if size <= WHOLE_BYTES:
                content = bytearray(source.readall())
                if content.startswith(b"SQLite format 3\0"):
                    content[SQLITE_WRITER] = bytes(SQLITE_WRITER.stop - SQLITE_WRITER.start)
                total.update(content)
            else:
                total.update(str(size).encode())
                for number in range(NUM_BLOCKS):
                    source.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
                    total.update(source.read(BLOCK_BYTES))
    except OSError as error:
        raise ValueError(f"{key} {file}: cannot be read: {error.strerror}") from error
    return total.hexdigest()
