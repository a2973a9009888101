"""Stage 2: curriculum GRPO over whole multi-step trajectories.

    accelerate launch train_rl.py                          # embedded default: toy world, small model, warm start, RL
    accelerate launch train_rl.py --config configs/sparc_qwen3_1.7b.yaml

The loop below is the algorithm, in the paper's order: pick, roll out, score, compare, learn, record. Where it departs
from the published system (paper section 4): (1) verdicts are read from their own tags and statuses from the executor;
(2) clause F1 is the paper's set-based one, `reward.strict_clauses` gives the released code's; (3) an empty gold result
is not paid by execution alone (`reward.guard`); (4) groups whose rewards are all equal are dropped before the forward
when no KL term needs them; (5) the embedded default is a model of a few million parameters trained from scratch.
"""

import math
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import train_sft
from mtsql.agent.env import EnvLimits
from mtsql.agent.prompts import PromptStyle
from mtsql.config import parse_config
from mtsql.evaluate import evaluate, scores_as_rows, summarize
from mtsql.learner import OptimConfig, gather_list, learning_rate, make_optimizer, sum_over_ranks, take_step
from mtsql.llm.engine import Engine, EngineLimits, Sampling
from mtsql.llm.logprobs import PolicyModule
from mtsql.llm.losses import LossConfig, policy_loss
from mtsql.llm.model import ModelConfig, generation_weights, save_policy
from mtsql.plots import plot_training
from mtsql.rl.advantages import AdvantageConfig, group_advantages
from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtsql.rl.rewards import RewardConfig, reward_components, total_reward
from mtsql.rl.rollout import rollout
from mtsql.runlog import RunLog
from mtsql.sql.database import QueryLimits
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import Workbench, set_up


