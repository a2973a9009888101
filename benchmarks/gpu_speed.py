"""Speed of a GPU against its own limits, measured in the same run: copies and matmuls first, then
decoding, prefill, learning, sampling and the capture of graphs.

Nothing here has run on a GPU yet; tests/test_gpu.py runs it on a CPU with a tiny model. What is
wanted is a target, set from arithmetic.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from gpu_target import BLOCK, DTYPE, Check, Target, guarded, random_ids, result
from learners import LOSS, make_samples, num_operations

from mtsql.engine.config import block_bytes
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig, sample
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import denominator, policy_loss
from mtsql.learner.packing import pack
from mtsql.model.decoder import CausalLM

GROUP = 8
"""Rows that share a prompt."""


@dataclass(frozen=True)
class Load:
    """How much is measured. The defaults are for a GPU."""

    copy_bytes: int = 1 << 31
    matmul: int = 8192
    rows: tuple[int, ...] = (1, 16, 64, 160, 256)
    contexts: tuple[int, ...] = (500, 2000)
    steps: int = 20
    prefill: tuple[int, int] = (8, 2000)
    """Prompts and their length."""
    learn_tokens: int = 8192


@dataclass(frozen=True)
class Limits:
    """What the device can do."""

    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    matmul: float
    """Floating-point operations per second of a large matmul in bfloat16."""


def measure(target: Target, load: Load) -> Iterator[Check]:
    """All rows of the table."""
    limits = device_limits(target, load)
    text = f"{limits.bandwidth / 1e12:.2f} TB/s, {limits.matmul / 1e12:.0f} TFLOP/s in bfloat16"
    figures = {"bytes_per_sec": limits.bandwidth, "flops": limits.matmul}
    yield Check("limits of the GPU", "pass", text, "what the rest is compared with", figures)
    model = target.policy(DTYPE)
    steps: list[Check] = []
    for context, rows in product(load.contexts, load.rows):
        name = f"decode {rows} rows, {context} tokens"
        run = partial(decoding, name, target, model, load, limits, rows, context)
        steps.append(guarded(target, name, run))
        yield steps[-1]
    yield captures(steps)
    yield guarded(target, "prefill", partial(prefill, target, model, load, limits))
    yield guarded(target, "sampling", partial(sampling, target, model, load, steps))
    del model, run  # which holds the model, too
    yield guarded(target, "learning", partial(learning, target, load, limits))


def seconds(target: Target, run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, with all that it starts on the device."""
    run()
    found = []
    for _ in range(repeats):
        _wait(target)
        start = time.perf_counter()
        run()
        _wait(target)
        found.append(time.perf_counter() - start)
    return median(found)


