"""What a script trains and evaluates on: files that the user brings, or the embedded toy world."""

import errno
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mtsql.files import read_lines
from mtsql.sql.dialogues import Corpus, load_corpus
from mtsql.toyworld.world import WorldConfig, write_toy_world


@dataclass(frozen=True)
class DataConfig:
    """Where the dialogues and databases are. With no file named, the toy world is written once to
    `toy_folder`."""

    train: str | None = None
    """Training dialogues: a SParC, CoSQL, Spider or BIRD JSON file, or .jsonl or .csv with db_id,
    question and sql."""
    dev: str | None = None
    """Held-out dialogues on databases that training never sees."""
    dev_seen: str | None = None
    """Held-out dialogues on training databases, where there are any (optional)."""
    tables: str | None = None
    """The official tables.json. Without it, schemas are read from the database files."""
    databases: str | None = None
    """Folder with <db_id>/<db_id>.sqlite or <db_id>.sqlite (or .sqlite3, .db)."""
    leave_out: str | None = None
    """Turns that training leaves out: `turn id<TAB>reason` a line, as `python -m mtsql.audit`
    writes them."""
    toy_folder: str = "data/toyworld"
    """Where the embedded world is kept."""
    toy_seed: int = 0
    """Seed of the embedded world."""

    def __post_init__(self):
        names = ("train", "dev", "dev_seen", "tables", "databases")
        named = [name for name in names if getattr(self, name)]
        missing = [f"data.{name}" for name in ("dev", "databases") if not getattr(self, name)]
        if named and missing:
            raise ValueError(f"data.{named[0]} is set: {' and '.join(missing)} must be set too")

        if self.leave_out and named and not self.train:
            raise ValueError(
                "data.leave_out is set, but data.train is not: it only concerns the training split"
            )

    @property
    def is_toy(self) -> bool:
        """Whether the embedded world is used."""
        return self.dev is None


def toy_files(config: DataConfig) -> DataConfig:
    """Write the toy world if it is not there yet and return the configuration that names its
    files."""
    folder = Path(config.toy_folder)
    try:
        _write_toy_world(folder, config.toy_seed)
    except OSError as error:
        words = f"data.toy_folder {folder}: cannot be written: {error.strerror}"
        raise ValueError(words) from error
    return DataConfig(
        train=str(folder / "train.json"),
        dev=str(folder / "dev.json"),
        dev_seen=str(folder / "dev_seen.json"),
        tables=str(folder / "tables.json"),
        databases=str(folder / "database"),
        toy_folder=config.toy_folder,
        toy_seed=config.toy_seed,
    )


def _write_toy_world(folder: Path, seed: int) -> None:
    """`write_toy_world`, which leaves nothing behind when it fails or is interrupted. If another
    process made the folder meanwhile, it is that folder that counts."""
    try:
        write_toy_world(folder, seed, WorldConfig())
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
            raise
        write_toy_world(folder, seed, WorldConfig())
    finally:
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)


def load_split(config: DataConfig, name: str) -> Corpus:
    """The corpus of split `name` ("train", "dev" or "dev_seen"). ValueError naming the key if it
    has no file."""
    files = toy_files(config) if config.is_toy else config
    file = getattr(files, name)
    if file is None:
        raise ValueError(f"data.{name} is not set, but this run needs it")
    corpus = load_corpus(file, files.tables, files.databases)
    return (
        without_turns(corpus, Path(config.leave_out))
        if name == "train" and config.leave_out
        else corpus
    )


def read_leave_out(file: Path) -> dict[str, str]:
    """Turn id -> reason; nothing if the file is empty. ValueError naming file and line where one is
    malformed or names a turn again."""
    lines = read_lines(file, "data.leave_out")
    reasons: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        turn_id, tab, reason = line.partition("\t")
        if not tab or not turn_id.strip() or not reason.strip():
            raise ValueError(
                f"data.leave_out {file}, line {number}: expected turn id<TAB>reason, "
                f"found {line!r:.80}"
            )
        if turn_id.strip() in reasons:
            raise ValueError(
                f"data.leave_out {file}, line {number}: turn {turn_id.strip()} was named before"
            )
        reasons[turn_id.strip()] = reason.strip()
    return reasons


def without_turns(corpus: Corpus, file: Path) -> Corpus:
    """The corpus without the turns the file names; later turns keep them in their history.

    ValueError for a turn the corpus does not have, and where no turn is left.
    """
    reasons = read_leave_out(file)
    unknown = sorted(reasons.keys() - {turn.turn_id for turn in corpus.turns})
    if unknown:
        raise ValueError(
            f"data.leave_out {file}: {len(unknown)} turns are not in this split, "
            f"such as {unknown[0]}"
        )
    dialogues = []
    for dialogue in corpus.dialogues:
        turns = tuple(turn for turn in dialogue.turns if turn.turn_id not in reasons)
        dialogues += [replace(dialogue, turns=turns)] if turns else []
    if not dialogues:
        raise ValueError(f"data.leave_out {file}: no turn is left")
    return replace(corpus, dialogues=dialogues, left_out=reasons)


def describe_skipped(corpus: Corpus) -> str:
    """One line that counts what is not trained on, by reason; empty if nothing is missing."""
    parts = []
    if corpus.skipped:
        num_turns = sum(skip.num_turns for skip in corpus.skipped)
        counts = Counter(skip.reason for skip in corpus.skipped).most_common(3)
        most = ", ".join(f"{count} {reason}" for reason, count in counts)
        parts.append(
            f"skipped {num_turns} unusable turns of {len(corpus.skipped)} dialogues ({most})"
        )
    if corpus.left_out:
        counts = Counter(reason.split(":")[0] for reason in corpus.left_out.values()).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        parts.append(f"left out {len(corpus.left_out)} turns ({reasons})")
    return "; ".join(parts)