@dataclass(frozen=True)
class Config:
    """Flags of train_rl.py. The defaults are the embedded quick start; recipes for real models stand in configs/."""

    run: str = "runs/rl"
    """Run folder."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    num_updates: int = 40
    """Optimizer steps."""
    turns_per_update: int = 16
    """Turns (groups) per update, over all ranks (paper: 256)."""
    group_size: int = 8
    """Trajectories per turn (paper: 5)."""
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
    env: EnvLimits = EnvLimits()
    style: PromptStyle | None = None
    """Wording of the prompts (default: brief for the embedded model, full for others)."""
    engine: EngineLimits = EngineLimits()
    sampling: Sampling = Sampling(max_step_tokens=96, max_trajectory_tokens=640)
    curriculum: CurriculumConfig = CurriculumConfig(probe_samples=4, max_probe_turns=256)
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_coef=0.0))
    optim: OptimConfig = OptimConfig(lr=3e-4)


@dataclass
class Scored:
    """A finished trajectory and what it earned."""

    trajectory: object
    components: dict[str, float]
    reward: float


def check(config: Config) -> None:
    """Impossible combinations, named before anything is loaded."""
    if config.group_size < 2:
        raise ValueError(f"group_size is {config.group_size}, but the advantage compares within a group: set at least 2")
    if config.num_updates < 1 or config.turns_per_update < 1:
        raise ValueError("num_updates and turns_per_update must be at least 1")
    if config.sampling.temperature <= 0:
        raise ValueError("sampling.temperature must be above 0: greedy samples of one turn would all be equal")
    if config.loss.kl_coef:
        raise ValueError("loss.kl_coef is set, but this script keeps no reference model yet: set it to 0")


def play(bench: Workbench, config: Config, turns, split, *, num_samples, update, sampling, log=None):
    """Roll out `turns` with the current policy and score every episode. No collective inside."""
    corpus, limits = bench.corpora[split], QueryLimits()
    with generation_weights(bench.policy) as model:
        engine = Engine(model, bench.renderer.stop_ids, sampling, config.engine)
        trajectories = rollout(
            engine, bench.renderer, turns, bench.env_maker(split), num_samples=num_samples, seed=config.seed,
            update=update, max_prompt_tokens=config.max_prompt_tokens,
        )  # fmt: skip
    scored = []
    for trajectory in trajectories:
        turn = trajectory.turn
        parts = reward_components(
            trajectory.env, turn, corpus.schemas[turn.db_id], corpus.db_paths[turn.db_id], config.reward, limits
        )
        scored.append(Scored(trajectory, parts, total_reward(parts, config.reward.weights)))
    return scored, engine


def probe(bench: Workbench, config: Config, accelerator: Accelerator, log: RunLog) -> Curriculum:
    """Count successes (EX and EM) of the warm-started policy on training turns and sort them into stages."""
    turns = list(bench.corpora["train"].turns)
    random.Random(config.seed).shuffle(turns)
    settings = config.curriculum
    if not settings.probe_samples:
        return build_curriculum({t.turn_id: (0, 0) for t in turns}, settings, config.seed)
    turns = turns[: settings.max_probe_turns or None]
    mine, counts = turns[accelerator.process_index :: accelerator.num_processes], []
    n, at_once = settings.probe_samples, 64
    for start in log.progress(range(0, len(mine), at_once), "probe"):
        part = mine[start : start + at_once]
        scored, _ = play(bench, config, part, "train", num_samples=n, update=2**31, sampling=config.sampling)
        for i, turn in enumerate(part):
            right = sum(s.components["ex"] * s.components["em"] for s in scored[i * n : (i + 1) * n])
            counts.append((turn.turn_id, (int(right), n)))
    return build_curriculum(dict(gather_list(accelerator, counts)), settings, config.seed)


def held_out(bench: Workbench, config: Config, accelerator: Accelerator, log: RunLog, update: int) -> dict:
    """Greedy EX and EM with gold history, in domain (`dev_seen`) and out of domain (`dev`), over all ranks."""
    greedy, summary = replace(config.sampling, temperature=0.0), {}
    with generation_weights(bench.policy) as model:
        for split in [name for name in bench.corpora if name != "train"]:
            turns = bench.corpora[split].turns[: config.eval_turns or None]
            engine = Engine(model, bench.renderer.stop_ids, greedy, config.engine)
            scores, _ = evaluate(
                engine, bench.renderer, bench.corpora[split],
                turns[accelerator.process_index :: accelerator.num_processes], bench.env_maker(split),
                max_prompt_tokens=config.max_prompt_tokens, limits=QueryLimits(),
            )  # fmt: skip
            scores = gather_list(accelerator, scores)
            summary[split] = summarize(scores)
            log.write_json(f"eval/{split}-{update:05d}.json", {**summary[split], "turns": scores_as_rows(scores)})
    log.metrics({"stage": "eval", "update": update, **{f"{split}_{name}": value["all"][name]
                 for split, value in summary.items() for name in ("ex", "em")}})  # fmt: skip
    for split, value in summary.items():
        log.print(f"update {update}: {split} EX {value['all']['ex']:.1f} EM {value['all']['em']:.1f} "
                  f"({value['all']['count']} turns)")  # fmt: skip
    return summary


def warm_started(config: Config) -> Config:
    """The embedded model gets its warm start from train_sft.py's own code, once; later runs reuse the folder."""
    if config.model.path or config.warm_start is None:
        return config
    folder = Path(config.warm_start_folder) / f"seed{config.seed}"
    if not (folder / "model").is_dir():
        print(f"no warm start in {folder}: training one on the toy world's demonstrations (kept for later runs)")
        train_sft.main(
            train_sft.Config(
                run=str(folder), seed=config.seed, model=config.model, data=config.data, env=config.env,
                style=config.style, engine=config.engine, max_prompt_tokens=config.max_prompt_tokens,
                sft=config.warm_start,
            )
        )  # fmt: skip
    return replace(
        config, model=replace(config.model, path=str(folder / "model")), style=config.style or PromptStyle.BRIEF
    )


