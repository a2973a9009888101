"""The recipes that the flags `--resume`, `--from` and `--preset` stand for.

--resume runs/rl                               runs/rl/config.yaml
--from runs/rl                                 the same file, but its `keep` (and, if its curriculum
                                               is not kept, its `schedule_updates`) has the default;
                                               starts from the newest checkpoint
--from runs/rl/checkpoints/update-00100        the same file; starts from this checkpoint
--preset dapo                                  configs/presets/dapo.yaml
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from mtsql.run.recipes import read_yaml


@dataclass(frozen=True)
class OldRun:
    """The run that a new run of train_rl.py starts from. It is only read."""

    folder: Path
    checkpoint: Path | None
    """The checkpoint that `--from` names. None: the newest."""

    @property
    def recipe(self) -> Path:
        """Its configuration."""
        return self.folder / "config.yaml"


def old_run(name: str) -> OldRun:
    """The run, and perhaps the checkpoint, that `--from` names. ValueError if it is no run of
    train_rl.py."""
    path = Path(name)
    is_checkpoint = path.parent.name == "checkpoints"
    run = OldRun(path.parent.parent, path) if is_checkpoint else OldRun(path, None)
    if not run.recipe.is_file():
        raise ValueError(
            f"from {name}: no config.yaml in {run.folder}: name the folder of a run, or one of its "
            "checkpoints (RUN/checkpoints/update-00100)"
        )
    if "num_updates" not in read_yaml(run.recipe):
        raise ValueError(
            f"from {name}: not a run of train_rl.py; the model of a run of train_sft.py starts a "
            f"new one with --model.path {run.folder}/model"
        )
    return run


COUNTED_FROM_ZERO = "--schedule_updates=null"
"""The flag of a run that starts from another one without its curriculum. The length of the old
run's schedules, which --resume may have set, has no meaning for it."""


def keep_as_new(kind: type) -> str:
    """The flag `--keep` with its default. What the old run has kept of an older one is no choice
    for the new run."""
    [keep] = [field.default for field in fields(kind) if field.name == "keep"]
    return f"--keep={json.dumps(keep)}"


def preset_names(folder: Path | None) -> list[str]:
    """The names of the presets: the recipes in their folder, without `.yaml`."""
    return sorted(file.stem for file in folder.glob("*.yaml")) if folder is not None else []


def implied_recipe(
    preset: str | None, resume: str | None, presets: Path | None, names: list[str]
) -> Path | None:
    """The recipe that `--resume` or `--preset` stands for."""
    if resume is not None:
        file = Path(resume) / "config.yaml"
        if not file.is_file():
            raise ValueError(f"resume {resume}: no config.yaml there, so no run to continue")
        return file
    if preset is None:
        return None
    if presets is None or preset not in names:
        raise ValueError(f"preset is {preset}: expected one of {', '.join(names)} or null")
    return presets / f"{preset}.yaml"
