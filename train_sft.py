"""Stage 1: self-taught warm-start SFT.

    accelerate launch train_sft.py                         # embedded world, its demonstrations
    accelerate launch train_sft.py --source self ...       # the model's own rollouts (algorithm 1)
    accelerate launch train_sft.py --resume runs/sft       # after a kill; on a CPU bit for bit

The function `train_on_own_rollouts` is algorithm 1 of the paper (MTSQL-R1, arXiv 2510.12831,
section 3); docs/stage1.md says what a round leaves and how it resumes. It departs from the paper in
these points: (1) a model that knows nothing can start from demonstrations (`source`), because it
has no correct rollouts to keep; (2) "Easy-SQL" is the official hardness `easy`; (3) rollouts that
differ are chosen by the policy's own hidden states; `selftaught.embedding` names the folder of an
embedding model.
"""

import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.copying import copy_texts
from mtsql.demos.config import GoldConfig
from mtsql.dry.run import dry_run
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.files import print_line, read_rows
from mtsql.learner.optimizer import OptimConfig, learning_rate
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner, sample_order
from mtsql.lines import StepLines, announce, is_finished, listed, stage_2, took
from mtsql.model.policy import ModelConfig
from mtsql.model.sizes import BUDGETS, require_room_in_batch
from mtsql.model_notes import prompt_style
from mtsql.not_finite import require_finite
from mtsql.plan.memory import require_memory
from mtsql.rl.embeddings import check_embedding
from mtsql.rl.pool_source import check_pool
from mtsql.rl.replay import read_demonstrations
from mtsql.rl.selftaught import SelfTaughtConfig
from mtsql.rounds import collect_round, evaluate_round, round_folder, start_weights
from mtsql.run.checkpoint import Checkpoint, CheckpointConfig, resumed
from mtsql.run.inputs import check_places
from mtsql.run.launch import make_accelerator, run_folder, run_script
from mtsql.run.live import live_screen
from mtsql.run.ranks import Ranks
from mtsql.run.screen import activity
from mtsql.run.seeds import require_seed
from mtsql.run.signals import no_interrupt
from mtsql.run.trackers import Tracker
from mtsql.session import Session, check_folder, open_session
from mtsql.sources import demonstrations_file, pool_files, samples_of
from mtsql.sql.datasets import DataConfig, held_out_splits
from mtsql.sql.held_out import SPLIT as HELD_OUT
from mtsql.workbench import check_sizes


@dataclass(frozen=True)
class SftConfig:
    """Supervised passes over trajectories. Only the policy's own tokens are trained on, except in
    the first part of the embedded model's steps (`whole_text_frac`)."""

    epochs: float = 0.75
    """Passes over the samples."""
    whole_text_frac: float | None = None
    """Fraction of the optimizer steps, the first ones, in which the loss is taken over whole texts:
    prompts with the SQL of earlier turns, and observations. It is the pretraining of a model that
    starts from nothing. Each of these steps has texts to copy from, too (src/mtsql/copying.py).
    null: 0.4 for the embedded model, 0 for a model that `model.path` names and for own rollouts."""
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
        if not 0 <= (self.whole_text_frac or 0) <= 1:
            raise ValueError(f"sft.whole_text_frac is {self.whole_text_frac}: it must be in [0, 1]")
        if self.max_samples < 0:
            raise ValueError("sft.max_samples must not be negative (0 = all)")


