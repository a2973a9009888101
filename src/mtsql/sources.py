"""What train_sft.py learns from, other than the model's own rollouts: demonstrations from a file,
demonstrations that are made from gold SQL, and other trajectories from files.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mtsql.learner.packing import Sample
from mtsql.model.sizes import max_positions, require_positions, require_room_in_batch
from mtsql.rl.pool_source import PoolRules, read_pool
from mtsql.rl.replay import demonstration_samples, write_gold_demonstrations
from mtsql.run.screen import activity
from mtsql.session import Session

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    import train_sft


def samples_of(config: "train_sft.Config", session: Session) -> list[Sample]:
    """The samples of `config.source`, the same on all ranks, which must all call this."""
    if config.source == "file":
        return pool_samples(config, session)
    file = demonstrations_file(config) or gold_demonstrations(config, session)
    return replayed_demonstrations(file, config, session)


def demonstrations_file(config: "train_sft.Config") -> Path | None:
    """The demonstrations to learn from: the named file, or the embedded world's. None if the
    source is another one."""
    if config.source != "demonstrations":
        return None
    return Path(config.demonstrations or Path(config.data.toy_folder) / "demonstrations.jsonl")


def gold_demonstrations(config: "train_sft.Config", session: Session) -> Path:
    """The file of demonstrations in the run folder. It is made from the training split's gold SQL
    if this run is not resumed. All ranks must call this. Prints what was made."""
    file = session.folder / "demonstrations.jsonl"
    with activity("demonstrations from gold SQL", session.ranks.is_main, "turns") as show:
        lines = write_gold_demonstrations(
            file,
            session.workbench.corpora["train"],
            config.gold,
            config.env,
            config.seed,
            session.ranks,
            bool(config.resume),
            show,
        )
    session.log.print("\n".join(lines))
    return file


def replayed_demonstrations(
    file: Path, config: "train_sft.Config", session: Session
) -> list[Sample]:
    """The demonstrations of a file as samples. ValueError if the longest does not fit into a
    micro-batch or into the model's positions."""
    workbench = session.workbench
    is_main = session.ranks.is_main
    with activity("replaying demonstrations", is_main, "demonstrations") as show:
        samples, lines = demonstration_samples(
            workbench.corpora["train"],
            workbench.env_maker("train"),
            workbench.renderer,
            file,
            seed=config.seed,
            max_samples=config.sft.max_samples,
            max_prompt_tokens=config.max_prompt_tokens,
            show=show,
        )
    for line in lines:
        session.log.print(line)
    longest = max(len(sample.prompt_ids) + len(sample.ids) for sample in samples)
    what = "the longest demonstration"
    require_room_in_batch("sft.max_batch_tokens", config.sft.max_batch_tokens, longest, what)
    require_positions(workbench.policy.config, longest, what)
    return samples


def pool_files(config: "train_sft.Config") -> list[Path]:
    """The files of `pool`."""
    files = [config.pool] if isinstance(config.pool, str) else config.pool
    return [Path(file) for file in files]


def pool_samples(config: "train_sft.Config", session: Session) -> list[Sample]:
    """The trajectories of `pool` as samples. What is left out is printed by reason."""
    workbench = session.workbench
    positions = max_positions(workbench.policy.config)
    room = config.sft.max_batch_tokens
    rules = PoolRules(
        train=workbench.corpora["train"],
        held_out=[corpus for name, corpus in workbench.corpora.items() if name != "train"],
        max_prompt_tokens=config.max_prompt_tokens,
        max_tokens=min(room, positions) if positions else room,
        env=config.env,
    )
    with activity("reading the pool", session.ranks.is_main, "trajectories") as show:
        found = read_pool(
            pool_files(config),
            rules,
            workbench.env_maker("train"),
            workbench.renderer,
            seed=config.seed,
            max_samples=config.sft.max_samples,
            show=show,
        )
    for line in found.lines():
        session.log.print(line)
    return found.samples
