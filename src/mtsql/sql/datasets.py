"""The data of a script: files that the user names, or the embedded world."""

import errno
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mtsql.choices import require_choices
from mtsql.files import read_lines
from mtsql.sql.dialogues import Corpus, load_corpus
from mtsql.toyworld.world import WorldConfig, write_toy_world

MOST_REASONS = 3
"""Reasons for skipped turns that a line names; the turns with others are counted."""


@dataclass(frozen=True)
class DataConfig:
    """Where the dialogues and databases are. If no file is named, the embedded world is used; it is
    written once, to `toy_folder`."""

    train: str | None = None
    """Training dialogues: a SParC, CoSQL, Spider or BIRD JSON file, or .jsonl or .csv with db_id,
    question and sql. null: the embedded world's, if `dev` is null too."""
    dev: str | None = None
    """Held-out dialogues on databases that training never sees. null: the embedded world."""
    dev_seen: str | None = None
    """Held-out dialogues on training databases. null: none."""
    tables: str | None = None
    """The official tables.json. null: schemas are read from the database files."""
    databases: str | None = None
    """Folder with <db_id>/<db_id>.sqlite or <db_id>.sqlite (or .sqlite3, .db, .db3). null: the toy
    world's."""
    goals: bool = False
    """Train also on the goal of each SParC or CoSQL dialogue (`final`), as a question without
    history. The paper's 9,337 and 11,905 training items are as many as the turns and goals without
    those on the database baseball_1."""
    held_out_goals: bool = False
    """Add the goals to the held-out splits, too (to those of training databases only together with
    `goals`). The scores are then not those of the official dev sets."""
    ex: Literal["auto", "official", "set"] = "auto"
    """How EX compares two results. official: as the evaluator of Spider, SParC and CoSQL. set: as
    that of BIRD, in which repeated rows and the order of rows do not count, and the order of
    columns does. auto: set for files in BIRD's format. The reward follows it."""
    leave_out: str | None = None
    """File of the turns that training leaves out, with one `turn id<TAB>reason` a line, as the
    audit writes it (leave_out.tsv). null: none is left out."""
    hold_out: float | None = None
    """Training databases that no training sees, so that a model can be selected on them: a number
    of databases, or below 1 a fraction. null: a twentieth of 10 or more databases, none of fewer
    and none of the embedded world. Both stages must set the same."""
    hold_out_seed: int = 0
    """Draws these databases. It is no part of `seed`, so that all runs hold out the same ones."""
    toy_folder: str = "data/toyworld"
    """Folder of the embedded world. It is written there once."""
    toy_seed: int = 0
    """Seed of the embedded world."""

    def __post_init__(self) -> None:
        require_choices(self, "data")
        names = ("train", "dev", "dev_seen", "tables", "databases")
        named = [name for name in names if getattr(self, name)]
        missing = [f"data.{name}" for name in ("dev", "databases") if not getattr(self, name)]
        if named and missing:
            raise ValueError(f"data.{named[0]} is set: {' and '.join(missing)} must be set too")
        share = self.hold_out
        if share is not None and (share < 0 or (share > 1 and share != int(share))):
            raise ValueError(
                f"data.hold_out is {share}: it must be 0, a fraction below 1, or a whole number"
            )
        if self.hold_out_seed and (share == 0 or (share is None and self.is_toy)):
            raise ValueError(
                "data.hold_out_seed has no effect: data.hold_out holds no database out"
            )
        if self.leave_out and named and not self.train:
            raise ValueError(
                "data.leave_out is set, but data.train is not: leave_out only has an effect on the "
                "training split"
            )
        for key, needs in (("goals", "train"), ("held_out_goals", "dev")):
            if getattr(self, key) and not getattr(self, needs):
                raise ValueError(f"data.{key} is set, but data.{needs} names no file with goals")

    @property
    def is_toy(self) -> bool:
        """Whether the embedded world is used."""
        return self.dev is None


