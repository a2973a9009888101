"""The warm start of the embedded model: SFT on the toy world's demonstrations, made once and kept.

Its folder is named by a hash of all that it is made of, so that runs with the same settings share
it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mtsql.files import WriteError, print_line
from mtsql.run.checkpoint import Checkpoint, newest_checkpoint, resumed
from mtsql.run.config import to_dict
from mtsql.run.launch import from_main, run_folder
from mtsql.run.runlog import NotFinite
from mtsql.workbench import digest, warm_start_texts


def warm_start_key(sft: Any) -> str:
    """A hash of all that makes a warm start what it is, except for the code that learns: the
    settings, the precision that `model.dtype` means on this machine, and the texts to learn
    from."""
    settings = to_dict(replace(sft, env=replace(sft.env, num_sql_workers=0)))  # changes no result
    for without_effect in ("run", "resume", "engine", "checkpoint"):
        del settings[without_effect]
    texts = warm_start_texts(sft.data, sft.env, sft.style)
    return digest([json.dumps(settings), str(sft.model.compute_dtype), *texts])


def make_warm_start(
    sft: Any,
    folder: Path,
    accelerator: Accelerator,
    train: Callable[[Any, Checkpoint | None, Accelerator], None],
) -> None:
    """Make the warm start of configuration `sft` (of train_sft.py, whose `warm_start` is `train`).

    It is trained beside its folder, which is then renamed. After Ctrl-C or a kill the same command
    goes on with it. If another process is making the same one, wait for that.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        with run_folder(
            accelerator, partial, purpose="warm start", wait=True, kept=kept_of_warm_start
        ):
            if from_main(accelerator, (folder / "model").is_dir):
                return
            is_begun = any((partial / name).is_file() for name in ("config.yaml", "metrics.jsonl"))
            if accelerator.is_main_process:
                what = "going on with the one that was begun" if is_begun else "training one"
                print_line(f"no warm start in {folder}: {what} (it is kept for later runs)")
            sft = replace(sft, run=str(partial), resume=str(partial) if is_begun else None)
            try:
                train(*resumed(sft), accelerator)
            except (WriteError, NotFinite):
                raise
            except ValueError as error:
                if not is_begun:
                    raise
                advice = f"the warm start in {partial} was begun earlier; if it is damaged, delete "
                raise ValueError(f"{error}; {advice}that folder to train it anew") from error
            accelerator.free_memory()
            if accelerator.is_main_process:
                os.replace(partial, folder)
            accelerator.wait_for_everyone()
    except KeyboardInterrupt as stop:
        kept = "before its first step"
        if begun := newest_checkpoint(partial):
            kept = f"after {int(begun.name.removeprefix('update-'))} optimizer steps"
        raise type(stop)(f"in the warm start, {kept}; the same command goes on with it") from None


def kept_of_warm_start(partial: Path) -> str:
    """What a warm start that cannot go on leaves, and how to go on with it."""
    if begun := newest_checkpoint(partial):
        return f"{begun} is kept: the same command goes on with the warm start"
    return "no step of the warm start is kept: the same command starts it again"
