"""A dry run: the checks of the real run, then all of its phases on a small random model.

<run>-dry/              replaced by the next dry run of the same configuration
    dry_run.json        says so, and which model's shape was taken
    stand-in/           the random model
    run/                the run: config.yaml, metrics.jsonl, model/ and all else
"""

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mtsql.agent.exchange import sample_exchange
from mtsql.dry.guided import GUIDED_FRAC, GuidedEnv
from mtsql.dry.report import Episodes, Prompts, measure_episodes, measure_prompts, show_plan
from mtsql.dry.small import small, with_values
from mtsql.dry.stand_in import (
    MARK,
    NUM_LAYERS,
    Original,
    embedded_original,
    folder_of_shape,
    original,
    write_mark,
    write_stand_in,
)
from mtsql.eval_cells import data_sets
from mtsql.files import print_line
from mtsql.model.decoder import CausalLM
from mtsql.model.rendering import Renderer
from mtsql.run.checkpoint import newest_checkpoint
from mtsql.run.launch import NothingLearned
from mtsql.run.screen import duration, wrapped
from mtsql.sql.datasets import load_split, read_leave_out
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.workbench import Workbench, embedded_tokenizer, load_corpora, playing_in

LEAVE_OUT = "leave_out.tsv"
LEAST_TURNS = 200
"""Training turns of a dry run, if one per cent of them is less."""


@dataclass(frozen=True)
class Checked:
    """What the first part of a dry run finds out about the real run."""

    config: Any
    """The configuration of the real run, completed."""
    model: Original
    prompts: list[Prompts]
    episodes: Episodes | None


def dry_run(config: Any, main: Callable[[Any], None]) -> None:
    """Check the configuration of a script on its real data, then run `main` of the script on a
    small random model, stop it before its last checkpoint and resume it, and print what the real
    run will do. ValueError for whatever would stop the real run."""
    if getattr(config, "resume", None):
        raise ValueError("--dry_run tries a new run: leave out --resume")
    start = time.monotonic()
    folder = Path(f"{config.run.rstrip('/')}-dry")
    state = PartialState(cpu=not torch.cuda.is_available())
    checked = None
    if state.is_main_process:
        make_folder(folder)
        checked = check(config, folder)
    state.wait_for_everyone()
    run = folder / "run"
    tried = small(config, run, folder / "stand-in")
    if (folder / LEAVE_OUT).is_file():
        tried = with_values(tried, {"data.leave_out": str(folder / LEAVE_OUT)})
    if hasattr(tried, "style") and config.model.path is None:
        tried = replace(tried, style=config.style or "brief")
    tried = tried.completed()
    is_training = hasattr(tried, "checkpoint")
    with playing_in(GuidedEnv):
        _run(main, tried)
        if is_training:
            before = _digest(run)
            state.wait_for_everyone()
            if state.is_main_process:
                _stop_before_the_end(run)
            state.wait_for_everyone()
            _run(main, replace(tried, resume=str(run)).completed())
    if checked is None:
        return
    print_line("")
    show_plan(checked.config, checked.model, checked.prompts, checked.episodes)
    if is_training:
        is_same = before == _digest(run)
        print_line("resumed: " + ("the same model bit for bit" if is_same else "another model"))
    if (Path(config.run) / "metrics.jsonl").exists():
        print_line(f"{config.run} already holds a run: the real run needs another --run")
    print_line(f"dry run: done in {duration(time.monotonic() - start)}, its files are in {folder}")