def main(config: Config) -> None:
    """Warm start, probe, evaluate, train, evaluate; everything the run leaves stands in its run folder."""
    check(config)
    config = warm_started(config)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(config.seed)
    bench = set_up(config.model, config.data, config.env, config.style, ("train", "dev_seen", "dev"), config.seed)
    log = RunLog(Path(config.run), config=config, is_main=accelerator.is_main_process)
    module = PolicyModule(bench.policy, temperature=config.sampling.temperature)
    module, optimizer = accelerator.prepare(module, make_optimizer(module, config.optim))
    turn_of = {turn.turn_id: turn for turn in bench.corpora["train"].turns}
    rank, world, n = accelerator.process_index, accelerator.num_processes, config.group_size

    before = held_out(bench, config, accelerator, log, 0)
    curriculum = probe(bench, config, accelerator, log)
    log.print(f"curriculum: {[len(s) for s in curriculum.stages]} turns by stage, {curriculum.num_dropped} dropped")

    for update in log.progress(range(config.num_updates), "rl"):
        # 1. pick turns; every rank takes its own share, whole groups stay together
        picked = curriculum.pick(update, config.num_updates, config.turns_per_update)
        turns = [turn_of[turn_id] for turn_id in picked[rank::world]]

        # 2. roll out G trajectories per turn with the current policy, and 3. score them
        with log.timer("rollout"):
            scored, engine = play(bench, config, turns, "train", num_samples=n, update=update, sampling=config.sampling)
        groups = [scored[i : i + n] for i in range(0, len(scored), n)]

        # 4. compare within the group; groups that teach nothing are dropped before any forward
        samples = []
        for group in groups:
            advantages = group_advantages([s.reward for s in group], config.advantage)
            if any(advantages):
                samples += [
                    s.trajectory.to_sample([a] * len(s.trajectory.ids))
                    for s, a in zip(group, advantages, strict=True)
                    if s.trajectory.num_sampled
                ]

        # 5. learn: one denominator for all ranks and micro-batches
        num_tokens = sum_over_ranks(accelerator, {"n": float(sum(sum(s.loss_mask) for s in samples))})["n"]
        with log.timer("learn"):
            stats = take_step(
                accelerator, module, optimizer, samples,
                lambda module, batch: policy_loss(*module(batch), batch, config.loss), num_tokens,
                max_tokens=config.max_batch_tokens, config=config.optim,
                lr=learning_rate(config.optim, update, config.num_updates),
            )  # fmt: skip

        # 6. record which turns were easy; write the evidence; now and then evaluate
        results = gather_list(accelerator, [
            (group[0].trajectory.turn.turn_id, int(sum(s.components["ex"] * s.components["em"] for s in group)))
            for group in groups
        ])  # fmt: skip
        for turn_id, num_correct in results:
            curriculum.record(turn_id, num_correct, n)
        log.metrics(update_metrics(accelerator, update, curriculum.stage_at(update, config.num_updates), scored,
                                   samples, stats, num_tokens, engine))  # fmt: skip
        log.trajectories(update, [readable(s) for s in scored])
        if config.eval_every and (update + 1) % config.eval_every == 0 and update + 1 < config.num_updates:
            held_out(bench, config, accelerator, log, update + 1)

    after = held_out(bench, config, accelerator, log, config.num_updates)
    if accelerator.is_main_process:
        save_policy(bench.policy, bench.tokenizer, Path(config.run) / "model")
        plot_training(Path(config.run) / "metrics.jsonl", Path(config.run) / "training.png")
    for split in after:
        log.print(f"{split}: held-out EX {before[split]['all']['ex']:.1f} -> {after[split]['all']['ex']:.1f}")
    accelerator.end_training()


def update_metrics(accelerator, update, stage, scored, samples, stats, num_tokens, engine) -> dict:
    """Means over all ranks of what the update saw; every reward component and outcome by name."""
    sums = {"n": float(len(scored)), "num_samples": float(len(samples)), "reward": sum(s.reward for s in scored),
            "reward_sq": sum(s.reward**2 for s in scored),
            "sampled": float(sum(s.trajectory.num_sampled for s in scored)),
            "tokens_computed": float(engine.tokens_computed), "tokens_distinct": float(engine.tokens_distinct)}  # fmt: skip
    for s in scored:
        for name, value in s.components.items():
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + value
        key = f"outcome/{s.trajectory.outcome.value}"
        sums[key] = sums.get(key, 0.0) + 1
    sums = sum_over_ranks(accelerator, sums)
    n = sums["n"]
    metrics = {k: v / n for k, v in sums.items() if k == "reward" or "/" in k}
    metrics["reward_std"] = math.sqrt(max(0.0, sums["reward_sq"] / n - metrics["reward"] ** 2))
    per_token = {f"loss/{k}": v / num_tokens for k, v in stats.items() if k not in ("loss", "grad_norm") and num_tokens}
    return {
        "stage": "rl", "update": update, "curriculum_stage": stage, **metrics, **per_token,
        "loss": stats.get("loss"), "grad_norm": stats.get("grad_norm"), "num_tokens": num_tokens,
        "kept_frac": sums["num_samples"] / n, "response_tokens": sums["sampled"] / n,
        "rollout_computed_per_distinct": sums["tokens_computed"] / sums["tokens_distinct"],
    }  # fmt: skip


def readable(s: Scored) -> dict:
    """A scored trajectory as text, for the run folder's best and worst."""
    return {
        "turn_id": s.trajectory.turn.turn_id, "question": s.trajectory.turn.question, "gold_sql": s.trajectory.turn.sql,
        "reward": s.reward, "components": s.components, "outcome": s.trajectory.outcome.value,
        "final_sql": s.trajectory.env.final_sql, "transcript": s.trajectory.env.transcript(),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main(parse_config(Config, sys.argv[1:], __doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