def _wait(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def device_limits(target: Target, load: Load) -> Limits:
    """Bandwidth of a large copy and rate of a large matmul."""
    source = torch.empty(load.copy_bytes, dtype=torch.uint8, device=target.device)
    copying = seconds(target, partial(torch.empty_like(source).copy_, source))
    square = torch.randn(load.matmul, load.matmul, device=target.device, dtype=DTYPE)
    multiplying = seconds(target, partial(torch.matmul, square, square))
    return Limits(2 * load.copy_bytes / copying, 2 * load.matmul**3 / multiplying)


def decoding(
    name: str,
    target: Target,
    model: CausalLM,
    load: Load,
    limits: Limits,
    rows: int,
    context: int,
) -> Check:
    """A decode step of `rows` rows, each after a prompt of `context` tokens that a group shares."""
    groups = [min(GROUP, rows - first) for first in range(0, rows, GROUP)]
    engine = _opened(target, model, groups, context, reply_tokens=load.steps + 40)
    if engine is None:
        return Check(name, "skip", "the cache does not fit into the free memory")
    first = None
    while first is None and engine.has_work:
        before = engine.counts.computed
        secs = _step_secs(target, engine)
        if engine.counts.computed - before == rows:  # all rows decode; a graph was captured
            first = secs
    for _ in range(4):
        engine.step()
    secs = median(_step_secs(target, engine) for _ in range(load.steps))
    num_bytes = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    num_bytes += rows * context * block_bytes(model.config, BLOCK, DTYPE) // BLOCK
    share = num_bytes / limits.bandwidth / secs
    found = f"{secs * 1e3:.2f} ms, {rows / secs:.0f} tokens/s, {share:.0%} of the bandwidth"
    figures = {"secs": secs, "tokens_per_sec": rows / secs, "share": share}
    if engine.graphs is not None:
        figures["first_secs"] = first
    if rows < 64:
        return Check(name, "pass", found, "no target: at few rows the host decides", figures)
    wanted = "half of the bandwidth: a step reads weights, keys and values once"
    return result(name, share >= 0.5, found, wanted, figures)


def captures(steps: list[Check]) -> Check:
    """What the first decode step of each size takes longer than the later ones."""
    secs = [
        step.figures["first_secs"] - step.figures["secs"]
        for step in steps
        if step.figures.get("first_secs") is not None
    ]
    if not secs:
        return Check("capture of a graph", "skip", "no graph was captured")
    found = f"{median(secs):.3f} s, at most {max(secs):.3f} s"
    wanted = "1 s: a rollout captures 10 to 18 sizes"
    return result("capture of a graph", median(secs) <= 1, found, wanted, {"secs": secs})


def _opened(
    target: Target, model: CausalLM, groups: list[int], context: int, reply_tokens: int
) -> Engine | None:
    """An engine with open rows, or None if the cache does not fit. `groups`: rows that share each
    prompt of `context` tokens."""
    rows = sum(groups)
    per_prompt = -(-context // BLOCK) + 1
    per_row = -(-reply_tokens // BLOCK) + 1
    blocks = per_prompt * len(groups) + per_row * rows
    # `open_group` asks for room for the longest trajectory that the settings allow.
    blocks += 2048 // BLOCK + 2
    num_bytes = blocks * block_bytes(model.config, BLOCK, DTYPE)
    if target.device.type == "cuda" and num_bytes > 0.8 * torch.cuda.mem_get_info()[0]:
        return None
    engine = target.engine(
        model,
        rows=rows,
        blocks=blocks,
        scheduled=8192,
        reply_tokens=reply_tokens,
        drafts=False,  # a token a row and step
    )
    for turn, size in enumerate(groups):
        [prompt] = random_ids(engine.num_embeddings, context, seed=turn)
        engine.open_group(prompt, [(0, 0, turn, i) for i in range(size)])
    return engine


def _step_secs(target: Target, engine: Engine) -> float:
    _wait(target)
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def prefill(target: Target, model: CausalLM, load: Load, limits: Limits) -> Check:
    """Prompts of different groups, computed in chunks."""
    prompts, length = load.prefill
    num_tokens = prompts * length

    def run() -> None:
        engine = _opened(target, model, [1] * prompts, length, reply_tokens=4)
        if engine is None:
            raise RuntimeError("the cache does not fit into the free memory")
        while engine.counts.distinct < num_tokens:
            engine.step()

    secs = seconds(target, run, repeats=3)
    body = sum(weight.numel() for weight in model.model.layers.parameters())
    share = 2 * body * num_tokens / secs / limits.matmul
    found = f"{num_tokens / secs:.0f} tokens/s, {share:.0%} of the matmul rate"
    figures = {"tokens_per_sec": num_tokens / secs, "share": share}
    wanted = "30 %, attention not counted: chunks of up to 8,192 tokens are large matmuls"
    return result("prefill", share >= 0.3, found, wanted, figures)


def sampling(target: Target, model: CausalLM, load: Load, steps: list[Check]) -> Check:
    """Drawing a token for each row, from logits that are there."""
    rows = min(160, max(load.rows))
    vocab = model.config.vocab_size
    logits = torch.randn(rows, vocab, device=target.device, dtype=DTYPE)
    noise = torch.rand(rows, device=target.device, dtype=torch.float64)
    times = {
        name: seconds(target, partial(sample, logits, config, noise))
        for name, config in (("plain", SamplingConfig()), ("top_p", SamplingConfig(top_p=0.9)))
    }
    name = f"decode {rows} rows"
    found_steps = [
        step.figures["secs"] for step in steps if step.figures and step.name.startswith(name)
    ]
    share = times["plain"] / found_steps[-1] if found_steps else 0.0
    found = f"{times['plain'] * 1e3:.2f} ms, with top_p {times['top_p'] * 1e3:.2f} ms"
    wanted = "15 % of a decode step: it reads the logits a few times, and they are small"
    return result(f"sampling {rows} rows", share <= 0.15, found, wanted, {**times, "share": share})


def learning(target: Target, load: Load, limits: Limits) -> Check:
    """Forward and backward pass of the loss, whole weights under autocast."""
    model = target.policy(torch.float32).requires_grad_(True).train()
    samples = make_samples(2, 4, min(1000, load.learn_tokens // 16), model.config.vocab_size)
    longest = max(len(one.prompt_ids) + len(one.ids) for one in samples)
    max_tokens = max(load.learn_tokens, longest)
    module = PolicyModule(model)
    divisor = denominator(samples, LOSS)

    def run() -> None:
        for batch in pack(samples, max_tokens):
            batch = batch.to(target.device)
            with torch.autocast(target.device.type, DTYPE):
                logprobs, entropy = module(batch)
            fresh = replace(batch, old_logprobs=logprobs.detach())
            loss, _ = policy_loss(logprobs, entropy, fresh, LOSS)
            (loss / divisor).backward()
        model.zero_grad()

    secs = seconds(target, run, repeats=3)
    num_tokens = sum(batch.num_computed for batch in pack(samples, max_tokens))
    share = num_operations(model, samples, max_tokens) / secs / limits.matmul
    found = f"{num_tokens / secs:.0f} tokens/s, {share:.0%} of the matmul rate"
    figures = {"tokens_per_sec": num_tokens / secs, "share": share}
    wanted = "35 %: between matmuls, norms and the head read memory"
    return result("learning", share >= 0.35, found, wanted, figures)