def check(config: Any, folder: Path) -> Checked:
    """Check the real run as far as that needs no weights, and write the stand-in of its model."""
    real = replace(config, dry_run=False)
    source = None
    if config.model.path is not None:
        source = folder_of_shape(config.model)
        if source != config.model.path:
            print_line(f"dry run: {config.model.path} is not there yet: the shape is of {source}")
        real = replace(real, model=replace(config.model, path=source))
    real = real.completed()
    corpora = corpora_of(real)
    if source is None:
        tokenizer = embedded_tokenizer(
            corpora, config.data, real.env, real.style, config.model.embedded.vocab_size
        )
        model = embedded_original(config.model.embedded, tokenizer)
    else:
        model = original(config.model, source)
    sampled = getattr(config, "selftaught", config.sampling).temperature
    write_stand_in(model, folder / "stand-in", sampled, seed=0)
    write_mark(folder, source or "")
    print_line(
        wrapped(
            f"dry run of {config.run}: a random model of {NUM_LAYERS} narrow layers stands in "
            f"for {model.name}. It gets nothing right. So in {GUIDED_FRAC:.0%} of the "
            "episodes the environment reads the gold query in place of what the model wrote, and "
            "these count as right: no score below means anything."
        )
    )
    with torch.device("meta"):
        policy = CausalLM(model.shape)
    workbench = Workbench(
        model.tokenizer, Renderer(model.tokenizer), policy, corpora, real.env, real.style
    )
    split = next(iter(corpora))
    exchange = sample_exchange(workbench.env_maker(split)(corpora[split].turns[0]))
    difference = workbench.renderer.template_difference(*exchange)
    print_line(wrapped(f"template: {difference or 'our tokens are those of the chat template'}"))
    prompts = [measure_prompts(workbench, name, real.max_prompt_tokens) for name in corpora]
    if "train" in corpora and getattr(config, "source", "self") in ("self", "gold"):
        leave_out_most(corpora["train"].turns, config.data.leave_out, folder / LEAVE_OUT)
    return Checked(real, model, prompts, measure_episodes(workbench, split))


def leave_out_most(turns: Sequence[Turn], earlier: str | None, file: Path) -> None:
    """Write a file for `data.leave_out` that keeps LEAST_TURNS of the turns or one per cent of
    them, drawn by a fixed seed, and leaves out those of the file `earlier` as well. If there are no
    more turns, no file is written."""
    num_kept = max(LEAST_TURNS, len(turns) // 100)
    if num_kept >= len(turns):
        return
    kept = {turn.turn_id for turn in random.Random(0).sample(turns, num_kept)}
    reasons = read_leave_out(Path(earlier)) if earlier else {}
    reasons |= {turn.turn_id: "dry run" for turn in turns if turn.turn_id not in kept}
    lines = [f"{turn_id}\t{reason}\n" for turn_id, reason in reasons.items()]
    file.write_text("".join(lines), encoding="utf-8")


def corpora_of(config: Any) -> dict[str, Corpus]:
    """What a completed configuration reads, by split; for eval.py by data set, and without the
    dialogues that it leaves out."""
    if hasattr(config, "num_updates"):
        return load_corpora(config.data, ("train", *config.eval_splits), is_training=True)
    if hasattr(config, "selftaught"):
        held_out = config.selftaught.eval_split if config.source == "self" else None
        splits = ("train", held_out) if held_out else ("train",)
        return load_corpora(config.data, splits, is_training=True)
    found = {one.name: load_split(one.data, one.split) for one in data_sets(config)}
    most = config.max_dialogues
    return {name: replace(one, dialogues=one.sample_dialogues(most)) for name, one in found.items()}


def make_folder(folder: Path) -> None:
    """An empty folder for a dry run, in place of that of an earlier dry run. ValueError if there is
    a folder that no dry run has made."""
    if folder.exists():
        if not (folder / MARK).is_file() and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: this folder is not that of a dry run: move it, or name another --run"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_mark(folder, "")


def _run(main: Callable[[Any], None], config: Any) -> None:
    try:
        main(config)
    except NothingLearned as error:
        print_line(wrapped(f"warning: {error}"))


def _stop_before_the_end(run: Path) -> None:
    """Leave of a finished run what would be there if it had been killed after its last checkpoint
    but one."""
    newest = newest_checkpoint(run)
    if newest is not None:
        shutil.rmtree(newest)
        print_line(f"dry run: {newest} and the model are deleted, and the run is resumed")
    shutil.rmtree(run / "model", ignore_errors=True)


def _digest(run: Path) -> str:
    """A hash of the weights that a run has saved at its end: its model and its last checkpoint."""
    total = hashlib.blake2b()
    newest = newest_checkpoint(run)
    for folder in (run, newest) if newest else (run,):
        for file in sorted((folder / "model").glob("*.safetensors")):
            total.update(file.read_bytes())
    return total.hexdigest()
