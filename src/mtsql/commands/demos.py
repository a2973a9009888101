"""Write demonstrations made from gold SQL, to look at or edit them before SFT.

    mtsql demos                                         # the embedded world
    mtsql demos --data.train train.json --data.dev dev.json \\
        --data.tables tables.json --data.databases database \\
        --run runs/demos-sparc

Needs no model. Writes demonstrations.jsonl to the run folder, and prints how
many turns have a demonstration, with which first tries, and why others have
none. train_sft.py --source gold makes the same file for the same data, seed,
shares and environment. To learn from an edited file:

    accelerate launch train_sft.py --source demonstrations \\
        --demonstrations runs/demos-sparc/demonstrations.jsonl ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtsql.agent.env import EnvConfig
from mtsql.commands.arguments import spelled_out
from mtsql.demos.config import GoldConfig
from mtsql.demos.gold import demonstrations
from mtsql.files import print_line, write_text
from mtsql.run.config import parse_config
from mtsql.run.locks import RunLock
from mtsql.run.screen import activity, wrapped
from mtsql.run.seeds import require_seed
from mtsql.sql.datasets import DataConfig, describe_skipped, load_split
from mtsql.sql.held_out import hold_out
from mtsql.sql.worker_pool import set_num_workers


@dataclass(frozen=True)
class Config:
    """Flags of mtsql demos."""

    run: str = "runs/demos"
    """Folder for demonstrations.jsonl."""
    seed: int = 0
    """Draws the first tries and the wording of the thoughts."""
    data: DataConfig = DataConfig()
    gold: GoldConfig = GoldConfig()
    env: EnvConfig = EnvConfig()

    def __post_init__(self) -> None:
        require_seed(self.seed)


def main(words: Sequence[str]) -> None:
    """Make the demonstrations of the training split, without its held-out databases as in a
    training; write them and print what was made."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    folder = Path(config.run)
    with RunLock(folder):
        file = folder / "demonstrations.jsonl"
        if file.exists():
            raise ValueError(f"run {folder} already holds {file.name}: name another folder")
        set_num_workers(config.env.num_sql_workers)
        corpus, _ = hold_out(load_split(config.data, "train"), config.data)
        if skipped := describe_skipped(corpus):
            print_line(wrapped(f"train: {skipped}"))
        with activity("demonstrations from gold SQL", unit="turns") as show:
            made = demonstrations(corpus, config.gold, config.env, config.seed, show)
        write_text(file, made.text())
        for line in [*made.lines(), f"written to {file}"]:
            print_line(line)
