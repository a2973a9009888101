"""Stage 2: curriculum GRPO over whole multi-turn trajectories.

    accelerate launch train_rl.py                          # embedded world and model
    accelerate launch train_rl.py --config configs/rl_sparc_qwen3_1.7b.yaml
    accelerate launch train_rl.py --resume runs/rl         # after a kill; on a CPU bit for bit
    accelerate launch train_rl.py --from runs/rl --run runs/branch --reward.process_from 0

The function `train` is the algorithm in the order of the paper (MTSQL-R1, arXiv 2510.12831,
section 4): pick, roll out, score, compute advantages, learn, record. It departs from the published
system in these points:

(1) Verdicts are read from their own tags, and statuses come from the executor. (2) Clause F1 is the
paper's set-based one; `reward.strict_clauses` gives that of the released code. (3) An answer is
judged as it is written and run, and one that agrees by accident earns nothing (`reward.guard`).
(4) By default, proposals and verdicts earn rewards only after an answer that is right in result or
in structure, and only the last call counts as the proposal (`reward.process_after`,
`reward.proposals`; the recipes of the paper set the paper's values). (5) A call that repeats an
earlier call or names a tool that is not offered does not count. (6) The embedded default is a model
of 1.8 million parameters that is trained from scratch. An episode has at most six replies
(`env.max_replies`), and the loss is a mean over groups of unequal rewards only
(`advantage.zero_variance`). The recipes for real data allow four replies and count all groups.
(7) On real data the model is selected on training databases that neither stage trains on
(`data.hold_out`, `select_by`), and not on the test data.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import train_sft
from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.branch import KEPT, Kept, check_origin, checkpoint_of, load_origin, read_origin
from mtsql.choices import ReferencePlace
from mtsql.dry.run import dry_run
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.keeping import keep_trajectories
from mtsql.learner.losses import LossConfig, with_gradient
from mtsql.learner.optimizer import OptimConfig, learning_rate
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner, minibatches
from mtsql.lines import UpdateLines, announce
from mtsql.model.policy import ModelConfig
from mtsql.model_notes import prompt_style
from mtsql.not_finite import require_finite
from mtsql.plan.memory import require_memory
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.checks import EvalSplit, check_config, max_tokens, with_evaluation
from mtsql.rl.collect import Collector
from mtsql.rl.curriculum import Curriculum, CurriculumConfig
from mtsql.rl.kept import KeptConfig
from mtsql.rl.rewards import RewardConfig
from mtsql.rl.samples import compute_advantages, measure_kl
from mtsql.rl.scored import Group, num_right, turn_of
from mtsql.rl.update_metrics import update_metrics
from mtsql.rl_run import (
    Progress,
    evaluate_held_out,
    first_progress,
    flops_of_learning,
    report,
    save_selected,
)
from mtsql.run.checkpoint import CheckpointConfig, resumed
from mtsql.run.inputs import check_places
from mtsql.run.launch import make_accelerator, run_folder, run_script
from mtsql.run.length import with_kept_schedule
from mtsql.run.live import live_screen
from mtsql.run.ranks import Ranks
from mtsql.run.seeds import require_seed, seed_update
from mtsql.run.signals import no_interrupt, peers_may_stop
from mtsql.run.trackers import Tracker
from mtsql.session import Session, check_folder, open_session
from mtsql.sql.datasets import DataConfig
from mtsql.warm_start import kept_warm_start
from mtsql.workbench import check_sizes

PRESETS = Path(__file__).with_name("configs") / "presets"  # the recipes that --preset names


@dataclass(frozen=True)
class Config:
    """Flags of train_rl.py. The defaults are for the embedded model; configs/ has recipes."""

    run: str = "runs/rl"
    """Run folder."""
    resume: str | None = None
    """Folder of a run to continue, with its own configuration. null: a new run."""
    from_run: str | None = None
    """Folder of a run, or of one of its checkpoints, to start a new run from, with its
    configuration; as a flag also --from. The weights are those of the checkpoint, and `model.path`
    stays the reference policy. null: the weights are those of `model.path`, too."""
    keep: tuple[Kept, ...] = KEPT
    """What --from keeps besides the weights. curriculum: stages, counts and the number of finished
    updates; without it, the weights are probed and updates are counted from 0. optimizer: Adam's
    averages."""
    dry_run: bool = False
    """Try each phase in a minute, on a small random model with one per cent of the work, in the
    folder RUN-dry, and print what the real run will do."""
    preset: str | None = None
    """A published objective by name: the recipe configs/presets/NAME.yaml. It wins over other
    recipes, and flags after it win over it. null: none."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    num_updates: int = 20
    """Number of updates, each a rollout and `num_passes * minibatches` optimizer steps."""
    schedule_updates: int | None = None
    """Updates over which the learning rate and the curriculum's stages are laid out. Further
    updates keep the last stage, and the rate that `optim.schedule` ends at. null: num_updates; a
    run that --resume prolongs or shortens, or --from with its curriculum, keeps what it had."""
    turns_per_update: int = 16
    """Turns (groups) per update, over all ranks (paper: 256). A curriculum stage with fewer turns
    gives all of them."""
    group_size: int = 8
    """Trajectories per turn (paper: 5)."""
    num_passes: int = 1
    """Passes over the samples of an update (paper: 1)."""
    minibatches: int = 1
    """Optimizer steps per pass. Each takes its share of the groups and has its own denominator
    (paper: 1)."""
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    """Log-probs in the denominator of the ratio. sampled: those of the engine when it drew the
    tokens. recomputed: those of the learner before its first step, which costs a forward pass and
    leaves the difference between engine and learner uncorrected (logged as engine_gap)."""
    reference: ReferencePlace = "device"
    """Where the reference policy of a KL penalty is kept. host: in host memory, from where it is
    copied to the device for each scoring."""
    max_batch_tokens: int = 8192
    """Maximum tokens per micro-batch and rank."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt. Episodes of turns with a longer one end at once, as truncated."""
    eval_every: int = 10
    """Updates between two evaluations. 0: only before the first update and after the last."""
    eval_turns: int = 300
    """Held-out turns per split and evaluation, in dialogues about different databases as far as
    there are any: 16 turns in dialogues of four reach four databases. 0: all."""
    eval_splits: tuple[EvalSplit, ...] | None = None
    """Splits to evaluate. null: held_out, which is training databases that `data.hold_out` keeps
    from training; without any, dev_seen and dev."""
    select_by: EvalSplit | Literal["none"] | None = None
    """Split whose EX selects `<run>/model`, among the start, the evaluations and the end (paper:
    dev, which are its test data). none: the last weights. null: held_out if it is evaluated, else
    none."""
    warm_start: train_sft.SftConfig | None = train_sft.SftConfig()
    """SFT before RL if `model.path` is not set. The result is kept in `warm_start_folder` and
    reused."""
    warm_start_folder: str = "runs/warm-start"
    """Folder that keeps the warm starts of the embedded model."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig(max_replies=6)
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, brief for
    the embedded model and full for others."""
    engine: EngineConfig = EngineConfig(max_rows=128)
    sampling: SamplingConfig = SamplingConfig(max_reply_tokens=96, max_trajectory_tokens=640)
    curriculum: CurriculumConfig = CurriculumConfig(
        probe_samples=3, max_probe_turns=512, bounds=(0.6, 0.3, 0.0), shares=(0.25, 0.75, 0.0)
    )
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig(zero_variance="drop")
    """How rewards become advantages. By default zero-variance groups do not count, as in the
    results in README.md."""
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_coef=0.0))
    optim: OptimConfig = OptimConfig(lr=2.5e-4, schedule="cosine")
    """The optimizer. One update is one step of the schedule, which is constant in the paper and in
    the recipes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    trajectories: KeptConfig = KeptConfig()
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers that get the numbers of metrics.jsonl too (run/trackers.py)."""

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the values of null and auto set."""
        if self.resume:
            check_places(Path(self.resume), self)
        require_seed(self.seed)
        config = with_evaluation(replace(self, from_run=checkpoint_of(self)))
        check_config(config)
        model = check_sizes(self.model, max_tokens(self), self.engine)
        style = prompt_style(self.style, self.model.path)
        config = replace(config, run=self.resume or self.run, model=model, style=style)
        completed: Config = with_kept_schedule(config)
        return completed

    @property
    def num_scheduled(self) -> int:
        """The number of updates over which the schedules are laid out."""
        return self.schedule_updates or self.num_updates


def main(config: Config) -> None:
    """One run, in a run folder that no other process uses at the same time."""
    if config.dry_run:
        return dry_run(config, main)
    accelerator = make_accelerator(config.model.mixed_precision, config.trackers, config.run)
    with run_folder(Ranks.of(accelerator), Path(config.run)), live_screen():
        run(config, accelerator)


def run(config: Config, accelerator: Accelerator) -> None:
    """Load, evaluate, probe, train, evaluate and save."""
    ranks = Ranks.of(accelerator)
    # The run to start from may go on, and each rank has looked for its checkpoints.
    config = replace(config, from_run=ranks.from_main(lambda: config.from_run))
    config, begun = resumed(config)
    origin = read_origin(config, begun)
    check_folder(config, begun, accelerator)  # before the warm start, which takes minutes
    announce(config, ranks, begun)
    config = warm_started(config, accelerator)
    has_reference = bool(config.loss.kl_coef or config.advantage.kl_coef)
    reference = config.reference if has_reference else None
    require_memory(config.model, config, accelerator, config.engine, reference)
    splits = ("train", *(config.eval_splits or ()))
    check = partial(check_origin, origin=origin, keep=config.keep) if origin else None
    size = max_tokens(config)
    session = open_session(config, begun, accelerator, splits=splits, max_tokens=size, check=check)
    learner = Learner(
        session.workbench.policy,
        accelerator,
        config.optim,
        max_batch_tokens=config.max_batch_tokens,
        loss=config.loss,
        temperature=config.sampling.temperature,
        has_reference=has_reference,
        reference_place=config.reference,
    )
    session.load(learner)
    if origin is not None:
        load_origin(session, learner, origin, config.keep)
    collector = make_collector(config, session)
    progress = first_progress(config, session, collector, origin)
    if begun is None:
        session.save_checkpoint(learner, progress.num_done, progress.state())
    session.log.print(progress.describe())

    try:
        train(config, session, collector, learner, progress)
        is_new = progress.scores is None
        after = progress.scores or evaluate_held_out(session, collector, config.num_updates, config)
    except KeyboardInterrupt as stop:
        raise session.stopped(stop, learner, progress.num_done, progress.state()) from None
    if is_new:
        progress.scores = after
        session.save_checkpoint(learner, config.num_updates, progress.state())
    selection = save_selected(session, config.num_updates, progress.select_by)
    report(session, config.num_updates, progress.before, after, selection)


def train(
    config: Config, session: Session, collector: Collector, learner: Learner, progress: Progress
) -> None:
    """The algorithm: one update after another, from where `progress` is."""
    log = session.log
    ranks = session.ranks
    curriculum = progress.curriculum
    start = progress.num_done
    lines = UpdateLines(log, config.num_updates, config.eval_every, session.meter)
    for update in range(start, config.num_updates):
        # First evaluate, then save: a checkpoint holds the EX of its own weights. Where models are
        # selected, each evaluation is of one that can be.
        is_candidate = False
        if progress.scores is None and is_due(update, config.eval_every):
            progress.scores = evaluate_held_out(session, collector, update, config)
            is_candidate = progress.select_by is not None
        if is_candidate or update > start and is_due(update, config.checkpoint.every):
            session.save_checkpoint(learner, update, progress.state())
        seed_update(config.seed, update + 1, ranks.index)

        # 1. Pick turns of the current curriculum stage.
        picked = curriculum.pick(update, config.num_scheduled, config.turns_per_update)

        # 2. Roll out G trajectories per turn and 3. score them. Each rank takes its share of the
        #    groups. Groups without a signal may be replaced by those of other turns.
        title = f"update {update + 1}/{config.num_updates}"
        with log.work("rollout", f"{title}: rollout") as show, peers_may_stop():
            groups, rollout_metrics = collector.collect(
                picked, curriculum, update, config.num_scheduled, show
            )

        with no_interrupt():  # Ctrl-C waits until the update is complete
            # 4. Compute advantages within each group, after the KL penalty.
            if config.advantage.kl_coef:
                measure_kl(groups, learner, config.advantage)
            samples = compute_advantages(groups, ranks, config.advantage)

            # 5. Learn.
            lr = learning_rate(config.optim, update, config.num_scheduled)
            with log.work("learn", f"{title}: learning"):
                steps, engine_gap = learn(config, learner, samples, update, lr)

            # 6. Record the successes and write the evidence.
            record(curriculum, groups, ranks, config.group_size)
            trained = with_gradient(samples, config.loss)
            flops = flops_of_learning(config, session, samples, trained)
            metrics = update_metrics(
                groups, trained, steps, config.advantage, ranks, engine_gap, flops
            )
            stage = curriculum.stage_at(update, config.num_scheduled)
            done = {"stage": "rl", "update": update + 1, "curriculum_stage": stage, "lr": lr}
            lines.add(done | rollout_metrics | metrics)
            keep_trajectories(session, groups, update + 1, stage, config.trajectories)
            progress.num_done = update + 1
            progress.scores = None  # those of the old weights


def learn(
    config: Config, learner: Learner, samples: list[Sample], update: int, lr: float
) -> tuple[list[dict[str, float]], float | None]:
    """Take the optimizer steps of an update, with the learning rate `lr`.

    Each step has one denominator over all ranks and micro-batches. It includes samples without an
    advantage, although they are not computed. Returns the results of the steps, and the difference
    between the log-probs of learner and engine if it was measured before the first step.
    """
    engine_gap = None
    results = []
    learner.reclaim_memory()
    if config.loss.kl_coef:
        samples = learner.with_reference(samples)
    if config.old_logprobs == "recomputed":
        samples, engine_gap = learner.with_recomputed(samples)
    parts = minibatches(
        samples,
        learner.ranks,
        num_passes=config.num_passes,
        num_parts=config.minibatches,
        seed=f"{config.seed}/{update}",
    )
    for part in parts:
        results.append(learner.optimizer_step(part, lr))
        require_finite(results[-1], part, learner.ranks, Path(config.run), update + 1)
    return results, engine_gap


def record(curriculum: Curriculum, groups: list[Group], ranks: Ranks, num_attempts: int) -> None:
    """Add the successes of all ranks to the curriculum's counts."""
    successes = [(turn_of(group), num_right(group)) for group in groups]
    for turn_id, num_correct in ranks.gather(successes):
        curriculum.record(turn_id, num_correct, num_attempts)


