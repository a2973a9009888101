"""Draw the figures of the paper from runs and evaluations.

    mtsql plots runs/rl
    mtsql plots runs/seed0 runs/seed1 --out runs/figures
    mtsql plots runs/eval-warm runs/eval-rl --names "warm start" "+ RL"
    mtsql plots runs/rl --updates 0 20 40

A RUN is a folder of train_rl.py or of eval.py, or a file
eval/SPLIT-UPDATE.json of a training run. Training runs, also unfinished ones,
give the reward and the reply length by curriculum stage and the held-out EX
and EM over the updates. Evaluations give EX by turn and by hardness, the five
abilities with EX, and the aha share, with 95 % intervals (bootstrap by
dialogue); of a training run the first and the last evaluation are compared.
Only checkpoints that have played the same turns stand in one figure.

Each figure is written as PNG, as SVG and, its data, as CSV. The folder is
that of --out, or else the folder `figures` in the run, of several runs beside
them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context

from mtsql.commands.arguments import spelled_out
from mtsql.files import print_line
from mtsql.plots.bars import evaluation_figures
from mtsql.plots.curves import training_figures
from mtsql.plots.sources import read_sources
from mtsql.plots.style import STYLE, save
from mtsql.run.config import parse_config
from mtsql.run.screen import wrapped


@dataclass(frozen=True)
class Config:
    """Flags of mtsql plots."""

    runs: tuple[str, ...] = ()
    """What is drawn. They may also be given without the name of the flag."""
    out: str | None = None
    """Folder of the figures. Files of the same names in it are replaced."""
    names: tuple[str, ...] = ()
    """Names of the runs in the figures, one for each. Without any, the ends of their paths."""
    history: str = "gold"
    """Which parts of evaluations are drawn: gold or predicted."""
    updates: tuple[int, ...] = ()
    """Evaluations of a training run that are compared as checkpoints. Without any, the first and
    the last."""
    window: int | None = None
    """Updates of the moving mean. null: a twentieth of the longest run, at least 5."""

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.runs):
            raise ValueError(
                f"names: expected one for each run, found {len(self.names)} for {len(self.runs)}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")


def main(words: Sequence[str]) -> None:
    """Draw what the words name and say where the figures are."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if not config.runs:
        raise ValueError("plots needs a run: mtsql plots RUN; --help explains it")
    paths = [Path(run) for run in config.runs]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"{missing[0]}: no such folder or file")
    sources = read_sources(paths, config.names, config.history, config.updates)
    folder = Path(config.out) if config.out else figures_folder(paths)
    with rc_context(STYLE):
        figures = training_figures(sources.trainings, config.window)
        figures += evaluation_figures(sources.sets)
    if not figures:
        raise ValueError(f"{paths[0]}: there is no update and no evaluation yet")
    for figure in figures:
        save(figure, folder)
    for note in sources.notes:
        print_line(wrapped(f"note: {note}"))
    names = ", ".join(figure.name for figure in figures)
    print_line(wrapped(f"{len(figures)} figures in {folder} (PNG, SVG, CSV): {names}"))


def figures_folder(paths: Sequence[Path]) -> Path:
    """The folder `figures` in the only run, or in the folder that holds all of them."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    if len(folders) == 1:
        return folders[0] / "figures"
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    here = Path.cwd()
    return (common.relative_to(here) if common.is_relative_to(here) else common) / "figures"
