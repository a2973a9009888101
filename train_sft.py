"""Stage 1: self-taught warm-start SFT.

    accelerate launch train_sft.py                         # embedded model, toy world, its demonstrations
    accelerate launch train_sft.py --source self ...       # rollouts the model samples itself (paper algorithm 1)
    accelerate launch train_sft.py --resume runs/sft       # after a kill: goes on bit for bit from its last checkpoint

Where this departs from the paper: (1) a model that knows nothing may start from demonstrations (`source`), since it
has no correct rollouts to keep; (2) "Easy-SQL" is the official hardness `easy`; (3) unlike rollouts are chosen by token
counts, not by an embedding model.
"""

import json
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.files import read_json, read_text, write_text
from mtsql.judge.hardness import hardness
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import sft_loss
from mtsql.learner.packing import Sample
from mtsql.learner.step import (
    OptimConfig,
    gather_list,
    learning_rate,
    load_optimizer,
    make_optimizer,
    optimizer_step,
    optimizer_tensors,
    require_seed,
    seed_update,
)
from mtsql.model.policy import (
    ModelConfig,
    generation_weights,
    is_sharded,
    load_trained,
    save_policy,
)
from mtsql.model.sizes import BUDGETS, require_positions, require_room_in_batch
from mtsql.played import differences, notes_of, prompt_style
from mtsql.rl.rewards import RewardConfig, reward_components
from mtsql.rl.rollout import rollout, turn_key
from mtsql.rl.selftaught import SelfTaughtConfig, demonstration_samples, read_demonstrations, select
from mtsql.run.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    done_at_stop,
    resumed,
    save_checkpoint,
)
from mtsql.run.config import to_dict
from mtsql.run.inputs import check_files, check_inputs, check_places, hash_inputs, keep_inputs
from mtsql.run.launch import make_accelerator, on_main, run_folder, run_script
from mtsql.run.runlog import RunLog, check_free, writing
from mtsql.run.signals import ignore_stops, no_interrupt
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import Workbench, check_sizes, digest, set_up

SOURCES = ("demonstrations", "self")


@dataclass(frozen=True)
class SftConfig:
    """Supervised passes over trajectories; loss on the policy's own tokens only."""

    epochs: float = 1.2
    """Passes over the samples."""
    samples_per_update: int = 8
    """Trajectories per optimizer step, over all ranks (paper reading: 16). A model that starts from
    nothing learns to copy from a schema in about a thousand steps, and hardly in a hundred of the
    same total size."""
    max_batch_tokens: int = 8192
    """Tokens per micro-batch and rank."""
    max_samples: int = 0
    """Use at most this many trajectories (0 = all)."""
    optim: OptimConfig = OptimConfig(
        lr=3e-3, betas=(0.9, 0.98), warmup_frac=0.03, schedule="cosine"
    )
    """The optimizer. The default rate is for the embedded model; the paper's is 5e-6, cosine."""

    def __post_init__(self):
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
    """Run folder to go on with, from its newest checkpoint and its own config."""
    seed: int = 0
    """Seed of weights, order and sampling."""
    source: str = "demonstrations"
    """demonstrations: the toy world's (or `demonstrations`) file. self: the model's own correct
    rollouts."""
    demonstrations: str | None = None
    """A demonstrations.jsonl for the training split (default: the toy world's)."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts (default: what the model was trained with, else brief for the embedded
    model and full for others)."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.7)
    """Sampling while collecting (source=self); its temperature is that of `selftaught`. The saved
    model remembers the budgets, whatever the source."""
    max_prompt_tokens: int = 4000
    """Turns with a longer prompt are left out."""
    selftaught: SelfTaughtConfig = field(default_factory=lambda: SelfTaughtConfig(rounds=1))
    max_turns: int = 0
    """Collect on at most this many training turns (0 = all)."""
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=200, keep_last=1, keep_best=0)
    """`every` counts optimizer steps over all rounds; 0: none is written, unless at Ctrl-C."""

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the wording of the prompts filled in."""
        if self.resume:
            check_places(Path(self.resume), self)
        check(self)
        engine = self.engine if self.source == "self" else None
        check_sizes(self.model, max_tokens(self), engine)
        style = prompt_style(self.style, self.model.path)
        return replace(self, run=self.resume or self.run, style=style)


@dataclass
class Place:
    """Where a run stands: optimizer steps done in all, the round, and the steps done in that
    round."""

    update: int = 0
    round: int = 0
    done: int = 0


