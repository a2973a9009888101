"""What a script trains and evaluates on: official files the user brings, or the embedded toy world."""

from dataclasses import dataclass
from pathlib import Path

from mtsql.sql.dialogues import Corpus, load_corpus
from mtsql.sql.toyworld import ToySize, write_toy_world


@dataclass(frozen=True)
class DataConfig:
    """Where the dialogues and databases are. With no file named, the toy world is written once to `toy_folder`."""

    train: str | None = None
    """Training dialogues: a SParC, CoSQL or Spider JSON file."""
    dev: str | None = None
    """Held-out dialogues on databases that training never sees."""
    dev_seen: str | None = None
    """Held-out dialogues on training databases, where there are any (optional)."""
    tables: str | None = None
    """The official tables.json."""
    databases: str | None = None
    """Folder with <db_id>/<db_id>.sqlite."""
    toy_folder: str = "data/toyworld"
    """Where the embedded world is kept."""
    toy_seed: int = 0
    """Seed of the embedded world."""

    def __post_init__(self):
        named = [name for name in ("train", "dev", "tables", "databases") if getattr(self, name)]
        if named and len(named) < 4 and not (self.dev and self.tables and self.databases):
            raise ValueError(f"data.{named[0]} is set: data.dev, data.tables and data.databases are needed too")

    @property
    def is_toy(self) -> bool:
        """Whether the embedded world is used."""
        return self.dev is None


def toy_files(config: DataConfig) -> DataConfig:
    """Write the toy world if it is not there yet and return the configuration that names its files."""
    folder = Path(config.toy_folder)
    write_toy_world(folder, config.toy_seed, ToySize())
    return DataConfig(
        train=str(folder / "train.json"),
        dev=str(folder / "dev.json"),
        dev_seen=str(folder / "dev_seen.json"),
        tables=str(folder / "tables.json"),
        databases=str(folder / "database"),
        toy_folder=config.toy_folder,
        toy_seed=config.toy_seed,
    )


def load_split(config: DataConfig, name: str) -> Corpus:
    """The corpus of split `name` ("train", "dev" or "dev_seen"). ValueError naming the key if it has no file."""
    files = toy_files(config) if config.is_toy else config
    file = getattr(files, name)
    if file is None:
        raise ValueError(f"data.{name} is not set, but this run needs it")
    return load_corpus(Path(file), Path(files.tables), Path(files.databases))
