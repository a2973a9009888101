"""Predict the time of an update on GPUs: no model, no GPU, no measurement.

    python benchmarks/rollout_time.py
    python benchmarks/rollout_time.py --bandwidth_frac 0.6 --learn_frac 0.35
    python benchmarks/rollout_time.py --turns 300 --group_size 1

Our scheduler plays trajectories of drawn lengths on each rank. A step takes the time to read
weights, keys and values from memory plus that of its matmuls, and at least the time to launch its
kernels. Learning takes the time of its matmuls. Everything else is a flag, and all flags are
printed with the result: replace them by what `benchmarks/gpu.py` measures. The device's own figures
are those of the data sheet of an H100 SXM.

The last command gives the rollout of an evaluation; its learning means nothing.

Each model and number of GPUs is predicted without and with drafts and shared prefixes. Drafts are
a model, too: a row computes the mean number of drafted tokens, keeps a drawn number of them, and
a step has drafts only where that gives more tokens per second. Whether a model fits into the memory
of the GPUs is not checked. Trajectories are dealt to the ranks as in a run, and the slowest rank
counts.
"""

import math
import random
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from flags import print_json, run_benchmark
from transformers import Qwen3Config

from mtsql.engine.blocks import BlockPool
from mtsql.engine.scheduler import Plan, Prompt, Row, Scheduler
from mtsql.model.flops import ModelFlops, Work, pairs