@dataclass(frozen=True)
class Config:
    """Flags of train_sft.py."""

    run: str = "runs/sft"
    """Run folder."""
    resume: str | None = None
    """Folder of a run to continue, with its own configuration. null: a new run."""
    dry_run: bool = False
    """Try each phase in a minute, on a small random model with one per cent of the work, in the
    folder RUN-dry, and print what the real run will do."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    source: Literal["demonstrations", "gold", "self", "file"] = "demonstrations"
    """What the model learns from. demonstrations: the file `demonstrations`. gold: demonstrations
    that are made from gold SQL (docs/demonstrations.md). self: its own correct rollouts. file: the
    trajectories of `pool`, whoever wrote them (docs/pool.md)."""
    demonstrations: str | None = None
    """A demonstrations.jsonl for the training split. null: the embedded world's."""
    gold: GoldConfig = GoldConfig()
    pool: str | tuple[str, ...] = ()
    """For source=file: a JSON Lines file of trajectories, or several: '[a.jsonl, b.jsonl]'."""
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
    """Here `every` counts optimizer steps over all rounds. A checkpoint is also written between two
    rounds and at Ctrl-C."""
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

    @property
    def whole_text_frac(self) -> float:
        """`sft.whole_text_frac`, with the value that null stands for."""
        stated = self.sft.whole_text_frac
        if stated is not None:
            return stated
        return 0.0 if self.model.path or self.source == "self" else 0.4


@dataclass
class Progress:
    """How far a run is, as its checkpoints keep it."""

    update: int = 0
    """Finished optimizer steps of all rounds."""
    round: int = 0
    """The round that is trained; 0 without rounds (source=demonstrations)."""
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
    if config.sft.whole_text_frac and (config.model.path or config.source == "self"):
        raise ValueError(
            f"sft.whole_text_frac is {config.sft.whole_text_frac}: only the embedded model learns "
            "whole texts, without model.path and own rollouts; leave it out"
        )
    if pool_files(config) and config.source != "file":
        raise ValueError(f"pool has no effect with source={config.source}: leave it out")
    if config.demonstrations and config.source != "demonstrations":
        raise ValueError(f"demonstrations has no effect with source={config.source}: leave it out")
    if config.gold != GoldConfig() and config.source != "gold":
        raise ValueError(f"gold has no effect with source={config.source}: leave it out")
    if config.source == "gold":
        return
    if config.source == "file":
        check_pool(pool_files(config))
        return
    if config.source == "self":
        if config.sft.max_samples:
            raise ValueError("sft.max_samples has no effect with source=self: leave it out")
        has_split = config.data.is_toy or config.data.dev_seen
        if config.selftaught.eval_split == "dev_seen" and not has_split:
            raise ValueError("selftaught.eval_split is dev_seen, but data.dev_seen is not set")
        check_embedding(config.selftaught.embedding)
        return
    if config.demonstrations:
        read_demonstrations(Path(config.demonstrations))
    elif not config.data.is_toy:
        raise ValueError("demonstrations is not set: name a file, or use --source gold or self")


def splits(config: Config) -> tuple[str, ...]:
    """The splits that a run reads."""
    if config.source == "file":  # whose trajectories must not be of these
        return ("train", HELD_OUT, *held_out_splits(config.data))
    held_out = config.selftaught.eval_split if config.source == "self" else None
    return ("train", held_out) if held_out else ("train",)


def max_tokens(config: Config) -> int:
    """Tokens of the longest sample that the model samples: its prompt and its trajectory. Prompts
    of demonstrations have the same limit; their replies are measured when they are played."""
    sampled = config.sampling.max_trajectory_tokens if config.source == "self" else 1
    return config.max_prompt_tokens + sampled


def main(config: Config) -> None:
    """Stage 1 as a run of its own, in a run folder that no other process uses at the same time."""
    if config.dry_run:
        return dry_run(config, main)
    accelerator = make_accelerator(config.model.mixed_precision, config.trackers, config.run)
    ranks = Ranks.of(accelerator)
    with run_folder(ranks, Path(config.run)), live_screen():
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
        splits=splits(config),
        max_tokens=max_tokens(config),
        demonstrations=demonstrations_file(config),
        pool=pool_files(config),
    )
    policy = session.workbench.policy
    learner = Learner(policy, accelerator, sft.optim, max_batch_tokens=sft.max_batch_tokens)
    session.load(learner)
    progress = Progress(**session.state.get("place", {}))
    try:
        if config.source == "self":
            train_on_own_rollouts(config, session, learner, progress)
        else:
            samples = samples_of(config, session)
            train_on(samples, config, session, learner, progress)
    except KeyboardInterrupt as stop:
        raise session.stopped(stop, learner, progress.update, progress.state()) from None
    session.save_model()
    accelerator.wait_for_everyone()


