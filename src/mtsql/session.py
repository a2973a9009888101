"""A training run on all ranks: what train_sft.py and train_rl.py have in common.

The order of a run:

    session = open_session(...)             data, model, log; a resumed run is checked
    session.load(learner)                   weights and optimizer of the checkpoint, if there is one
    session.save_checkpoint(learner, ...)   now and then
    session.save_model()                    at the end
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from mtsql.files import file_digest, read_text
from mtsql.learner.step import Learner
from mtsql.model.flops import FlopMeter, ModelFlops, device_peak
from mtsql.model.policy import is_sharded, save_policy
from mtsql.model_notes import EpisodeConfig, notes_of
from mtsql.run.checkpoint import Checkpoint, CheckpointConfig, done_at_stop, save_checkpoint
from mtsql.run.config import to_dict
from mtsql.run.inputs import check_files, check_inputs, hash_inputs, keep_inputs
from mtsql.run.length import keep_length
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog, check_free, writing
from mtsql.run.seeds import seed_update
from mtsql.run.signals import ignore_stops
from mtsql.run.trackers import Tracker, log_table, start_trackers
from mtsql.sql import held_out
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import Workbench, digest, set_up

Notes = dict[str, dict[str, Any]]
"""File name -> content of JSON files in a model folder."""


class RunConfig(EpisodeConfig, Protocol):
    """What the configurations of train_sft.py and train_rl.py have in common."""

    @property
    def run(self) -> str: ...

    @property
    def resume(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def checkpoint(self) -> CheckpointConfig: ...

    @property
    def trackers(self) -> Sequence[Tracker]: ...


def check_folder(config: RunConfig, begun: Checkpoint | None, accelerator: Accelerator) -> None:
    """ValueError, before anything is loaded, if the run folder holds another run, or if the files
    of a resumed run have changed. Then start the trackers, which may ask the user to log in."""
    run = Path(config.run)
    ranks = Ranks.of(accelerator)
    if config.resume:
        ranks.on_main(check_files, run, config)
    else:
        ranks.on_main(check_free, run)
    if config.trackers:
        first_step = begun.state["update"] + 1 if begun else 0
        start_trackers(accelerator, run, config, first_step)


@dataclass
class Session:
    """The parts of a training run that do not depend on what is learned."""

    config: RunConfig
    accelerator: Accelerator
    ranks: Ranks
    workbench: Workbench
    log: RunLog
    begun: Checkpoint | None
    """The checkpoint that a resumed run continues from."""
    meter: FlopMeter

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run)

    @property
    def state(self) -> dict[str, Any]:
        """What the checkpoint says of the run; empty without one."""
        return self.begun.state if self.begun else {}

    def load(self, learner: Learner) -> None:
        """Give the learner the weights and the optimizer of the checkpoint, if there is one."""
        if self.begun:
            learner.load_state(self.begun.model, self.begun.optimizer)

    def save_checkpoint(self, learner: Learner, update: int, progress: dict[str, Any]) -> None:
        """Write the checkpoint of `update` finished updates. `progress` is what the script needs
        to continue from there."""
        save_checkpoint(
            self.folder,
            update,
            self._save_policy,
            learner.state(),
            {**progress, "config": to_dict(self.config)},
            self.config.checkpoint,
            self.ranks.is_main,
        )

    def stopped(
        self, stop: KeyboardInterrupt, learner: Learner, update: int, progress: dict[str, Any]
    ) -> KeyboardInterrupt:
        """Write a checkpoint after Ctrl-C or SIGTERM. Returns the exception to raise, which says
        how to continue."""
        ignore_stops()
        # All ranks would have to gather sharded weights, and now they may be anywhere.
        can_save = not is_sharded(self.workbench.policy)
        if can_save:
            self.save_checkpoint(learner, update, progress)
        return type(stop)(done_at_stop(self.folder, update, can_save))

    def save_model(self, notes: Notes | None = None) -> None:
        """Write the policy to the folder `model` of the run, with further `notes`."""
        with writing(self.folder / "model"):
            self._save_policy(self.folder / "model", notes)

    def copy_model(self, source: Path, notes: Notes) -> None:
        """Write the model of a checkpoint of this run to the folder `model` of the run, with
        further `notes`. An older folder stays until the new one is complete."""
        if not self.ranks.is_main:
            return
        folder = self.folder / "model"
        partial, old = folder.with_name(".model.partial"), folder.with_name(".model.old")
        with writing(folder):
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.copytree(source, partial)
            for name, note in notes.items():
                (partial / name).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)

    def save_model_to(self, folder: Path) -> None:
        """Write the policy as it is now to a folder inside the run."""
        with writing(folder):
            self._save_policy(folder)

    def _save_policy(self, folder: Path, notes: Notes | None = None) -> None:
        """Write the policy with its tokenizer and notes. All ranks must call this."""
        workbench = self.workbench
        databases = held_out.names_of(workbench.corpora["train"])
        own = notes_of(self.config) | {held_out.NOTE: {"databases": databases}}
        notes = own | (notes or {})
        save_policy(workbench.policy, workbench.tokenizer, folder, self.ranks.is_main, notes)


def open_session(
    config: RunConfig,
    begun: Checkpoint | None,
    accelerator: Accelerator,
    *,
    splits: tuple[str, ...],
    max_tokens: int,
    demonstrations: Path | None = None,
    pool: Sequence[Path] = (),
    check: Callable[[Workbench], None] | None = None,
) -> Session:
    """Load data and model, check that a resumed run has the inputs that it was started with, and
    open the log. `train` is the training data without the databases that `data.hold_out` names,
    which are the split `held_out`.

    `demonstrations` and `pool` are files that the run learns from. `check` is called with what was
    loaded, before anything is written. ValueError that says what does not fit.
    """
    ranks = Ranks.of(accelerator)
    run = Path(config.run)
    seed_update(config.seed, 0, 0)  # the same on all ranks: new adapter weights are drawn here
    with accelerator.main_process_first():
        workbench = set_up(
            config.model,
            config.data,
            config.env,
            config.style,
            splits,
            config.seed,
            max_tokens,
            is_training=True,
        )
        workbench.require_prompts("train", config.max_prompt_tokens)
    if check is not None:
        check(workbench)
    inputs = {}
    if ranks.is_main:
        if demonstrations is not None:
            text = read_text(demonstrations, "demonstrations")
            inputs["the demonstrations"] = digest([text])
        if pool:
            inputs["the pool"] = digest(map(file_digest, pool))
        inputs |= workbench.inputs()
    resume_at = None
    if config.resume:
        ranks.on_main(check_inputs, run, inputs)
        state = begun.state if begun else {}
        resume_at = (state.get("update", 0), state.get("metrics_bytes", 0))
    track = accelerator.log if config.trackers else None
    track_table = partial(log_table, accelerator) if config.trackers else None
    log = RunLog(run, config, ranks.is_main, resume_at, track, track_table)
    if ranks.is_main:
        if config.resume:
            keep_length(run, config)
        files = hash_inputs(config, workbench.corpora, workbench.databases)
        keep_inputs(run, inputs | files)
        warn_of_known_databases(workbench, config.model.path, log)
    meter = flop_meter(workbench, config.model.compute_dtype, accelerator)
    return Session(config, accelerator, ranks, workbench, log, begun, meter)


def warn_of_known_databases(workbench: Workbench, model_path: str | None, log: RunLog) -> None:
    """Print a warning if the model that a run starts from was trained on databases that the run
    holds out. Models of other programs do not say what they were trained on."""
    if model_path is None:
        return
    names = held_out.names_of(workbench.corpora["train"])
    known = held_out.trained_on(names, Path(model_path) / held_out.NOTE)
    if known:
        log.print(
            f"warning: held_out: {model_path} was trained on {len(known)} of the {len(names)} "
            f"databases that are held out here, such as {known[0]}: both stages must set the same "
            "data.hold_out and data.hold_out_seed, or the EX on them is too high"
        )


def flop_meter(workbench: Workbench, dtype: torch.dtype, accelerator: Accelerator) -> FlopMeter:
    """The operations of the policy and the peak of all ranks' devices. On a CPU all ranks measure
    at the same time, as they also compute at the same time."""
    peaks = Ranks.of(accelerator).gather([device_peak(accelerator.device, dtype)])
    known = [peak for peak in peaks if peak is not None]
    return FlopMeter(
        ModelFlops.of(workbench.policy), sum(known) if len(known) == len(peaks) else None
    )
