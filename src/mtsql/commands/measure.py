"""Measure on this machine what a model computes fastest in, for a recipe.

    mtsql measure --model.path runs/rl/model

Prints YAML to paste into a recipe: model.dtype, model.few_rows and
engine.step_costs. The lines above it say what was measured: decode steps of
--rows rows, and forward and backward of about --learn_tokens tokens, in
float32 and in bfloat16. Without these keys, train_rl.py goes by what was
measured on a few other machines. Run it while nothing else runs, with
the number of threads that the training will have.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from mtsql.choices import NumBytes
from mtsql.commands.arguments import spelled_out
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.engine.step_costs import measure
from mtsql.files import print_line
from mtsql.learner.logprobs import token_logprobs
from mtsql.learner.packing import Sample, pack
from mtsql.model.copies import generation_weights, without_adapters
from mtsql.model.decoder import CausalLM, Linear
from mtsql.model.policy import ModelConfig, load_policy
from mtsql.model.processor import DTYPES, MAX_FEW_ROWS, Dtype
from mtsql.model.sizes import max_positions
from mtsql.run.config import parse_config
from mtsql.run.launch import keep_freed_memory

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import PeftModel

    Policy = CausalLM | PeftModel

PROMPT_TOKENS = 256
GROUP_SIZE = 8
NUM_RUNS = 5
LEAST_GAIN = 1.05
"""How many times as fast bfloat16 has to be, so that its rounding pays."""


@dataclass(frozen=True)
class Config:
    """Flags of mtsql measure."""

    model: ModelConfig = ModelConfig()
    rows: int = 32
    """Rows that decode together in the measured steps."""
    learn_tokens: int = 2048
    """Tokens of the measured micro-batch, about."""
    cache_bytes: NumBytes = 1 << 30
    """Bytes of memory for the engine's keys and values."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}: it must be at least 1")
        if self.learn_tokens < 4:
            raise ValueError(f"learn_tokens is {self.learn_tokens}: it must be at least 4")


@dataclass(frozen=True)
class Speed:
    """Seconds of the same work in one type."""

    step_secs: float
    """A decode step."""
    learn_secs: float
    """Forward and backward of a micro-batch."""


def main(words: Sequence[str]) -> None:
    """Measure and print."""
    config = parse_config(Config, spelled_out(words, Config), __doc__)
    if config.model.path is None:
        raise ValueError("model.path is not set: name the model folder to measure")
    keep_freed_memory()
    for line in measured(config):
        print_line(line)


def measured(config: Config) -> list[str]:
    """The lines that `mtsql measure` prints."""
    speeds: dict[Dtype, Speed] = {}
    few_rows: dict[Dtype, int] = {}
    costs: dict[Dtype, list[list[float]]] = {}
    for dtype in DTYPES:
        policy = load_policy(replace(config.model, dtype=dtype))
        if torch.cuda.is_available():
            policy.cuda()
        with torch.no_grad(), generation_weights(policy, DTYPES[dtype]) as model:
            few_rows[dtype] = most_few_rows(model)
            model.set_few_rows(few_rows[dtype])
            step_secs = decode_secs(model, config)
            costs[dtype] = step_costs(model, DTYPES[dtype])
        speeds[dtype] = Speed(step_secs, learning_secs(policy, DTYPES[dtype], config.learn_tokens))
    best = faster(speeds)
    lines = [_describe(dtype, speed, config) for dtype, speed in speeds.items()]
    lines += ["model:", f"  dtype: {best}", f"  few_rows: {few_rows[best]}"]
    return [*lines, "engine:", f"  step_costs: {costs[best]}"]


def _describe(dtype: Dtype, speed: Speed, config: Config) -> str:
    step = f"a decode step of {config.rows} rows {1000 * speed.step_secs:.1f} ms"
    learning = f"forward and backward of {config.learn_tokens} tokens {speed.learn_secs:.2f} s"
    return f"# {dtype}: {step}, {learning}"