def last_lines(config: Config) -> str:
    """How long the run took, what it has changed, and where its files are."""
    rows = read_rows(Path(config.run) / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    model = f"{config.run}/model"
    values = {
        "took": f"{took(config)}, {len(steps)} optimizer steps",
        "loss": f"{steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}",
    }
    evaluations = [row for row in rows if row["stage"] == "eval"]
    if evaluations:
        split = next(key for key in evaluations[0] if key.endswith("_ex")).removesuffix("_ex")
        scores = [f"{row[f'{split}_ex']:.1f} {row[f'{split}_em']:.1f}" for row in evaluations]
        values[f"{split} EX EM"] = f"{', '.join(scores)} after the rounds"
    if config.source == "self":
        values["rounds"] = f"{config.run}/rounds (pool, coverage and model of each)"
    values["model"] = model
    values["log"] = f"{config.run}/metrics.jsonl"
    values["next"] = stage_2(config, Path(__file__).parent / "configs")
    return listed(values)


def train_on_own_rollouts(
    config: Config, session: Session, learner: Learner, progress: Progress
) -> None:
    """Algorithm 1: collect, select, train on all trajectories so far, leave out the solved turns.
    The rounds before `progress.round` were trained on before the run was resumed."""
    turns = list(session.workbench.corpora["train"].turns)
    random.Random(config.seed).shuffle(turns)
    turns = turns[: config.max_turns or None]
    pool: list[Sample] = []
    solved: set[str] = set()
    for number in range(config.selftaught.rounds):
        if len(solved) == len(turns):
            session.log.print(f"every turn is solved: there is no round {number}")
            break
        collected = collect_round(turns, solved, config, session, number, progress.update)
        pool += collected.samples
        solved |= collected.solved
        if number < progress.round:
            continue
        if not progress.done:
            learner.start_afresh(start_weights(config, session, number))
        train_on(pool, config, session, learner, progress)
        session.save_model_to(round_folder(config, number) / "model")
        evaluate_round(config, session, number, progress.update)
        with no_interrupt():
            progress.round = number + 1
            progress.done = 0
        if progress.round < config.selftaught.rounds:
            # The next round's rollouts belong to exactly these weights.
            session.save_checkpoint(learner, progress.update, progress.state())


def train_on(
    samples: list[Sample], config: Config, session: Session, learner: Learner, progress: Progress
) -> None:
    """SFT over `samples`, from `progress` on. Every rank holds all samples and takes its share of
    each step."""
    sft = config.sft
    stage = f"round{progress.round}" if config.source == "self" else "sft"
    num_steps = max(1, math.ceil(sft.epochs * len(samples) / sft.samples_per_update))
    order = sample_order(len(samples), num_steps * sft.samples_per_update, config.seed)
    num_whole = round(config.whole_text_frac * num_steps)
    lines = StepLines(session.log, stage, progress.done, num_steps, session.meter)
    learner.reclaim_memory()
    with activity(stage, session.ranks.is_main, "steps", has_lines=False) as show:
        for step in range(progress.done, num_steps):
            chunk = order[step * sft.samples_per_update : (step + 1) * sft.samples_per_update]
            everyones = [samples[place] for place in chunk]
            if step < num_whole:
                everyones = [sample.whole_text() for sample in everyones]
                rng = random.Random(f"{config.seed}/copies/{step}")
                everyones += copy_texts(session.workbench.tokenizer, rng)
            mine = session.ranks.share(everyones)
            lr = learning_rate(sft.optim, step, num_steps)
            with no_interrupt():
                with session.log.timer("step"):
                    stats = learner.optimizer_step(mine, lr)
                require_finite(stats, mine, learner.ranks, session.folder, progress.update + 1)
                lines.add(step + 1, progress.update + 1, lr, stats, everyones)
                progress.update += 1
                progress.done = step + 1
            show(progress.done, num_steps)
            if config.checkpoint.every and progress.update % config.checkpoint.every == 0:
                session.save_checkpoint(learner, progress.update, progress.state())


if __name__ == "__main__":
    run_script(main, Config, __doc__)
