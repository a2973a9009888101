"""A run of train_rl.py that starts from another run's checkpoint (`--from`).

    train_rl.py --from runs/rl/checkpoints/update-00100 --run runs/branch --reward.process_from 0

The old run's configuration is the first recipe. The weights come from the checkpoint. The reference
policy is that of the old run: the model that `model.path` names, where the old run itself started.
With the curriculum (`keep`), its stages, counts and place go on, and with them the numbers of the
updates, on which the learning rate and all random numbers depend. So the new run differs from the
old one by what the user has changed and by nothing else. Without it, the weights are probed and
the updates are counted from 0. The old run is only read.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mtsql.learner.step import Learner
from mtsql.model.policy import require_trained
from mtsql.rl.curriculum import Curriculum
from mtsql.run.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from mtsql.run.config import flat, to_dict
from mtsql.run.implied import old_run
from mtsql.run.inputs import changed_inputs
from mtsql.run.length import scheduled_updates
from mtsql.run.recipes import read_yaml
from mtsql.session import Session
from mtsql.workbench import Workbench

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    from train_rl import Config

Kept = Literal["curriculum", "optimizer"]
"""What a new run can keep of the old one, besides the weights."""
KEPT: tuple[Kept, ...] = get_args(Kept)
PROBE_KEYS = ("probe_samples", "max_probe_turns", "bounds", "shares", "drop_solved")
"""Keys of `curriculum` without an effect on one that was built before."""


def checkpoint_of(config: "Config") -> str | None:
    """The checkpoint folder that `from_run` means; None without one. It is looked up once, when the
    run starts, because the old run may go on.

    ValueError, before anything is loaded, if there is none, or for a key that does not fit.
    """
    if config.from_run is None:
        if config.keep != KEPT:
            raise ValueError("keep has no effect without --from: leave it out")
        return None
    if config.resume:  # this run has started before
        return config.from_run
    run = old_run(config.from_run)
    where = f"from {config.from_run}"
    if Path(config.run).resolve() == run.folder.resolve():
        raise ValueError(f"{where}: name the folder of the new run with --run")
    if len(set(config.keep)) < len(config.keep):
        raise ValueError(f"keep names {config.keep[0]} twice: name it once")
    if "curriculum" in config.keep:
        before = flat(read_yaml(run.recipe))
        now = flat(to_dict(config))
        for key in (f"curriculum.{name}" for name in PROBE_KEYS):
            if now[key] != before.get(key):
                raise ValueError(
                    f"{key} has no effect, because the curriculum of {run.folder} is kept: leave "
                    "it, or leave curriculum out of keep"
                )
    found = run.checkpoint or newest_checkpoint(run.folder)
    if found is None or not found.is_dir():
        name = found or f"{run.folder}/checkpoints"
        raise ValueError(f"{where}: there is no checkpoint {name}")
    return str(found)


def read_origin(config: "Config", begun: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that a new run starts from; None for a run that starts by itself or that has
    a checkpoint of its own. ValueError if it is damaged or has no update left to do."""
    if config.from_run is None or begun is not None:
        return None
    origin = read_checkpoint(Path(config.from_run), "start from another checkpoint with --from")
    if "curriculum" not in origin.state:
        raise ValueError(f"from {config.from_run}: not a checkpoint of train_rl.py")
    num_done = origin.state["update"]
    if "curriculum" in config.keep and num_done >= config.num_updates:
        raise ValueError(
            f"num_updates is {config.num_updates}, and from {config.from_run} has done {num_done} "
            "updates: raise num_updates, or leave curriculum out of keep to count from 0"
        )
    return origin


def check_origin(workbench: Workbench, origin: Checkpoint, keep: Collection[Kept]) -> None:
    """ValueError, before anything is written, if the model has other weights than the checkpoint,
    or if the kept curriculum has turns that the training data lacks."""
    require_trained(workbench.policy, origin.model)
    if "curriculum" not in keep:
        return
    curriculum = Curriculum.from_state(origin.state["curriculum"])
    known = {turn.turn_id for turn in workbench.corpora["train"].turns}
    unknown = sorted({turn_id for stage in curriculum.stages for turn_id in stage} - known)
    if unknown:
        raise ValueError(
            f"keep has curriculum, but {len(unknown)} of its turns are not in the training data, "
            f"such as {unknown[0]}: use the old run's data, or leave curriculum out of keep"
        )


def load_origin(
    session: Session, learner: Learner, origin: Checkpoint, keep: Collection[Kept]
) -> None:
    """Give the learner the weights of the old run's checkpoint, and its optimizer if it is kept.
    The reference policy stays what it is. Prints in which inputs the runs differ."""
    learner.load_state(origin.model, origin.optimizer if "optimizer" in keep else {})
    if session.ranks.is_main:
        run = old_run(str(origin.folder)).folder
        changed = changed_inputs(session.folder, run)
        if changed:
            session.log.print(f"other inputs than in {run}: {', '.join(changed)}")


def keep_past_stages(curriculum: Curriculum, state: dict[str, Any], num_scheduled: int) -> None:
    """Keep the stages of the finished updates of a checkpoint if the updates to come are laid out
    over another number of updates."""
    before = scheduled_updates(state["config"])
    if before != num_scheduled:
        curriculum.lay_out_anew(state["update"], before)
