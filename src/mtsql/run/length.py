"""How long a run is: `num_updates`, and `schedule_updates`, over which its schedules are laid out.

The learning rate and the stages of the curriculum depend on a number of updates. If that number
were `num_updates`, another one would change what is done. So a run that is prolonged or shortened
keeps the number that its schedules were laid out over: it equals a straight run with both keys.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mtsql.files import write_text
from mtsql.run.implied import old_run
from mtsql.run.recipes import read_yaml

LENGTH = ("num_updates", "schedule_updates")
"""The keys of a run that say how long it is."""


def scheduled_updates(values: dict[str, Any]) -> int:
    """The number of updates that the schedules of a configuration, as plain values, are laid out
    over."""
    number: int = values["schedule_updates"] or values["num_updates"]
    return number


def with_kept_schedule(config: Any) -> Any:
    """The configuration of a run that is resumed, or that goes on from another run's place: with
    another `num_updates` than before and no `schedule_updates`, it gets the number that it was laid
    out over.

    ValueError that names both ways out if a run is prolonged beyond the end of a learning rate that
    falls.
    """
    if config.resume:
        run = Path(config.resume)
    elif config.from_run and "curriculum" in config.keep:
        run = old_run(config.from_run).folder
    else:
        return config
    saved = read_yaml(run / "config.yaml")
    if "schedule_updates" not in saved:  # `check_unchanged` names the older source
        return config
    is_open = config.schedule_updates is None and saved["schedule_updates"] is None
    if not is_open or config.num_updates == saved["num_updates"]:
        return config
    end = scheduled_updates(saved)
    if config.num_updates > end and config.optim.schedule != "constant":
        raise ValueError(
            f"num_updates is {config.num_updates}, but optim.schedule={config.optim.schedule} of "
            f"{run} ends after {end} updates: keep the rate that it ends at "
            f"(--schedule_updates {end}), or lay out rate and stages anew for the updates to come "
            f"(--schedule_updates {config.num_updates})"
        )
    return replace(config, schedule_updates=end)


def keep_length(run: Path, config: Any) -> None:
    """Write the length of a run that is resumed into its config.yaml, so that it can be resumed
    again without the flags, and so that the file describes the run as it is."""
    file = run / "config.yaml"
    saved = read_yaml(file)
    now = {key: getattr(config, key) for key in LENGTH if hasattr(config, key)}
    if now and any(saved.get(key) != value for key, value in now.items()):
        write_text(file, yaml.safe_dump(saved | now, sort_keys=False))


def require_updates_left(config: Any, num_done: int, run: str) -> None:
    """ValueError if a run has already done more updates than it shall have."""
    if hasattr(config, "num_updates") and num_done > config.num_updates:
        raise ValueError(
            f"num_updates is {config.num_updates}, but {run} has done {num_done} updates: a run "
            "cannot be shortened to less than its newest checkpoint. An earlier checkpoint can "
            "start a new run: --from CHECKPOINT --run NEW"
        )