def train_on(
    module,
    optimizer,
    samples: list[Sample],
    config: Config,
    accelerator,
    log: RunLog,
    place: Place,
    save,
):
    """SFT over `samples`, from `place` on: every rank holds all of them and takes its share of each
    update."""
    sft, stage = config.sft, "sft" if config.source == "demonstrations" else f"round{place.round}"
    num_updates = max(1, math.ceil(sft.epochs * len(samples) / sft.samples_per_update))
    order, epoch = [], 0
    while len(order) < num_updates * sft.samples_per_update:
        order += random.Random(f"{config.seed}/{epoch}").sample(range(len(samples)), len(samples))
        epoch += 1
    for update in log.progress(range(place.done, num_updates), stage):
        chunk = order[update * sft.samples_per_update : (update + 1) * sft.samples_per_update]
        mine = [samples[i] for i in chunk[accelerator.process_index :: accelerator.num_processes]]
        num_tokens = sum(sum(samples[i].loss_mask) for i in chunk)
        with no_interrupt():
            stats = optimizer_step(
                accelerator,
                module,
                optimizer,
                mine,
                lambda module, batch: sft_loss(module(batch)[0], batch),
                num_tokens,
                max_tokens=sft.max_batch_tokens,
                config=sft.optim,
                lr=learning_rate(sft.optim, update, num_updates),
            )
            log.metrics(
                {
                    "stage": stage,
                    "update": update,
                    "loss": stats["loss"],
                    "grad_norm": stats["grad_norm"],
                    "num_tokens": num_tokens,
                }
            )
            place.update, place.done = place.update + 1, update + 1
        if config.checkpoint.every and place.update % config.checkpoint.every == 0:
            save()


def collected(bench: Workbench, turns, config: Config, accelerator, round_index: int):
    """`collect`, whose result is kept in the run folder: a resumed run reads it there. By then
    `resumed` and `check_inputs` have made sure that its configuration and inputs are the same."""
    file = Path(config.run) / "rounds" / f"round{round_index}.json"
    if config.resume and file.is_file():
        saved = read_json(file)
        return [Sample(**sample) for sample in saved["samples"]], set(saved["solved"])
    samples, solved = collect(bench, turns, config, accelerator, round_index)
    if accelerator.is_main_process:
        kept = {"samples": [asdict(s) for s in samples], "solved": sorted(solved)}
        write_text(file, json.dumps(kept))
    return samples, solved


def collect(bench: Workbench, turns, config: Config, accelerator, round_index: int):
    """One round's rollouts of this rank's turns; returns (chosen samples of all ranks, ids of
    solved turns)."""
    sampling = SamplingConfig(
        **{**config.sampling.__dict__, "temperature": config.selftaught.temperature}
    )
    mine = turns[accelerator.process_index :: accelerator.num_processes]
    n, chosen, solved = config.selftaught.samples_per_turn, [], []
    with generation_weights(bench.policy, config.model.compute_dtype) as model:
        engine = Engine(model, bench.renderer.stop_ids, sampling, config.engine)
        played = rollout(
            engine,
            bench.renderer,
            mine,
            bench.env_maker("train"),
            num_samples=n,
            seed=config.seed,
            update=round_index,
            max_prompt_tokens=config.max_prompt_tokens,
            judge=lambda trajectory: (
                trajectory,
                reward_components(trajectory, RewardConfig()),
            ),
        )
    for index, turn in enumerate(mine):
        group, parts = zip(*played[index * n : (index + 1) * n], strict=True)
        is_valid = [bool(p["ex"] and p["em"]) for p in parts]
        is_easy = hardness(turn.sql, bench.corpora["train"].databases[turn.db_id].schema) == "easy"
        kept = select(
            group, is_valid, is_easy, config.selftaught, seed=turn_key(turn.turn_id) ^ config.seed
        )
        chosen += [t.to_sample([]) for t in kept]
        solved += [turn.turn_id] if any(is_valid) else []
    return gather_list(accelerator, chosen), set(gather_list(accelerator, solved))


def demonstrations_file(config: Config) -> Path:
    """The demonstrations to learn from: the named file, or the toy world's."""
    return Path(config.demonstrations or Path(config.data.toy_folder) / "demonstrations.jsonl")


def check(config: Config) -> None:
    """Impossible combinations, named before anything is loaded."""
    if config.source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {config.source!r}")
    require_seed(config.seed)
    if config.max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens is {config.max_prompt_tokens}: it must be at least 1")
    if config.max_turns < 0:
        raise ValueError("max_turns must not be negative (0 = all)")
    what = BUDGETS if config.source == "self" else "max_prompt_tokens and a reply"
    room = config.sft.max_batch_tokens
    require_room_in_batch("sft.max_batch_tokens", room, max_tokens(config), what)
    if config.source == "demonstrations" and not config.demonstrations and not config.data.is_toy:
        raise ValueError(
            "demonstrations is not set: name a demonstrations.jsonl, or use --source self"
        )
    if config.source == "self" and config.demonstrations:
        raise ValueError("demonstrations has no effect with source=self: leave it out")
    if config.source == "demonstrations" and config.demonstrations:
        read_demonstrations(Path(config.demonstrations))


