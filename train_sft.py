"""Stage 1: self-taught warm-start SFT.

    accelerate launch train_sft.py                         # toy world, its demonstrations
    accelerate launch train_sft.py --source self ...       # the model's own rollouts (algorithm 1)
    accelerate launch train_sft.py --resume runs/sft       # after a kill; on a CPU bit for bit

It departs from the paper (MTSQL-R1, arXiv 2510.12831, section 3) in these points: (1) a model that
knows nothing can start from demonstrations (`source`), because it has no correct rollouts to keep;
(2) "Easy-SQL" is the official hardness `easy`; (3) rollouts that differ are chosen by token counts
and not by an embedding model.
"""

import json
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.cold_start import gold_demonstrations
from mtsql.demos.config import GoldConfig
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.files import print_line, read_json, write_text
from mtsql.judge.hardness import hardness
from mtsql.learner.optimizer import OptimConfig, learning_rate
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner, sample_order
from mtsql.lines import StepLines, announce, is_finished, listed, same_flags, took
from mtsql.memory_plan import require_memory
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.model.sizes import BUDGETS, require_positions, require_room_in_batch
from mtsql.model_notes import prompt_style
from mtsql.rl.replay import demonstration_samples, read_demonstrations
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.rollout import rollout, turn_key
from mtsql.rl.selftaught import SelfTaughtConfig, select
from mtsql.rl.trajectory import Trajectory
from mtsql.run.checkpoint import Checkpoint, CheckpointConfig, resumed
from mtsql.run.inputs import check_places
from mtsql.run.launch import make_accelerator, run_folder, run_script
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import read_rows
from mtsql.run.screen import activity
from mtsql.run.seeds import require_seed
from mtsql.run.signals import no_interrupt
from mtsql.run.trackers import Tracker
from mtsql.session import Session, check_folder, open_session
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Turn
from mtsql.workbench import check_sizes


@dataclass(frozen=True)
class SftConfig:
    """Supervised passes over trajectories. Only the policy's own tokens are trained on."""

    epochs: float = 1.2
    """Passes over the samples."""
    samples_per_update: int = 8
    """Trajectories per optimizer step, over all ranks (paper, as we read it: 16). A model that
    starts from nothing learns to copy from a schema in about a thousand steps, and hardly in a
    hundred larger ones."""
    max_batch_tokens: int = 8192
    """Maximum tokens per micro-batch and rank."""
    max_samples: int = 0
    """Use at most this many trajectories. 0: all."""
    optim: OptimConfig = OptimConfig(
        lr=3e-3, betas=(0.9, 0.98), warmup_frac=0.03, schedule="cosine"
    )
    """The optimizer. The default rate is for the embedded model; the paper's is 5e-6, cosine."""

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.samples_per_update < 1:
            raise ValueError("sft.epochs must be above 0 and sft.samples_per_update at least 1")
        if self.max_samples < 0:
            raise ValueError("sft.max_samples must not be negative (0 = all)")