def toy_files(config: DataConfig) -> DataConfig:
    """Write the embedded world if it is not there yet and return the configuration that names its
    files."""
    folder = Path(config.toy_folder)
    try:
        _write_toy_world(folder, config.toy_seed)
    except OSError as error:
        raise ValueError(
            f"data.toy_folder {folder}: cannot be written: {error.strerror}"
        ) from error
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
    """Write the embedded world, and leave nothing behind if that fails or is interrupted. If
    another process has written the folder meanwhile, its folder is used."""
    try:
        write_toy_world(folder, seed, WorldConfig())
    except OSError as error:
        is_taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir()
        if not is_taken:
            raise
        # This call checks that the other process has written the same world.
        write_toy_world(folder, seed, WorldConfig())
    finally:
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)


def held_out_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits with a file that no run learns from."""
    if config.is_toy:
        return ("dev", "dev_seen")
    return tuple(name for name in ("dev", "dev_seen") if getattr(config, name) is not None)


def load_split(config: DataConfig, name: str) -> Corpus:
    """The corpus of split `name` ("train", "dev" or "dev_seen"). ValueError that names the key if
    the split has no file."""
    files = toy_files(config) if config.is_toy else config
    file: str | None = getattr(files, name)
    if file is None or files.databases is None:  # without `databases` no file may be set
        raise ValueError(f"data.{name} is not set, but this run needs it")
    has_goals = config.goals if name == "train" else config.held_out_goals
    corpus = load_corpus(file, files.tables, files.databases, has_goals=has_goals, ex=config.ex)
    if name == "train" and config.leave_out:
        return without_turns(corpus, Path(config.leave_out))
    return corpus


def read_leave_out(file: Path) -> dict[str, str]:
    """Read turn id -> reason. ValueError that names file and line if a line is malformed or names a
    turn a second time."""
    reasons: dict[str, str] = {}
    for number, line in enumerate(read_lines(file, "data.leave_out"), 1):
        where = f"data.leave_out {file}, line {number}"
        turn_id, _, reason = line.partition("\t")
        turn_id = turn_id.strip()
        reason = reason.strip()
        if not turn_id or not reason:
            raise ValueError(f"{where}: expected turn id<TAB>reason, found {line!r:.80}")
        if turn_id in reasons:
            raise ValueError(f"{where}: turn {turn_id} was named before")
        reasons[turn_id] = reason
    return reasons


def without_turns(corpus: Corpus, file: Path) -> Corpus:
    """The corpus without the turns that the file names; later turns keep them in their history.

    ValueError if the corpus does not have one of the turns, or if no turn is left.
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
        if turns:
            dialogues.append(replace(dialogue, turns=turns))
    if not dialogues:
        raise ValueError(f"data.leave_out {file}: no turn is left")
    return replace(corpus, dialogues=dialogues, left_out=reasons)


def describe_skipped(corpus: Corpus) -> str:
    """One line that counts the turns that are not used, by reason, and says if EX has another rule
    than the official one. Empty if there is neither."""
    parts = []
    if corpus.skipped:
        turns_of: Counter[str] = Counter()
        for skip in corpus.skipped:
            turns_of[skip.reason] += skip.num_turns
        num_dialogues = len({(skip.file, skip.index) for skip in corpus.skipped})
        most = [f"{count} {reason}" for reason, count in turns_of.most_common(MOST_REASONS)]
        rest = turns_of.total() - sum(count for _, count in turns_of.most_common(MOST_REASONS))
        most += [f"{rest} for other reasons"] if rest else []
        parts.append(
            f"skipped {turns_of.total()} unusable turns of {num_dialogues} dialogues "
            f"({', '.join(most)})"
        )
    if corpus.left_out:
        counts = Counter(reason.split(":")[0] for reason in corpus.left_out.values()).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        parts.append(f"left out {len(corpus.left_out)} turns ({reasons})")
    if corpus.ex == "set":
        parts.append("EX compares sets of rows, as BIRD does")
    return "; ".join(parts)