def max_tokens(config: Config) -> int:
    """Tokens of the longest sample that is sampled: its prompt and its trajectory. How long a
    demonstration gets is seen when it is played; its prompt has the same limit."""
    sampled = config.sampling.max_trajectory_tokens if config.source == "self" else 1
    return config.max_prompt_tokens + sampled


def main(config: Config) -> None:
    """Stage 1 as a run of its own."""
    config = config.completed()
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(accelerator, Path(config.resume or config.run)):
        config, begun = resumed(config)
        run = Path(config.run)  # looked at before anything is loaded
        on_main(accelerator, *((check_files, run, config) if config.resume else (check_free, run)))
        warm_start(config, begun, accelerator)


def warm_start(config: Config, begun: Checkpoint | None, accelerator: Accelerator) -> None:
    """Collect (or replay), select, train, shrink; save an ordinary Hugging Face folder to
    <run>/model. `config.style` is set. `begun` is the checkpoint to go on from."""
    run, is_main = Path(config.run), accelerator.is_main_process
    state = begun.state if begun else {}
    place = Place(**state.get("place", {}))
    seed_update(config.seed, 0, 0)
    with accelerator.main_process_first():
        bench = set_up(
            config.model,
            config.data,
            config.env,
            config.style,
            ("train",),
            config.seed,
            max_tokens(config),
        )
        bench.require_prompts("train", config.max_prompt_tokens)
    inputs = {}
    if is_main and config.source == "demonstrations":
        text = read_text(demonstrations_file(config), "demonstrations")
        inputs["the demonstrations"] = digest([text])
    inputs |= bench.inputs() if is_main else {}
    if config.resume:
        on_main(accelerator, check_inputs, run, inputs)
    log = RunLog(
        run,
        config,
        is_main,
        (place.update, state.get("metrics_bytes", 0)) if config.resume else None,
    )
    if is_main:
        keep_inputs(run, inputs | hash_inputs(config, bench.corpora, bench.databases))
    if not config.resume and (changed := differences(config)):
        log.print(changed)
    module = PolicyModule(bench.policy)
    module, optimizer = accelerator.prepare(module, make_optimizer(module, config.sft.optim))
    if begun:
        load_trained(bench.policy, begun.model)
        load_optimizer(module, optimizer, begun.optimizer, config.sft.optim.offload)

    def save_model(folder: Path) -> None:
        save_policy(bench.policy, bench.tokenizer, folder, is_main, notes_of(config))

    def save() -> None:
        progress = {"ex": None, "place": asdict(place), "config": to_dict(config)}
        tensors = optimizer_tensors(module, optimizer)
        save_checkpoint(
            run, place.update, save_model, tensors, progress, config.checkpoint, is_main
        )

    try:
        learn(config, bench, module, optimizer, accelerator, log, place, save)
    except KeyboardInterrupt as stop:
        ignore_stops()
        can_save = not is_sharded(bench.policy)  # all ranks gather shards, and may be anywhere now
        if can_save:
            save()
        raise type(stop)(done_at_stop(run, place.update, can_save)) from None
    with writing(run / "model"):
        save_model(run / "model")
    log.print(f"saved {run}/model")
    accelerator.wait_for_everyone()


def learn(
    config: Config,
    bench: Workbench,
    module,
    optimizer,
    accelerator,
    log: RunLog,
    place: Place,
    save,
) -> None:
    """The paper's rounds, or one pass over demonstrations; `save()` writes a checkpoint."""
    if config.source == "demonstrations":
        samples = demonstration_samples(
            bench.corpora["train"],
            bench.env_maker("train"),
            bench.renderer,
            demonstrations_file(config),
            seed=config.seed,
            max_samples=config.sft.max_samples,
            max_prompt_tokens=config.max_prompt_tokens,
        )
        longest = max(len(s.prompt_ids) + len(s.ids) for s in samples)
        room, what = config.sft.max_batch_tokens, "the longest demonstration"
        require_room_in_batch("sft.max_batch_tokens", room, longest, what)
        require_positions(bench.policy.config, longest, what)
        return train_on(module, optimizer, samples, config, accelerator, log, place, save)
    turns = list(bench.corpora["train"].turns)
    random.Random(config.seed).shuffle(turns)
    turns, pool = turns[: config.max_turns or None], []
    for round_index in range(config.selftaught.rounds):
        samples, solved = collected(bench, turns, config, accelerator, round_index)
        pool += samples
        log.print(
            f"round {round_index}: solved {len(solved)} of {len(turns)} turns, pool {len(pool)} trajectories"
        )
        if not pool:
            raise ValueError(
                "no rollout was right: start from demonstrations (--source demonstrations)"
            )
        if round_index > place.round:
            place.round, place.done = round_index, 0
        if round_index == place.round:  # earlier rounds of a resumed run are in its weights
            train_on(module, optimizer, pool, config, accelerator, log, place, save)
        turns = [turn for turn in turns if turn.turn_id not in solved]


if __name__ == "__main__":
    run_script(main, Config, __doc__)