Name = Literal["qwen3-1.7b", "qwen3-4b"]
SHAPES: dict[Name, dict[str, int]] = {
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
BYTES = 2
"""Of a number in bfloat16."""
SIGMA = 0.8
"""Of the logarithm of a reply's length."""


@dataclass(frozen=True)
class Flags:
    """The update, the engine, the device and what is assumed of them."""

    models: tuple[Name, ...] = ("qwen3-1.7b", "qwen3-4b")
    """Shapes to predict."""
    num_gpus: tuple[int, ...] = (1, 8)
    """Numbers of GPUs, one rank each."""
    turns: int = 256
    """Turns of an update, over all ranks."""
    group_size: int = 5
    """Trajectories of a turn."""
    prompt_tokens: int = 1200
    """Tokens of a prompt."""
    shared_tokens: int = 800
    """Tokens at the beginning of a prompt that all turns of a database share: task and schema."""
    num_databases: int = 140
    """Databases of the training split, from which turns are drawn (SParC: 140)."""
    max_replies: int = 4
    """Replies of a trajectory: drawn from 1 to this number."""
    reply_tokens: int = 130
    """Mean tokens of a reply, whose lengths are log-normal."""
    max_reply_tokens: int = 2048
    """Longest reply."""
    observation_tokens: int = 60
    """Tokens of an observation."""
    max_rows: int = 256
    """engine.max_rows."""
    max_scheduled_tokens: int = 4096
    """engine.max_scheduled_tokens."""
    cache_gib: float = 16.0
    """engine.cache_bytes in GiB."""
    block_size: int = 256
    """engine.block_size."""
    accepted_frac: float = 0.47
    """Share of the drafted tokens that is accepted (measured on the quick start's model)."""
    tokens_per_row_step: float = 1.97
    """Tokens that a row with drafts keeps in a step (the same measurement)."""
    max_draft: int = 8
    """Longest draft."""
    bandwidth: float = 3.35e12
    """Bytes per second of the GPU's memory (data sheet)."""
    bandwidth_frac: float = 0.75
    """Share of it that decoding reaches."""
    peak_flops: float = 989e12
    """Operations per second of dense bfloat16 matmuls (data sheet)."""
    matmul_frac: float = 0.6
    """Share of it that the matmuls of a step reach."""
    learn_frac: float = 0.4
    """Share of it that learning reaches, recomputed activations included."""
    kernels_per_layer: int = 24
    """Kernels of a decoder layer: 52 counted, less 28 if a norm is one kernel instead of eight."""
    kernel_us: float = 2.2
    """Microseconds of a kernel in a CUDA graph, at least."""
    eager_layer_ms: float = 0.55
    """Milliseconds of a layer in a step without a CUDA graph, at least."""
    host_ms: float = 0.15
    """Milliseconds of planning and sampling on the host in each step."""
    host_row_us: float = 3.0
    """Microseconds on the host for each row that draws a token."""
    wait_steps: int = 2
    """Steps after a reply at which its observation joins (SQL is assumed to be done by then)."""
    join_every: int = 1
    """Observations join only at steps that are multiples of this."""
    gather_bandwidth: float = 150e9
    """Bytes per second at which a rank receives shards for the copy to generate with (FSDP2)."""
    has_reference: bool = True
    """Whether a reference policy scores the samples, too."""
    gradient_checkpointing: bool = True
    """Whether backward computes each layer again."""
    other_secs: float = 3.0
    """Seconds for judging the last answers, captures, packing, logging."""
    seed: int = 0
    """Seed of the lengths."""


@dataclass(frozen=True)
class Costs:
    """Seconds of steps of a model on a device."""

    flags: Flags
    config: Qwen3Config
    flops: ModelFlops

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights; the head is tied to the embedding."""
        return BYTES * (self.flops.per_token + self.flops.per_predicted) / 2

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token."""
        config = self.config
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * width * BYTES

    def step(self, work: Work, read_tokens: int, num_rows: int, is_eager: bool) -> float:
        """Seconds of an engine step that reads `read_tokens` from the cache."""
        flags = self.flags
        num_bytes = self.weight_bytes + read_tokens * self.token_bytes
        secs = num_bytes / flags.bandwidth / flags.bandwidth_frac
        secs += self.flops.forward(work) / flags.peak_flops / flags.matmul_frac
        num_layers = self.config.num_hidden_layers
        if is_eager:
            launching = num_layers * flags.eager_layer_ms / 1e3
        else:
            launching = num_layers * flags.kernels_per_layer * flags.kernel_us / 1e6
        return max(secs, launching) + flags.host_ms / 1e3 + num_rows * flags.host_row_us / 1e6

    def learning(self, work: Work) -> float:
        """Seconds of scoring and learning on one rank."""
        flops = self.flops.training(work)
        num_forward = self.flags.has_reference + self.flags.gradient_checkpointing
        flops += num_forward * self.flops.forward(work)
        return flops / self.flags.peak_flops / self.flags.learn_frac

    def gathering(self, num_ranks: int) -> float:
        """Seconds in which a rank receives the shards that it does not hold."""
        return self.weight_bytes * (1 - 1 / num_ranks) / self.flags.gather_bandwidth


@dataclass
class Rollout:
    """What a rank's rollout did."""

    secs: float = 0.0
    steps: int = 0
    eager_steps: int = 0
    sampled: int = 0
    prompt: int = 0
    hits: int = 0
    work: Work = field(default_factory=Work)
    """What learning computes."""


def simulate(
    costs: Costs, turns: list[int], rng: random.Random, drafts: bool, shared: bool
) -> Rollout:
    """Play the groups of one rank; `turns` are the databases of its turns."""
    flags = costs.flags
    scheduler = make_scheduler(costs)
    done = Rollout()
    rows: list[Row] = []
    todo: list[list[int]] = []  # lengths of the replies that each row has still to sample
    hits: dict[int, int] = {}  # by prompt: its next tokens that are in the cache
    seen: set[int] = set()
    for number, database in enumerate(turns):
        prompt = Prompt([number] * flags.prompt_tokens)
        num_hits = flags.shared_tokens // flags.block_size * flags.block_size
        hits[id(prompt)] = num_hits if shared and database in seen else 0
        seen.add(database)
        done.prompt += flags.prompt_tokens
        done.hits += hits[id(prompt)]
        for _ in range(flags.group_size):
            row = Row(len(rows), prompt, 0)
            rows.append(row)
            todo.append([draw_length(flags, rng) for _ in range(rng.randint(1, flags.max_replies))])
            scheduler.wait(row)
    num_live = len(rows)
    acting: deque[tuple[int, Row]] = deque()
    step = 0
    while num_live:
        step += 1
        may_join = step % flags.join_every == 0 or not scheduler.has_work
        while may_join and acting and acting[0][0] <= step:
            _, row = acting.popleft()
            row.ids += [0] * flags.observation_tokens
            row.logprobs = []
            scheduler.wait(row)
        if not scheduler.has_work:
            continue
        plan = scheduler.plan()
        drawing = compute(costs, scheduler, plan, hits, drafts, rng, done)
        for row, num_tokens in drawing:
            replies = todo[row.handle]
            num_kept = min(num_tokens, replies[0] - len(row.logprobs))
            row.ids += [0] * num_kept
            row.logprobs += [0.0] * num_kept
            done.sampled += num_kept
            if row.slot is not None and num_kept > 1:
                row.cached = row.length - 1  # accepted drafts have keys and values already
            if len(row.logprobs) < replies[0]:
                continue
            replies.pop(0)
            row.is_idle = True
            if replies:
                acting.append((step + flags.wait_steps, row))
            else:
                scheduler.remove(row)
                num_live -= 1
    for row in rows:
        done.work += learned(row, flags.group_size)
    return done


def compute(
    costs: Costs,
    scheduler: Scheduler,
    plan: Plan,
    hits: dict[int, int],
    drafts: bool,
    rng: random.Random,
    done: Rollout,
) -> list[tuple[Row, int]]:
    """Compute a plan and take its time. Returns the rows that draw tokens, each with the number of
    tokens that it keeps if its reply is long enough."""
    flags = costs.flags
    chunks, singles = compute_chunks(plan, hits)
    singles += [row for row in scheduler.running() if not row.ids and row.prompt.is_ready]
    context = sum(row.length for row in plan.decoding)
    num_rows = len(plan.decoding)

    def secs_with(num_each: float) -> float:
        """Seconds if each decoding row computes this number of tokens."""
        num = round(num_rows * num_each)
        work = chunks + Work(num, round(context * num_each), num + len(singles))
        return costs.step(work, context, num_rows + len(singles), bool(plan.chunks))

    secs = secs_with(1)
    has_drafts = False
    if drafts and num_rows:
        num_drafted = (flags.tokens_per_row_step - 1) / flags.accepted_frac
        slower = secs_with(1 + num_drafted)
        has_drafts = flags.tokens_per_row_step / slower > 1 / secs
        secs = slower if has_drafts else secs
    done.secs += secs
    done.steps += 1
    done.eager_steps += bool(plan.chunks)
    drawing = []
    for row in plan.decoding:
        row.cached += 1
        drawing.append((row, 1 + (draw_accepted(flags, rng) if has_drafts else 0)))
    return drawing + [(row, 1) for row in singles]


def compute_chunks(plan: Plan, hits: dict[int, int]) -> tuple[Work, list[Row]]:
    """Compute the chunks of a plan, without the tokens that are in the cache. Returns their work
    and the rows whose observation is complete."""
    work = Work()
    complete = []
    for owner, num in plan.chunks:
        num_hits = min(num, hits.get(id(owner), 0))
        if num_hits:
            hits[id(owner)] -= num_hits
        work += Work(num - num_hits, pairs(owner.cached + num_hits, num - num_hits))
        owner.cached += num
        if isinstance(owner, Row) and owner.cached == owner.length:
            complete.append(owner)
    return work, complete


def make_scheduler(costs: Costs) -> Scheduler:
    """Our scheduler, over a cache of as many blocks as the GPU would have, each with next to no
    memory."""
    flags = costs.flags
    num_blocks = int(flags.cache_gib * 2**30) // (flags.block_size * costs.token_bytes)
    cpu = torch.device("cpu")
    pool = BlockPool(1, num_blocks, flags.block_size, 1, 1, torch.bfloat16, cpu)
    return Scheduler(pool, flags.max_rows, flags.max_scheduled_tokens)


def draw_length(flags: Flags, rng: random.Random) -> int:
    """Tokens of a reply. Its logarithm is normal, and its mean is `reply_tokens`."""
    length = rng.lognormvariate(math.log(flags.reply_tokens) - SIGMA**2 / 2, SIGMA)
    return max(8, min(flags.max_reply_tokens, int(length)))


def draw_accepted(flags: Flags, rng: random.Random) -> int:
    """Tokens of a draft that are accepted: geometric, with the mean `tokens_per_row_step` - 1."""
    share = 1 - 1 / flags.tokens_per_row_step
    num = 0
    while num < flags.max_draft and rng.random() < share:
        num += 1
    return num


def learned(row: Row, group_size: int) -> Work:
    """What learning computes for a finished row. A group's first row has the prompt, too."""
    num_prompt, num_own = len(row.prompt.ids), len(row.ids)
    work = Work(num_own, pairs(num_prompt, num_own), num_own)
    is_first = row.handle % group_size == 0
    return work + Work(num_prompt, pairs(0, num_prompt)) if is_first else work


def predict(flags: Flags, name: Name, num_gpus: int, drafts: bool, shared: bool) -> dict[str, Any]:
    """An update of this model on this number of GPUs."""
    config = Qwen3Config(**SHAPES[name], **SHARED)
    costs = Costs(flags, config, ModelFlops.of_config(config))
    rng = random.Random(flags.seed)
    turns = [rng.randrange(flags.num_databases) for _ in range(flags.turns)]
    ranks = [
        simulate(
            costs, turns[rank::num_gpus], random.Random(f"{flags.seed}/{rank}"), drafts, shared
        )
        for rank in range(num_gpus)
    ]
    rollout_secs = [rank.secs for rank in ranks]
    learn_secs = max(costs.learning(rank.work) for rank in ranks)
    gather_secs = costs.gathering(num_gpus)
    update_secs = max(rollout_secs) + learn_secs + gather_secs + flags.other_secs
    sampled = sum(rank.sampled for rank in ranks)
    training = sum(costs.flops.training(rank.work) for rank in ranks)
    peak = flags.peak_flops * num_gpus
    return {
        "model": name,
        "gpus": num_gpus,
        "drafts": drafts,
        "shared_prefixes": shared,
        "rollout_secs": round(max(rollout_secs), 1),
        "rollout_secs_mean_of_ranks": round(sum(rollout_secs) / num_gpus, 1),
        "gather_secs": round(gather_secs, 2),
        "learn_secs": round(learn_secs, 1),
        "update_secs": round(update_secs, 1),
        "sampled_tokens_per_sec": round(sampled / max(rollout_secs)),
        "learn_mfu": round(training / learn_secs / peak, 3),
        "steps": max(rank.steps for rank in ranks),
        "eager_frac": round(sum(r.eager_steps for r in ranks) / sum(r.steps for r in ranks), 3),
        "prefix_hit_frac": round(sum(r.hits for r in ranks) / sum(r.prompt for r in ranks), 3),
    }


def main(flags: Flags) -> None:
    """Predict every model and number of GPUs, and print the assumptions with the result."""
    predictions = [
        predict(flags, name, num_gpus, drafts, shared)
        for name in flags.models
        for num_gpus in flags.num_gpus
        for drafts, shared in ((False, False), (False, True), (True, False), (True, True))
    ]
    print_json({"assumptions": asdict(flags), "predictions": predictions})


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
