"""The recipes that the flags `--resume`, `--from` and `--preset` stand for.

--resume runs/rl                               runs/rl/config.yaml
--from runs/rl                                 the same file; starts from the newest checkpoint
--from runs/rl/checkpoints/update-00100        the same file; starts from this checkpoint
--preset dapo                                  configs/presets/dapo.yaml
"""

from dataclasses import dataclass
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
