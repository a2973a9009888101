"""Stage 2: curriculum GRPO over whole multi-step trajectories.

    accelerate launch train_rl.py                          # embedded default: toy world, small model, warm start, RL
    accelerate launch train_rl.py --config configs/rl_sparc_qwen3_1.7b.yaml
    accelerate launch train_rl.py --resume runs/rl         # after a kill: goes on bit for bit from its last checkpoint

The loop below is the algorithm, in the paper's order: pick, roll out, score, compare, learn,
record. Where it departs from the published system (paper section 4): (1) verdicts are read from
their own tags and statuses from the executor; (2) clause F1 is the paper's set-based one,
`reward.strict_clauses` gives the released code's; (3) answers are judged as they are written and
run, and one that agrees by accident is not paid (`reward.guard`); (4) by default proposals and
verdicts are paid after an answer that is right in result or structure, and the last call is the
proposal (`reward.process_after`, `reward.proposals`; the paper's recipes keep the paper's); (5)
calls that repeat an earlier call, or name a tool that is not offered, do not count; (6) the
embedded default is a model of a few million parameters trained from scratch, its loss a mean over
groups of unequal rewards only (`advantage.zero_variance`; the recipes count all).
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import train_sft
from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import LossConfig, denominator, policy_loss, with_gradient
from mtsql.learner.step import (
    OptimConfig,
    gather_list,
    learning_rate,
    load_optimizer,
    make_optimizer,
    minibatches,
    optimizer_step,
    optimizer_tensors,
    require_seed,
    seed_update,
    sum_over_ranks,
    with_recomputed,
    with_reference,
)
from mtsql.model.policy import ModelConfig, is_sharded, load_trained, make_reference, save_policy
from mtsql.model.sizes import require_room_in_batch
from mtsql.played import differences, notes_of, prompt_style
from mtsql.rl.advantages import PRESETS, AdvantageConfig
from mtsql.rl.collect import Player, compare, measure_kl, probe, roll_out, update_metrics
from mtsql.rl.curriculum import Curriculum, CurriculumConfig
from mtsql.rl.rewards import RewardConfig
from mtsql.run.checkpoint import (
    CheckpointConfig,
    done_at_stop,
    resumed,
    save_checkpoint,
)
from mtsql.run.config import to_dict
from mtsql.run.inputs import check_files, check_inputs, check_places, hash_inputs, keep_inputs
from mtsql.run.launch import (
    NothingLearned,
    from_main,
    make_accelerator,
    on_main,
    run_folder,
    run_script,
)
from mtsql.run.plots import plot_training
from mtsql.run.runlog import RunLog, check_free, make_folder, writing
from mtsql.run.signals import ignore_stops, no_interrupt, peers_may_stop
from mtsql.sql.datasets import DataConfig
from mtsql.warm_start import make_warm_start, warm_start_key
from mtsql.workbench import check_sizes, set_up


@dataclass(frozen=True)
class Config:
    """Flags of train_rl.py. The defaults are the embedded quick start; recipes for real models
    stand in configs/."""

    run: str = "runs/rl"
    """Run folder."""
    resume: str | None = None
    """Run folder to go on with, from its newest checkpoint and its own config."""
    preset: str | None = None
    """A published algorithm by name: sets the keys listed for it in rl/advantages.py, other flags
    still win."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    num_updates: int = 40
    """Rollouts to learn from, an optimizer step each unless keys below say more. The learning rate
    counts these."""
    turns_per_update: int = 16
    """Turns (groups) per update, over all ranks (paper: 256). A smaller curriculum stage gives all
    it has."""
    group_size: int = 8
    """Trajectories per turn (paper: 5)."""
    num_passes: int = 1
    """Passes over an update's samples (paper: 1)."""
    minibatches: int = 1
    """Optimizer steps per pass, each over its share of the groups with its own denominator (paper:
    1)."""
    old_logprobs: str = "sampled"
    """What a ratio divides by. sampled: the log-probs the engine drew the tokens at. recomputed:
    the learner's own before the first step, a forward more; the engine's rounding (logged as
    engine_gap) is then not corrected."""
    max_batch_tokens: int = 8192
    """Tokens per micro-batch and rank."""
    max_prompt_tokens: int = 4000
    """Turns with a longer prompt end at once and are counted."""
    eval_every: int = 20
    """Evaluate every so many updates (0: only before and after)."""
    eval_turns: int = 300
    """Held-out turns per split and evaluation (0 = all)."""
    warm_start: train_sft.SftConfig | None = train_sft.SftConfig()
    """SFT before RL when `model.path` is not set; kept in `warm_start_folder` and reused."""
    warm_start_folder: str = "runs/warm-start"
    """Where the embedded model's warm start is kept."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts (default: what the model was trained with, else brief for the embedded
    model and full for others)."""
    engine: EngineConfig = EngineConfig(max_rows=128)
    sampling: SamplingConfig = SamplingConfig(max_reply_tokens=96, max_trajectory_tokens=640)
    curriculum: CurriculumConfig = CurriculumConfig(
        probe_samples=3, max_probe_turns=512, bounds=(0.6, 0.3, 0.0), shares=(0.4, 0.5, 0.1)
    )
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig(zero_variance="drop")
    """Groups of equal rewards do not count in the embedded default, whose measured results stand in
    README.md."""
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_coef=0.0))
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine")
    """Constant in the paper, and so in the recipes."""
    checkpoint: CheckpointConfig = CheckpointConfig()

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the wording of the prompts filled in."""
        if self.resume:
            check_places(Path(self.resume), self)
        check(self)
        check_sizes(self.model, max_tokens(self), self.engine)
        style = prompt_style(self.style, self.model.path)
        return replace(self, run=self.resume or self.run, style=style)


def check(config: Config) -> None:
    """Impossible combinations, named before anything is loaded."""
    if config.group_size < 2 and config.advantage.compares:
        raise ValueError(
            f"group_size is {config.group_size}, but the advantage compares within a group: at least 2"
        )
    for name in (
        "group_size",
        "num_updates",
        "turns_per_update",
        "num_passes",
        "minibatches",
        "max_batch_tokens",
        "max_prompt_tokens",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be at least 1")
    require_seed(config.seed)
    require_room_in_batch("max_batch_tokens", config.max_batch_tokens, max_tokens(config))
    if config.warm_start and not config.model.path:
        least, what = config.max_prompt_tokens + 1, "max_prompt_tokens and a reply"
        room = config.warm_start.max_batch_tokens
        require_room_in_batch("warm_start.max_batch_tokens", room, least, what)
    if config.eval_every < 0 or config.eval_turns < 0:
        raise ValueError("eval_every and eval_turns must not be negative")
    if not config.model.path and not config.data.is_toy:
        raise ValueError(
            "model.path is not set: the embedded model only knows the toy world, name a model folder"
        )
    if config.sampling.temperature <= 0:
        raise ValueError(
            "sampling.temperature must be above 0: greedy samples of one turn would all be equal"
        )
    if config.sampling.top_p < 1 or config.sampling.top_k:
        raise ValueError(
            "sampling.top_p and sampling.top_k must be off: the learner scores the whole distribution"
        )
    if config.minibatches > config.turns_per_update:
        raise ValueError(
            f"minibatches is {config.minibatches}, more than turns_per_update: groups are not cut"
        )
    if config.old_logprobs not in ("sampled", "recomputed"):
        raise ValueError(f"old_logprobs must be sampled or recomputed, not {config.old_logprobs!r}")
    if config.advantage.kl_coef and config.loss.kl_coef:
        raise ValueError(
            "advantage.kl_coef and loss.kl_coef charge for the same KL twice: set one of them to 0"
        )
    if config.reward.overlong_buffer > config.sampling.max_trajectory_tokens:
        raise ValueError(
            "reward.overlong_buffer is more than sampling.max_trajectory_tokens: every token would cost"
        )
    if config.curriculum.resample_rounds:
        if config.advantage.zero_variance != "drop":
            raise ValueError(
                "curriculum.resample_rounds replaces equal groups: set advantage.zero_variance to drop"
            )
        if config.advantage.baseline in ("batch", "none") or config.advantage.kl_coef:
            raise ValueError(
                "curriculum.resample_rounds needs advantage.baseline mean or leave_one_out and no "
                "advantage.kl_coef: otherwise groups of equal rewards teach too"
            )


def max_tokens(config: Config) -> int:
    """Tokens of the longest sample: its prompt and its trajectory."""
    return config.max_prompt_tokens + config.sampling.max_trajectory_tokens


def warm_started(config: Config, accelerator: Accelerator) -> Config:
    """The embedded model gets its warm start from train_sft.py's own code, once. Later runs reuse
    its folder, whose name is a hash of the settings and of all texts that it was trained on."""
    if config.model.path or config.warm_start is None:
        return config
    on_main(accelerator, make_folder, Path(config.warm_start_folder), "warm_start_folder")
    sft = train_sft.Config(
        seed=config.seed,
        model=config.model,
        data=config.data,
        env=config.env,
        style=config.style,
        max_prompt_tokens=config.max_prompt_tokens,
        sft=config.warm_start,
        checkpoint=CheckpointConfig(every=0),
    )
    key = from_main(accelerator, warm_start_key, sft)
    folder = Path(config.warm_start_folder) / f"seed{config.seed}-{key}"
    if not from_main(accelerator, (folder / "model").is_dir):
        make_warm_start(sft, folder, accelerator, train_sft.warm_start)
    return replace(config, model=replace(config.model, path=str(folder / "model")))


def main(config: Config) -> None:
    """One run, in a run folder that no other process uses meanwhile."""
    config = config.completed()
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(accelerator, Path(config.resume or config.run)):
        train(config, accelerator)


def train(config: Config, accelerator: Accelerator) -> None:
    """Warm start, evaluate, probe, train, evaluate; everything the run leaves stands in its run
    folder."""
    config, begun = resumed(config)
    state, run = begun.state if begun else {}, Path(config.run)
    # before the warm start spends its minutes, and before anything of an older run is touched
    on_main(accelerator, *((check_files, run, config) if config.resume else (check_free, run)))
    changed = None if config.resume else differences(config)
    config = warm_started(config, accelerator)
    seed_update(config.seed, 0, 0)
    with accelerator.main_process_first():
        splits = ("train", "dev_seen", "dev")
        bench = set_up(
            config.model,
            config.data,
            config.env,
            config.style,
            splits,
            config.seed,
            max_tokens(config),
        )
        bench.require_prompts("train", config.max_prompt_tokens)
    start, is_main = state.get("update", 0), accelerator.is_main_process
    inputs = bench.inputs() if is_main else {}
    if config.resume:
        on_main(accelerator, check_inputs, run, inputs)
    log = RunLog(
        run, config, is_main, (start, state.get("metrics_bytes", 0)) if config.resume else None
    )
    if is_main:
        keep_inputs(run, inputs | hash_inputs(config, bench.corpora, bench.databases))
    if changed:
        log.print(changed)
    module = PolicyModule(bench.policy, temperature=config.sampling.temperature)
    module, optimizer = accelerator.prepare(module, make_optimizer(module, config.optim))
    frozen = (
        make_reference(bench.policy) if config.loss.kl_coef or config.advantage.kl_coef else None
    )
    player = Player(
        bench,
        config.model,
        config.engine,
        config.sampling,
        config.reward,
        config.max_prompt_tokens,
        config.seed,
    )
    turn_of = {turn.turn_id: turn for turn in bench.corpora["train"].turns}

    def score_reference(samples):
        return with_reference(
            accelerator,
            bench.policy,
            frozen,
            samples,
            max_tokens=config.max_batch_tokens,
            temperature=config.sampling.temperature,
        )

    def save_model(folder: Path) -> None:
        save_policy(bench.policy, bench.tokenizer, folder, is_main, notes_of(config))

    def save(update: int) -> None:
        progress = {
            "before": before,
            "ex": ex,
            "curriculum": curriculum.state(),
            "config": to_dict(config),
        }
        tensors = optimizer_tensors(module, optimizer)
        save_checkpoint(run, update, save_model, tensors, progress, config.checkpoint, is_main)

    if begun:
        load_trained(bench.policy, begun.model)
        load_optimizer(module, optimizer, begun.optimizer, config.optim.offload)
        before, ex, curriculum = (
            state["before"],
            state["ex"],
            Curriculum.from_state(state["curriculum"]),
        )
    else:
        before = ex = player.held_out(accelerator, log, 0, config.eval_turns)
        curriculum = probe(player, config.curriculum, accelerator, log)
        save(0)
    log.print(
        f"curriculum: {[len(s) for s in curriculum.stages]} turns by stage, {curriculum.num_dropped} dropped"
    )

    done = start
    try:
        for update in log.progress(range(start, config.num_updates), "rl"):
            # now and then evaluate and write a checkpoint, from which this very update can be repeated
            if ex is None and config.eval_every and update % config.eval_every == 0:
                with peers_may_stop():
                    ex = player.held_out(accelerator, log, update, config.eval_turns)
            if update > start and config.checkpoint.every and update % config.checkpoint.every == 0:
                save(update)
            seed_update(config.seed, update + 1, accelerator.process_index)

            # 1. pick turns; further ones may replace groups of equal rewards
            picked = curriculum.pick(update, config.num_updates, config.turns_per_update)
            refill = partial(curriculum.refill, update, config.num_updates)

            # 2. roll out G trajectories per turn with the current policy, and 3. score them; every rank takes its own
            # share, whole groups stay together
            with log.timer("rollout"), peers_may_stop():
                groups, rolled = roll_out(
                    accelerator,
                    picked,
                    lambda turn_ids: player.play(
                        [turn_of[i] for i in turn_ids],
                        "train",
                        num_samples=config.group_size,
                        update=update,
                    ),  # noqa: B023
                    config.advantage,
                    refill=refill,
                    resample_rounds=config.curriculum.resample_rounds,
                )

            with no_interrupt():
                # 4. compare within the group, what a trajectory earned less the price of its KL
                if config.advantage.kl_coef:
                    measure_kl(groups, config.advantage, score_reference)
                samples = compare(accelerator, groups, config.advantage)

                # 5. learn: in each step one denominator for all ranks and micro-batches, which also counts what
                # cannot have a gradient and gets no forward
                with log.timer("learn"):
                    gap, steps = None, []
                    if config.loss.kl_coef:
                        samples = score_reference(samples)
                    if config.old_logprobs == "recomputed":
                        samples, gap = with_recomputed(
                            accelerator, module, samples, config.loss, config.max_batch_tokens
                        )
                    for part in minibatches(
                        accelerator,
                        samples,
                        num_passes=config.num_passes,
                        num_parts=config.minibatches,
                        seed=f"{config.seed}/{update}",
                    ):
                        total = sum_over_ranks(
                            accelerator, {"loss": denominator(part, config.loss)}
                        )
                        steps.append(
                            optimizer_step(
                                accelerator,
                                module,
                                optimizer,
                                with_gradient(part, config.loss),
                                lambda module, batch: policy_loss(
                                    *module(batch), batch, config.loss
                                ),
                                total["loss"],
                                max_tokens=config.max_batch_tokens,
                                config=config.optim,
                                lr=learning_rate(config.optim, update, config.num_updates),
                            )
                        )

                # 6. record which turns were easy; write the evidence
                for turn_id, num_right in gather_list(
                    accelerator,
                    [(g[0].trajectory.turn.turn_id, sum(s.is_right for s in g)) for g in groups],
                ):
                    curriculum.record(turn_id, num_right, config.group_size)
                log.metrics(
                    {
                        "stage": "rl",
                        "update": update,
                        "curriculum_stage": curriculum.stage_at(update, config.num_updates),
                        **rolled,
                        **update_metrics(
                            accelerator,
                            groups,
                            with_gradient(samples, config.loss),
                            steps,
                            config.advantage,
                            gap,
                        ),
                    }
                )
                log.trajectories(update, [s.readable() for group in groups for s in group])
                done, ex = update + 1, None
        with peers_may_stop():
            after = ex or player.held_out(accelerator, log, config.num_updates, config.eval_turns)
    except KeyboardInterrupt as stop:
        ignore_stops()
        can_save = not is_sharded(bench.policy)  # all ranks gather shards, and may be anywhere now
        if can_save:
            save(done)
        raise type(stop)(done_at_stop(run, done, can_save)) from None

    if start < config.num_updates:
        ex = after
        save(config.num_updates)
    with writing(run / "model"):
        save_model(run / "model")
    if is_main:
        with writing(run / "training.png"):
            plot_training(run / "metrics.jsonl", run / "training.png")
    for split in after:
        log.print(f"{split}: held-out EX {before[split]:.1f} -> {after[split]:.1f}")
    if not from_main(accelerator, log.total, "num_steps"):
        raise NothingLearned(
            f"no optimizer step was taken in {config.num_updates} updates, because no trajectory "
            f"was better or worse than its group: {run}/model is the model that the run started "
            "with. Start from a model that solves some of the turns, or raise group_size"
        )


if __name__ == "__main__":
    run_script(main, Config, __doc__, PRESETS)
