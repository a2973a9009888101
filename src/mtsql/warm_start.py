"""The warm start of the embedded model: SFT on the world's demonstrations, made once and kept.

The name of its folder is a hash of everything that it depends on, so runs with the same settings
share it.
"""

import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from mtsql import copying
from mtsql.files import WriteError, print_line
from mtsql.rl.rollout import Show, show_nothing
from mtsql.run.checkpoint import Checkpoint, newest_checkpoint, resumed
from mtsql.run.config import to_dict
from mtsql.run.launch import run_folder
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite, make_folder
from mtsql.run.screen import activity, duration, wrapped
from mtsql.workbench import digest, warm_start_texts

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    import train_sft

Train = Callable[["train_sft.Config", Checkpoint | None, Accelerator], None]
"""The function `warm_start` of train_sft.py."""


def warm_start_key(sft: "train_sft.Config", show: Show = show_nothing) -> str:
    """A hash of everything that a warm start depends on, except for the code that learns: the
    settings, the precision that `model.dtype` means on this machine, the demonstrations, and the
    code that makes the texts to copy from. `show` is told of each demonstration."""
    env = replace(sft.env, num_sql_workers=0)  # the number of workers changes no result
    settings = to_dict(replace(sft, env=env))
    for without_effect in ("run", "resume", "gold", "engine", "checkpoint", "trackers"):
        del settings[without_effect]
    del settings["model"]["few_rows"]
    settings["sft"]["whole_text_frac"] = sft.whole_text_frac  # null may mean another value later
    settings["model"]["dtype"] = "auto"  # what it means is a text of its own below
    texts = warm_start_texts(sft.data, sft.env, sft.style, show)
    copies = inspect.getsource(copying)
    return digest([json.dumps(settings), str(sft.model.compute_dtype), *texts, copies])


def kept_warm_start(
    sft: "train_sft.Config",
    parent: Path,
    accelerator: Accelerator,
    train: Train,
) -> Path:
    """The model of a warm start that is kept in a folder of `parent`. It is made if it is not
    there; see `make_warm_start`."""
    ranks = Ranks.of(accelerator)
    ranks.on_main(make_folder, parent, "warm_start_folder")
    is_there = Path(sft.data.toy_folder).exists()
    title = "reading the demonstrations" if is_there else "writing and reading the embedded world"
    with activity(title, ranks.is_main, "turns") as show:
        key = ranks.from_main(warm_start_key, sft, show)
    folder = parent / f"seed{sft.seed}-{key}"
    if not ranks.from_main((folder / "model").is_dir):
        make_warm_start(sft, folder, accelerator, train)
    return folder / "model"


def make_warm_start(
    sft: "train_sft.Config",
    folder: Path,
    accelerator: Accelerator,
    train: Train,
) -> None:
    """Make the warm start of a configuration of train_sft.py. `train` is that script's
    `warm_start`.

    The model is trained in a folder of another name, which is renamed at the end. After Ctrl-C or a
    kill the same command continues it. If another process makes the same warm start, wait for
    it.
    """
    ranks = Ranks.of(accelerator)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        with run_folder(ranks, partial, purpose="warm start", wait=True, kept=kept_of_warm_start):
            if ranks.from_main((folder / "model").is_dir):
                return
            is_begun = any((partial / name).is_file() for name in ("config.yaml", "metrics.jsonl"))
            if ranks.is_main:
                what = "continuing the one that was begun" if is_begun else "training one"
                text = f"no warm start in {folder}: {what} (it is kept for later runs)"
                print_line(wrapped(text))
            start = time.monotonic()
            sft = replace(sft, run=str(partial), resume=str(partial) if is_begun else None)
            try:
                train(*resumed(sft), accelerator)
            except (WriteError, NotFinite):
                raise
            except ValueError as error:
                if not is_begun:
                    raise
                advice = f"the warm start in {partial} was begun earlier; if it is damaged, delete "
                raise ValueError(f"{error}; {advice}that folder to train it again") from error
            accelerator.free_memory()
            if ranks.is_main:
                os.replace(partial, folder)
                text = f"warm start: done in {duration(time.monotonic() - start)}, kept in {folder}"
                print_line(wrapped(text))
            accelerator.wait_for_everyone()
    except KeyboardInterrupt as stop:
        kept = "before its first step"
        begun = newest_checkpoint(partial)
        if begun is not None:
            kept = f"after {int(begun.name.removeprefix('update-'))} optimizer steps"
        raise type(stop)(f"in the warm start, {kept}; the same command continues it") from None


def kept_of_warm_start(partial: Path) -> str:
    """What is kept of a warm start that was stopped, and how to continue it."""
    begun = newest_checkpoint(partial)
    if begun is not None:
        return f"{begun} is kept: the same command continues the warm start"
    return "no step of the warm start is kept: the same command starts it again"