@dataclass(frozen=True)
class Config:
    """Flags of train_sft.py."""

    run: str = "runs/sft"
    """Run folder."""
    resume: str | None = None
    """Folder of a run to continue, with its own configuration. null: a new run."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    source: Literal["demonstrations", "self", "gold"] = "demonstrations"
    """What the model learns from. demonstrations: the file `demonstrations`. self: its own correct
    rollouts. gold: demonstrations made from the gold SQL, kept in <run>/demonstrations.jsonl."""
    demonstrations: str | None = None
    """A demonstrations.jsonl for the training split. null: the toy world's."""
    gold: GoldConfig = GoldConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig(max_replies=6)
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, brief for
    the embedded model and full for others."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.7)
    """Sampling while collecting (source=self), at the temperature of `selftaught`. The budgets are
    saved in the model's notes, whatever the source."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt. Turns with a longer one are left out."""
    selftaught: SelfTaughtConfig = field(default_factory=lambda: SelfTaughtConfig(rounds=1))
    max_turns: int = 0
    """Collect on at most this many training turns. 0: all."""
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=200, keep_last=1, keep_best=0)
    """Here `every` counts optimizer steps over all rounds; with 0, a checkpoint is written only at
    Ctrl-C."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers that get the numbers of metrics.jsonl too (run/trackers.py)."""

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the values of null and auto set."""
        if self.resume:
            check_places(Path(self.resume), self)
        check(self)
        engine = self.engine if self.source == "self" else None
        model = check_sizes(self.model, max_tokens(self), engine)
        style = prompt_style(self.style, self.model.path)
        return replace(self, run=self.resume or self.run, model=model, style=style)


@dataclass
class Progress:
    """How far a run is, as its checkpoints keep it."""

    update: int = 0
    """Finished optimizer steps of all rounds."""
    round: int = 0
    """The round that is trained; 0 without rounds (source is not self)."""
    done: int = 0
    """Finished optimizer steps of this round."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores. A stage-1 run has no held-out EX."""
        return {"ex": None, "place": asdict(self)}


def check(config: Config) -> None:
    """ValueError that names the flags of an impossible combination, before anything is loaded."""
    require_seed(config.seed)
    if config.max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens is {config.max_prompt_tokens}: it must be at least 1")
    if config.max_turns < 0:
        raise ValueError("max_turns must not be negative (0 = all)")
    what = BUDGETS if config.source == "self" else "max_prompt_tokens and a reply"
    room = config.sft.max_batch_tokens
    require_room_in_batch("sft.max_batch_tokens", room, max_tokens(config), what)
    has_no_effect = f"has no effect with source={config.source}: leave it out"
    if config.source != "gold" and config.gold != GoldConfig():
        raise ValueError(f"gold {has_no_effect}")
    if config.source != "demonstrations":
        if config.demonstrations:
            raise ValueError(f"demonstrations {has_no_effect}")
        return
    if config.demonstrations:
        read_demonstrations(Path(config.demonstrations))
    elif not config.data.is_toy:
        raise ValueError("demonstrations is not set: name a file, or use --source gold or self")


def max_tokens(config: Config) -> int:
    """Tokens of the longest sample that the model samples: its prompt and its trajectory. Prompts
    of demonstrations have the same limit; their replies are measured when they are played."""
    sampled = config.sampling.max_trajectory_tokens if config.source == "self" else 1
    return config.max_prompt_tokens + sampled


def main(config: Config) -> None:
    """Stage 1 as a run of its own, in a run folder that no other process uses at the same time."""
    accelerator = make_accelerator(config.model.mixed_precision, config.trackers, config.run)
    ranks = Ranks.of(accelerator)
    with run_folder(ranks, Path(config.run)):
        config, begun = resumed(config)
        check_folder(config, begun, accelerator)
        announce(config, ranks, begun)
        if not ranks.from_main(is_finished, config, begun):
            warm_start(config, begun, accelerator)
        if ranks.is_main:
            print_line(last_lines(config))


def warm_start(config: Config, begun: Checkpoint | None, accelerator: Accelerator) -> None:
    """Collect (or replay), select, train, shrink; save an ordinary Hugging Face folder to
    <run>/model. `config.style` is set. A resumed run continues from the checkpoint `begun`."""
    sft = config.sft
    engine = config.engine if config.source == "self" else None
    require_memory(config.model, sft, accelerator, engine, key="sft.")
    session = open_session(
        config,
        begun,
        accelerator,
        splits=("train",),
        max_tokens=max_tokens(config),
        demonstrations=demonstrations_file(config) if config.source == "demonstrations" else None,
    )
    policy = session.workbench.policy
    learner = Learner(policy, accelerator, sft.optim, max_batch_tokens=sft.max_batch_tokens)
    session.load(learner)
    progress = Progress(**session.state.get("place", {}))
    try:
        if config.source != "self":
            samples = replayed_demonstrations(config, session)
            train_on(samples, config, session, learner, progress)
        else:
            train_on_own_rollouts(config, session, learner, progress)
    except KeyboardInterrupt as stop:
        raise session.stopped(stop, learner, progress.update, progress.state()) from None
    session.save_model()
    accelerator.wait_for_everyone()