def is_due(update: int, every: int) -> bool:
    """Whether an event that occurs once in `every` updates (0: never) occurs in this one."""
    return every > 0 and update % every == 0


def make_collector(config: Config, session: Session) -> Collector:
    """The collector of a run with this configuration."""
    workbench = session.workbench
    return Collector(
        ranks=session.ranks,
        policy=workbench.policy,
        compute_dtype=config.model.compute_dtype,
        renderer=workbench.renderer,
        corpora=workbench.corpora,
        env_maker=workbench.env_maker,
        engine=config.engine,
        sampling=config.sampling,
        reward=config.reward,
        advantage=config.advantage,
        group_size=config.group_size,
        resample_rounds=config.curriculum.resample_rounds,
        max_prompt_tokens=config.max_prompt_tokens,
        seed=config.seed,
        flops=session.meter.model,
    )


def warm_started(config: Config, accelerator: Accelerator) -> Config:
    """The configuration, for the embedded model with its warm start as `model.path`. The code of
    train_sft.py makes the warm start once, and later runs reuse it."""
    if config.model.path or config.warm_start is None:
        return config
    sft = train_sft.Config(
        seed=config.seed,
        model=replace(config.model, few_rows=0),  # it samples nothing, so any machine continues it
        data=config.data,
        env=config.env,
        style=config.style,
        max_prompt_tokens=config.max_prompt_tokens,
        sft=config.warm_start,
        checkpoint=CheckpointConfig(every=0),
    )
    parent = Path(config.warm_start_folder)
    path = kept_warm_start(sft, parent, accelerator, train_sft.warm_start)
    return replace(config, model=replace(config.model, path=str(path)))


if __name__ == "__main__":
    run_script(main, Config, __doc__, PRESETS)
