"""The cold start of train_sft.py with `source=gold`: demonstrations from the training split's gold
SQL, written to the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from mtsql.rl.replay import write_gold_demonstrations
from mtsql.run.screen import activity
from mtsql.session import Session

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    import train_sft


def gold_demonstrations(config: "train_sft.Config", session: Session) -> Path:
    """The file of demonstrations in the run folder, which is made if this run is not resumed. All
    ranks must call this. Prints what was made."""
    file = session.folder / "demonstrations.jsonl"
    with activity("demonstrations from gold SQL", session.ranks.is_main, "turns") as show:
        lines = write_gold_demonstrations(
            file,
            session.workbench.corpora["train"],
            config.gold,
            config.env,
            config.seed,
            session.ranks,
            bool(config.resume),
            show,
        )
    session.log.print("\n".join(lines))
    return file