def last_lines(config: Config) -> str:
    """How long the run took, what it has changed, and where its files are."""
    rows = read_rows(Path(config.run) / "metrics.jsonl")
    model = f"{config.run}/model"
    values = {
        "took": f"{took(config)}, {len(rows)} optimizer steps",
        "loss": f"{rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}",
        "model": model,
        "log": f"{config.run}/metrics.jsonl",
        "next": f"python train_rl.py --model.path {model}{same_flags(config)}",
    }
    return listed(values)


def train_on_own_rollouts(
    config: Config, session: Session, learner: Learner, progress: Progress
) -> None:
    """The rounds of the paper's algorithm 1: collect, select, train on all trajectories so far,
    leave out the solved turns."""
    turns = list(session.workbench.corpora["train"].turns)
    random.Random(config.seed).shuffle(turns)
    turns = turns[: config.max_turns or None]
    pool: list[Sample] = []
    for number in range(config.selftaught.rounds):
        collected = saved_round(config, number) if config.resume else None
        if collected is None:
            collected = collect_round(turns, config, session, number)
            save_round(collected, config, session.ranks, number)
        samples, solved = collected
        pool += samples
        session.log.print(
            f"round {number}: solved {len(solved)} of {len(turns)} turns, "
            f"pool {len(pool)} trajectories"
        )
        if not pool:
            raise ValueError(
                "no rollout was right: start from demonstrations (--source demonstrations)"
            )
        if number > progress.round:
            progress.round = number
            progress.done = 0
        if number == progress.round:  # a resumed run has trained on the earlier rounds
            train_on(pool, config, session, learner, progress)
        turns = [turn for turn in turns if turn.turn_id not in solved]


def train_on(
    samples: list[Sample], config: Config, session: Session, learner: Learner, progress: Progress
) -> None:
    """SFT over `samples`, from `progress` on. Every rank holds all samples and takes its share of
    each step."""
    sft = config.sft
    stage = f"round{progress.round}" if config.source == "self" else "sft"
    num_steps = max(1, math.ceil(sft.epochs * len(samples) / sft.samples_per_update))
    order = sample_order(len(samples), num_steps * sft.samples_per_update, config.seed)
    lines = StepLines(session.log, stage, progress.done, num_steps, session.meter)
    learner.reclaim_memory()
    with activity(stage, session.ranks.is_main, "steps", has_lines=False) as show:
        for step in range(progress.done, num_steps):
            chunk = order[step * sft.samples_per_update : (step + 1) * sft.samples_per_update]
            mine = [samples[place] for place in session.ranks.share(chunk)]
            lr = learning_rate(sft.optim, step, num_steps)
            with no_interrupt():
                with session.log.timer("step"):
                    stats = learner.optimizer_step(mine, lr)
                everyones = [samples[place] for place in chunk]
                lines.add(step + 1, progress.update + 1, lr, stats, everyones)
                progress.update += 1
                progress.done = step + 1
            show(progress.done, num_steps)
            if config.checkpoint.every and progress.update % config.checkpoint.every == 0:
                session.save_checkpoint(learner, progress.update, progress.state())


def demonstrations_file(config: Config) -> Path:
    """The demonstrations to learn from: the named file, or the toy world's."""
    return Path(config.demonstrations or Path(config.data.toy_folder) / "demonstrations.jsonl")


