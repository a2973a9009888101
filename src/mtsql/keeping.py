"""What a run keeps of its trajectories: files in RUN/trajectories, written by the main rank."""

from mtsql.rl.collect import Played
from mtsql.rl.kept import KeptConfig, KeptGroup, file_content, is_kept, packed
from mtsql.rl.scored import Group, turn_of
from mtsql.rl.trajectory_record import evaluation_record, update_records
from mtsql.rl.trajectory_table import trajectory_table
from mtsql.rl.trajectory_text import update_text
from mtsql.session import Session


def keep_trajectories(
    session: Session, groups: list[Group], update: int, stage: int, config: KeptConfig
) -> None:
    """Write the trajectories of an update: some as text for a reader, those that `config` keeps as
    records, and a table for the trackers. `update` counts finished updates, `stage` the stages
    from 0. All ranks call this."""
    renderer = session.workbench.renderer
    session.log.trajectories(f"update-{update:05d}.txt", update_text(groups, renderer.text))
    session.log.table("trajectories", *trajectory_table(groups), update)
    kept = [
        (turn_of(group), packed(update_records(group, renderer, update, stage)))
        for group in groups
        if is_kept(turn_of(group), update, config)
    ]
    _write(session, f"update-{update:05d}", kept, update, config)


def keep_played(
    session: Session, played: list[Played], split: str, update: int, config: KeptConfig
) -> None:
    """Write those trajectories of an evaluation of a split that `config` keeps. All ranks call
    this."""
    renderer = session.workbench.renderer
    kept = [
        (score.turn_id, packed([evaluation_record(one, score, renderer, split, update)]))
        for one, score in played
        if is_kept(score.turn_id, update, config)
    ]
    _write(session, f"{split}-{update:05d}", kept, update, config)


def _write(
    session: Session, name: str, kept: list[KeptGroup], update: int, config: KeptConfig
) -> None:
    """Write the groups of all ranks, unless there are none."""
    content = file_content(session.ranks.gather(kept), update, config)
    if content:
        session.log.trajectories(f"{name}.jsonl.gz", content)
