"""What a run depends on besides its configuration: stored with the run, compared when it resumes.

    <run>/inputs.json
        "the turns": "b7..", ...         hashes of what was read: see Workbench.inputs
        "files": {"data.train": {"path": "sparc/train.json", "hashes": {"train.json": "5e.."}}, ...}

A resumed run may give another path for a file, because files move. Its content must be the same.
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
"""Maximum size of a file that is hashed as a whole."""
BLOCK_BYTES = 1 << 16
"""Size of a block of a larger file."""
NUM_BLOCKS = 64
"""Number of blocks of a larger file that are hashed with its size. They are evenly spread and
include the first one, which holds a counter that SQLite raises when it writes."""
SQLITE_WRITER = slice(92, 100)
"""The part of an SQLite file that only says which version of SQLite wrote it."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
WITHOUT_EFFECT = ("mtsql.json", "selected.json", "held_out.json")
"""Files of a model folder that only set defaults, which the run's configuration has, or say how
the model was made."""
BY_STEM = ("data.train", "data.dev", "data.dev_seen")
"""Keys of the files whose name, without its ending, begins the ids of their turns."""
MAY_MOVE = (
    *BY_STEM,
    "data.tables",
    "data.databases",
    "data.leave_out",
    "data.toy_folder",
    "demonstrations",
    "model.path",
    "selftaught.embedding",
)
"""Keys that name files. A resumed run may change them if the content of the files is the same."""


def hash_inputs(config: Any, splits: Iterable[str], databases: Iterable[Path]) -> dict[str, Any]:
    """The entry "files" of inputs.json: for each key of `config` that names files, the path and the
    hash of each file that is used. Of the data, these are the files of `splits` and `databases`.

    ValueError that names the key and the file if one cannot be read.
    """
    named = [split for split in splits if split != "held_out"]  # a part of train
    data_keys = ("toy_folder",) if config.data.is_toy else (*named, "tables", "databases")
    keys = [*(f"data.{key}" for key in data_keys), "model.path"]
    keys += ["data.leave_out"] if "train" in splits else []
    keys += ["demonstrations"] if getattr(config, "source", None) == "demonstrations" else []
    keys += ["selftaught.embedding"] if _has_encoder(config) else []
    found = {}
    for key in keys:
        place = _path(config, key)
        if place is None:
            continue
        path = Path(place)
        if key in ("data.databases", "data.toy_folder"):
            names = {_under(path, file) for file in databases}
            if key == "data.toy_folder":
                names |= {f"{split}.json" for split in named} | {"tables.json"}
        elif path.is_dir():
            files = [file for pattern in MODEL_FILES for file in path.glob(pattern)]
            names = {file.name for file in files if file.name not in WITHOUT_EFFECT}
        else:
            names = {path.name}
        folder = path.parent if names == {path.name} else path
        hashes = {name: _hash(folder / name, key) for name in sorted(names)}
        found[key] = {"path": str(path), "hashes": hashes}
    return {FILES: found}


def _has_encoder(config: Any) -> bool:
    """Whether the run selects its rollouts by a sentence-embedding model from a folder."""
    selftaught = getattr(config, "selftaught", None)
    if selftaught is None or config.source != "self":
        return False
    return selftaught.embedding not in ("policy", "counts")


def _path(config: Any, key: str) -> str | None:
    """The path that a key of the configuration names."""
    section, _, name = key.rpartition(".")
    path: str | None = getattr(getattr(config, section) if section else config, name)
    if key == "demonstrations" and not path:
        return f"{config.data.toy_folder}/demonstrations.jsonl"
    return path