def replayed_demonstrations(config: Config, session: Session) -> list[Sample]:
    """The demonstrations as samples. ValueError if the longest does not fit into a micro-batch or
    into the model's positions."""
    workbench = session.workbench
    is_main = session.ranks.is_main
    is_gold = config.source == "gold"
    file = gold_demonstrations(config, session) if is_gold else demonstrations_file(config)
    with activity("replaying demonstrations", is_main, "demonstrations") as show:
        samples = demonstration_samples(
            workbench.corpora["train"],
            workbench.env_maker("train"),
            workbench.renderer,
            file,
            seed=config.seed,
            max_samples=config.sft.max_samples,
            max_prompt_tokens=config.max_prompt_tokens,
            show=show,
        )
    longest = max(len(sample.prompt_ids) + len(sample.ids) for sample in samples)
    what = "the longest demonstration"
    require_room_in_batch("sft.max_batch_tokens", config.sft.max_batch_tokens, longest, what)
    require_positions(workbench.policy.config, longest, what)
    return samples


Round = tuple[list[Sample], set[str]]
"""What a round has collected: the chosen samples of all ranks, and the ids of the solved turns."""


def collect_round(turns: list[Turn], config: Config, session: Session, number: int) -> Round:
    """Roll out this rank's share of the turns with the current policy and choose from the correct
    trajectories."""
    workbench, ranks, selftaught = session.workbench, session.ranks, config.selftaught
    sampling = replace(config.sampling, temperature=selftaught.temperature)
    mine = ranks.share(turns)
    with (
        activity(f"round {number}: rollouts", ranks.is_main) as show,
        generation_weights(workbench.policy, config.model.compute_dtype) as model,
    ):
        engine = Engine(model, workbench.renderer.stop_ids, sampling, config.engine)
        played = rollout(
            engine,
            workbench.renderer,
            mine,
            workbench.env_maker("train"),
            num_samples=selftaught.samples_per_turn,
            seed=config.seed,
            update=number,
            max_prompt_tokens=config.max_prompt_tokens,
            judge=judge,
            show=show,
        )
    chosen: list[Sample] = []
    solved: list[str] = []
    databases = workbench.corpora["train"].databases
    for place, turn in enumerate(mine):
        start = place * selftaught.samples_per_turn
        group = played[start : start + selftaught.samples_per_turn]
        trajectories = [trajectory for trajectory, _ in group]
        is_right = [right for _, right in group]
        is_easy = hardness(turn.sql, databases[turn.db_id].schema) == "easy"
        seed = turn_key(turn.turn_id) ^ config.seed
        kept = select(trajectories, is_right, is_easy, selftaught, seed=seed)
        chosen += [trajectory.to_sample([]) for trajectory in kept]
        if any(is_right):
            solved.append(turn.turn_id)
    return ranks.gather(chosen), set(ranks.gather(solved))


def judge(trajectory: Trajectory) -> tuple[Trajectory, bool]:
    """The trajectory, and whether its answer is right in execution and in structure."""
    components = reward_components(trajectory, RewardConfig())
    return trajectory, bool(components["ex"] and components["em"])


def saved_round(config: Config, number: int) -> Round | None:
    """What a round of the run to resume has collected; None if it has not come to its end. That
    configuration and inputs are the same has been checked."""
    file = round_file(config, number)
    if not file.is_file():
        return None
    saved = read_json(file)
    return [Sample(**sample) for sample in saved["samples"]], set(saved["solved"])


def save_round(collected: Round, config: Config, ranks: Ranks, number: int) -> None:
    """Keep what a round has collected in the run folder."""
    samples, solved = collected
    if ranks.is_main:
        content = {"samples": [asdict(sample) for sample in samples], "solved": sorted(solved)}
        write_text(round_file(config, number), json.dumps(content))


def round_file(config: Config, number: int) -> Path:
    """Where the run folder keeps what a round has collected."""
    return Path(config.run) / "rounds" / f"round{number}.json"


if __name__ == "__main__":
    run_script(main, Config, __doc__)
