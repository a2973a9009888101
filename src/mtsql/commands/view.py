"""Write a page to look at the trajectories of a run: RUN/view.html.

    mtsql view runs/rl
    mtsql view runs/rl --updates 1 20 40
    mtsql view runs/eval-warm runs/eval-rl --out compare.html

The page is one file. A browser opens it from the disk and loads nothing from
the network. It lists the groups of all updates and evaluations that have been
kept (docs/trajectories.md), with filters; shows a turn's trajectories alone,
beside their siblings, or beside those of another update; and colours each
token. With two runs, each turn stands beside the same turn of the other one.
Press ? on the page for its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line, write_text
from mtsql.run.config import parse_config
from mtsql.run.screen import wrapped
from mtsql.viewer.page import PageData, page_text
from mtsql.viewer.read import kept_files, read_records, that_fit


@dataclass(frozen=True)
class Config:
    """Flags of mtsql view."""

    runs: tuple[str, ...] = ()
    """The run, or two runs to compare: folders of train_rl.py or eval.py, or single .jsonl.gz
    files. They may also be given without the name of the flag."""
    updates: tuple[int, ...] = ()
    """Updates to show, such as 1 20 40, with the evaluations after them. Without any: all."""
    out: str | None = None
    """File to write, NAME.html. null: view.html in the folder of the first run."""
    max_mb: float = 40.0
    """Maximum size of all files that the page is made of, in megabytes. Of more, some updates are
    shown, evenly spread; which ones are left out is printed."""

    def __post_init__(self) -> None:
        if not self.max_mb > 0:
            raise ValueError(f"max_mb is {self.max_mb}: it must be above 0")


def main(words: Sequence[str]) -> None:
    """Read the runs that the words name, and write the page."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if not 1 <= len(config.runs) <= 2:
        raise ValueError(f"view needs one run, or two to compare; found {len(config.runs)}")
    if len({Path(run).resolve() for run in config.runs}) < len(config.runs):
        raise ValueError(f"both runs are {config.runs[0]}: name two different ones, or one of them")
    first = Path(config.runs[0])
    out = (
        Path(config.out)
        if config.out
        else (first if first.is_dir() else first.parent) / "view.html"
    )
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: the page replaces this file, so its name ends with .html")
    data = PageData(list(config.runs))
    for number, run in enumerate(config.runs):
        found = kept_files(Path(run), config.updates)
        chosen = that_fit(found, int(config.max_mb * 1e6 / len(config.runs)))
        if len(chosen) < len(found):
            data.notes.append(
                f"{run}: {len(found) - len(chosen)} of {len(found)} files are left out, because "
                f"all have more than {config.max_mb:g} MB: --updates or --max_mb choose others"
            )
        for file in chosen:
            data.add(number, read_records(file.path))
    if not data.index:
        raise ValueError(f"run {config.runs[0]}: its files of trajectories are empty")
    write_text(out, page_text(data))
    for note in data.notes:
        print_line(wrapped(f"note: {note}"))
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    counts = f"{data.num_trajectories} trajectories of {len(data.index)} groups, {size}"
    print_line(wrapped(f"{out}: {counts}"))