def faster(speeds: dict[Dtype, Speed]) -> Dtype:
    """The type that pays: bfloat16 if generation and learning, whose gains count alike, gain
    LEAST_GAIN together."""
    wide, half = speeds["float32"], speeds["bfloat16"]
    gains = wide.step_secs / half.step_secs, wide.learn_secs / half.learn_secs
    return "bfloat16" if math.sqrt(gains[0] * gains[1]) >= LEAST_GAIN else "float32"


def decode_secs(model: CausalLM, config: Config) -> float:
    """Seconds of a decode step of `config.rows` rows, in groups that share a prompt. ValueError if
    the cache does not hold all of them."""
    starts = range(0, config.rows, GROUP_SIZE)
    prompt_tokens = min(PROMPT_TOKENS, (max_positions(model.config) or PROMPT_TOKENS) // 2)
    num_steps = NUM_RUNS + 8
    sampling = SamplingConfig(max_reply_tokens=num_steps, max_trajectory_tokens=num_steps)
    limits = EngineConfig(
        max_rows=config.rows,
        cache_bytes=config.cache_bytes,
        max_scheduled_tokens=config.rows + prompt_tokens * len(starts),  # all prompts in one step
        max_draft=0,  # a token a row and step
    )
    engine = Engine(model, (), sampling, limits)
    vocab = model.config.vocab_size
    for first in starts:
        prompt = [(first + place) % vocab for place in range(prompt_tokens)]
        keys = [(0, 0, first, row) for row in range(min(GROUP_SIZE, config.rows - first))]
        engine.open_group(prompt, keys)
    for _ in range(2):
        engine.step()  # the first one computes the prompts
    before = engine.counts.computed
    secs = _median_secs(engine.step, model.lm_head.weight.device)
    if engine.counts.computed - before != config.rows * (NUM_RUNS + 1):
        raise ValueError(
            f"cache_bytes is {config.cache_bytes}: {config.rows} rows (--rows) do not fit into it"
        )
    return secs


def learning_secs(policy: "Policy", dtype: torch.dtype, num_tokens: int) -> float:
    """Seconds of forward and backward of a group of four samples, all of whose tokens count."""
    vocab = without_adapters(policy).config.vocab_size
    device = next(policy.parameters()).device
    longest = max_positions(without_adapters(policy).config) or num_tokens
    own = max(1, min(num_tokens // 5, longest // 2))
    prompt = [place % vocab for place in range(own)]
    samples = [
        Sample(prompt, [(place + n) % vocab for place in range(own)], [1] * own) for n in range(4)
    ]
    (batch,) = pack(samples, 5 * own)
    batch = batch.to(device)
    policy.train()

    def learn() -> None:
        is_half = dtype != torch.float32
        with torch.autocast(device.type, dtype) if is_half else nullcontext():
            logprobs, _ = token_logprobs(policy, batch)
        logprobs.sum().backward()
        policy.zero_grad()

    secs = _median_secs(learn, device, num_runs=3)
    policy.eval()
    return secs


def most_few_rows(model: CausalLM) -> int:
    """What `model.few_rows` should be: the largest number of rows up to which the model's linear
    layers are faster with the weight on the left. 0 on a GPU, where it has no effect."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    device = model.lm_head.weight.device
    best = 0
    rows = 2  # a single row is a product of a matrix and a vector either way
    while device.type == "cpu" and rows <= MAX_FEW_ROWS:
        inputs = {module.in_features: torch.randn(rows, module.in_features) for module in layers}
        secs = []
        for few_rows in (0, rows):
            model.set_few_rows(few_rows)
            secs.append(_median_secs(partial(_compute, layers, inputs), device))
        if secs[1] >= secs[0]:
            break
        best = rows
        rows *= 2
    return best


def _compute(layers: Sequence[Linear], inputs: dict[int, torch.Tensor]) -> None:
    for module in layers:
        module(inputs[module.in_features])


def step_costs(model: CausalLM, dtype: torch.dtype) -> list[list[float]]:
    """The table `engine.step_costs` of this model and machine."""
    return [[tokens, cost] for tokens, cost in measure(model, dtype)]


def _median_secs(
    run: Callable[[], object], device: torch.device, num_runs: int = NUM_RUNS
) -> float:
    secs = []
    for _ in range(num_runs + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        secs.append(time.perf_counter() - start)
    return median(secs[1:])  # the first one warms up