def check_places(run: Path, config: Any) -> None:
    """Check that the files of a run to resume exist and that their names give the same ids to their
    turns. ValueError that names the key. Of the run, only inputs.json is read."""
    for key, entry in _read(run).get(FILES, {}).items():
        then = Path(entry["path"])
        now = _path(config, key)
        if now is None:
            raise ValueError(f"resume {run}: {key} is not set, but the run was started with {then}")
        path = Path(now)
        flag = f"resume {run}: {key} {path}"
        if not path.exists() and key != "data.toy_folder":  # it is written again
            raise ValueError(
                f"{flag}: no such file or folder: if it was moved, give its new place with --{key}"
            )
        if key in BY_STEM and path.stem != then.stem:
            raise ValueError(
                f"{flag}: the ids of its turns begin with the file's name, which was {then.name} "
                "when the run was started: give the file that name again"
            )


def check_files(run: Path, config: Any) -> None:
    """Check that the files of a run to resume exist and have not changed since the run was started.
    ValueError that names the key and the file. Runs without a list of files pass."""
    check_places(run, config)
    for key, entry in _read(run).get(FILES, {}).items():
        named = _path(config, key)
        if named is None or not Path(named).exists():
            continue
        path, hashes = Path(named), entry["hashes"]
        is_file = list(hashes) == [Path(entry["path"]).name]
        for name, value in hashes.items():
            file = path if is_file else path / name
            if not file.is_file():
                raise ValueError(
                    f"resume {run}: {key} {file}: no such file: put it back or, if the files were "
                    f"moved, give their new place with --{key}"
                )
            if _hash(file, key) != value:
                raise ValueError(
                    f"resume {run}: {key} {file} changed since the run was started: undo the "
                    "change, or start a new run: --model.path CHECKPOINT/model"
                )


def moved_keys(run: Path) -> set[str]:
    """The keys of paths that may differ when a run is resumed.

    They are the keys whose files `check_files` compares, and those of splits that the run does not
    use (train_sft.py uses data.train only).
    """
    used = set(_read(run).get(FILES, {}))
    held_out = {"data.dev", "data.dev_seen"}
    uses_train_only = "data.train" in used and not used & held_out
    return used | held_out if uses_train_only else used


def keep_inputs(run: Path, inputs: Mapping[str, Any]) -> None:
    """Write inputs.json, unless there is one."""
    file = run / FILE_NAME
    if not file.is_file():
        write_text(file, json.dumps(inputs, indent=1) + "\n")


def check_inputs(run: Path, inputs: Mapping[str, str]) -> None:
    """ValueError for an input that differs from the one that `keep_inputs` has stored."""
    saved = _read(run)
    for name, value in inputs.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume {run}: {name} changed since the run was started: undo the change, or "
                "start a new run: --model.path CHECKPOINT/model"
            )


def changed_inputs(run: Path, before: Path) -> list[str]:
    """The names of the inputs in which a run differs from an earlier one that it starts from. Files
    are compared by what they hold, wherever they are."""
    now, then = _read(run), _read(before)
    names = [name for name in now if name != FILES and name in then and now[name] != then[name]]
    files, old_files = now.get(FILES, {}), then.get(FILES, {})
    for key, entry in files.items():
        if key in old_files and entry["hashes"] != old_files[key]["hashes"]:
            names.append(f"the files of {key}")
    return names


def _read(run: Path) -> dict[str, Any]:
    """The content of inputs.json, empty for a run without one."""
    file = run / FILE_NAME
    if not file.is_file():
        return {}
    saved = read_json(file)
    if not isinstance(saved, dict) or not _are_entries(saved.get(FILES, {})):
        raise ValueError(f"{file}: not written by this program, or damaged: put it back as it was")
    return saved


def _are_entries(files: object) -> bool:
    return isinstance(files, dict) and all(_is_entry(*item) for item in files.items())


def _is_entry(key: str, entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and key in MAY_MOVE
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("hashes"), dict)
    )


def _under(folder: Path, file: Path) -> str:
    """The path of a file within a folder, or its absolute path if it is elsewhere."""
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file.absolute())


def _hash(file: Path, key: str) -> str:
    """A hash of a file's content. ValueError that names the key if it cannot be read."""
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
