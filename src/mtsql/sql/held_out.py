"""Training databases that are held out: no training sees them, and a model is selected on them.

To select a model on the test data (`data.dev`) would make its score there too high. Dialogues of
the training file that share a database with the training would be too easy. So whole databases are
held out. Which ones depends on their names and on `data.hold_out_seed` only, so both stages and all
seeds hold out the same ones, and SParC and CoSQL, which share databases, mostly the same ones.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from mtsql.files import read_json
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Corpus

SPLIT = "held_out"
"""The name of the split."""
NOTE = "held_out.json"
"""The file in the folder of a trained model that names the databases held out of its training."""
SHARE = 0.05
"""The default fraction of the training databases."""
MIN_DATABASES = 10
"""By default nothing is held out of fewer training databases, which are needed for training."""
REASON = "held out"
"""Why a turn is left out of the training, as `Corpus.left_out` says it."""


def hold_out(corpus: Corpus, config: DataConfig) -> tuple[Corpus, Corpus | None]:
    """The training corpus without its held-out databases, and the corpus of these; None if none
    is held out. The first one names the held-out turns in `left_out`. Goals are in the second one
    only with `data.held_out_goals`.

    ValueError if no database or, because of `data.leave_out`, no turn would be left on either side.
    """
    names = held_out_databases(sorted(corpus.databases), config)
    if not names:
        return corpus, None
    ours = [dialogue for dialogue in corpus.dialogues if dialogue.db_id in names]
    rest = [dialogue for dialogue in corpus.dialogues if dialogue.db_id not in names]
    if not ours or not rest:
        where = "to train on" if ours else f"on the held-out databases ({', '.join(sorted(names))})"
        raise ValueError(
            f"data.hold_out and data.leave_out together leave no turn {where}: hold out others "
            "(data.hold_out_seed) or more, or none (0)"
        )
    reasons = {
        turn.turn_id: f"{REASON}: database {turn.db_id}"
        for dialogue in ours
        for turn in dialogue.turns
    }
    train = replace(
        corpus,
        dialogues=rest,
        databases={name: db for name, db in corpus.databases.items() if name not in names},
        left_out=corpus.left_out | reasons,
    )
    if not config.held_out_goals:
        ours = [dialogue for dialogue in ours if not dialogue.is_goal]
    return train, Corpus(ours, {name: corpus.databases[name] for name in sorted(names)})


def names_of(train: Corpus) -> list[str]:
    """The ids of the databases that are held out of a training corpus."""
    start = f"{REASON}: database "
    reasons = {reason for reason in train.left_out.values() if reason.startswith(start)}
    return sorted(reason.removeprefix(start) for reason in reasons)


def trained_on(held_out: list[str], note: Path) -> list[str]:
    """Which of the databases that a run holds out its model has been trained on, by the note in its
    folder; none if it has no note."""
    if not note.is_file():
        return []
    before = read_json(note)
    known = before.get("databases") if isinstance(before, dict) else None
    return [name for name in held_out if isinstance(known, list) and name not in known]


def require_whole(config: DataConfig, script: str) -> None:
    """ValueError if `data.hold_out` is set for a script that reads whole files."""
    if config.hold_out is not None:
        raise ValueError(
            f"data.hold_out has no effect in {script}, which reads whole files: leave it out"
        )


def held_out_databases(db_ids: list[str], config: DataConfig) -> set[str]:
    """The ids of the databases to hold out, of all those of the training. ValueError that names
    `data.hold_out` if no database would be left."""
    count = _count(len(db_ids), config)
    if count >= len(db_ids):
        raise ValueError(
            f"data.hold_out is {config.hold_out:g}, but the training data has {len(db_ids)} "
            "databases: hold out fewer of them, or none (0)"
        )
    return set(sorted(db_ids, key=lambda db_id: _place(db_id, config.hold_out_seed))[:count])


def _count(num_databases: int, config: DataConfig) -> int:
    share = config.hold_out
    if share is None:
        if config.is_toy or num_databases < MIN_DATABASES:
            return 0
        share = SHARE
    if share >= 1 or share == 0:
        return int(share)
    return max(1, round(share * num_databases))


def _place(db_id: str, seed: int) -> bytes:
    """The place of a database in the drawn order. It does not depend on the other databases."""
    return hashlib.blake2b(f"{seed}/{db_id}".encode(), digest_size=8).digest()
