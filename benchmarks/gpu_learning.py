"""Checks of a GPU: the learner, several GPUs, memory, and two updates of the quick start.

As in gpu_checks.py, each check is a function of the target that returns a `Check`.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from gpu_checks import against_reference, differences, max_gap, plain_attention
from gpu_target import DTYPE, Check, Sizes, Target, play, random_ids, result
from torch import Tensor

from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner
from mtsql.model.policy import ModelConfig, generation_weights, load_policy

ROOT = Path(__file__).resolve().parents[1]
RANKS = Path(__file__).with_name("gpu_ranks.py")
SPANS = ((0, 255, 255, 256), (0, 255, 256, 556), (556, 812, 812, 1069), (556, 812, 1069, 1079))
"""Two prompts, of 255 and 256 tokens, with samples of 1, 300, 257 and 10."""
MAX_TOKENS = 16384
"""Tokens of a micro-batch."""
MAX_OUTSIDE = 0.02
"""Share of tokens whose ratio is above 1.2 or below 1 / 1.2 although the weights are the same, or
twice the share that bfloat16 alone moves there. Many of their gradients would be clipped."""
QUICK_START = (
    "--num_updates 2 --turns_per_update 8 --eval_turns 4 --eval_every 0"
    " --warm_start.max_samples 64 --warm_start.epochs 1"
    " --curriculum.max_probe_turns 16 --curriculum.probe_samples 2"
    " --sampling.max_reply_tokens 64 --sampling.max_trajectory_tokens 256"
    " --reward.overlong_buffer 256 --advantage.baseline none --advantage.scale none"
).split()
"""The quick start, shortened. Length is punished and nothing is subtracted from rewards, so that a
model that solves nothing takes steps, too."""


def packed_kernels(target: Target) -> Check:
    """Attention over a flat batch with shared prompts, forward and backward, against float64. On a
    CPU it is the call of flash-attn, which a test has replaced."""
    sizes = target.sizes
    context = PackedContext(SPANS, target.device)
    is_gpu = target.device.type == "cuda"
    ours = _of_attend(context.attend) if is_gpu else context.attend_varlen
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, SPANS[-1][-1], sizes.head_dim, device=target.device, dtype=DTYPE)
        for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    ]
    pull = torch.randn(1, SPANS[-1][-1], sizes.num_heads, sizes.head_dim, device=target.device)

    def by_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows = []
        for (start, end), (first, last) in context.rows:
            keys, values = (
                torch.cat([x[0, :, first:last], x[0, :, start:end]], dim=1) for x in (key, value)
            )
            rows.append(plain_attention(query[0, :, start:end], keys, values))
        return torch.cat(rows, dim=1).transpose(0, 1)[None]

    exact = _with_gradients(by_rows, [x.double() for x in inputs], pull)
    plain = _with_gradients(by_rows, inputs, pull)
    mine = _with_gradients(ours, inputs, pull)
    figures = {}
    for number, name in enumerate(("output", "of query", "of key", "of value")):
        errors = [(x[number].double() - exact[number]).abs().max() for x in (mine, plain)]
        figures[name] = tuple(torch.stack(errors).tolist())
    return against_reference("packed kernels", figures, 3)


def _of_attend(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors_and_scale: attend(0, *tensors_and_scale)


def _with_gradients(
    attend: Callable[..., Tensor], inputs: list[Tensor], pull: Tensor
) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, leaves[0].shape[-1] ** -0.5)
    out.backward(pull.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def learner_and_engine(target: Target) -> Check:
    """Log-probs of the learner and of the engine for the same tokens and weights. Under autocast,
    as when whole weights are trained; on the pretended GPU, which has no autocast, in bfloat16."""
    policy = target.policy(DTYPE if target.pretended else torch.float32)
    with generation_weights(policy, DTYPE) as weights:
        engine = target.engine(weights)
        samples = play(engine, random_ids(engine.num_embeddings, 5, 260), num_samples=4)
    with torch.autocast(target.device.type, DTYPE):
        scores = score(PolicyModule(policy), samples, 4096, target.device)
    exact = scores
    if not target.pretended:
        exact = score(PolicyModule(policy), samples, 4096, target.device)
    gaps: list[float] = []
    rounding: list[float] = []
    for sample, logprobs, wide in zip(samples, scores, exact, strict=True):
        gaps += differences(sample, logprobs, sample.old_logprobs)
        rounding += differences(sample, logprobs, wide)
    mean, most = sum(gaps) / len(gaps), max_gap(rounding)
    outside, most_outside = _outside(gaps), max(MAX_OUTSIDE, 2 * _outside(rounding))
    found = f"mean gap {mean:.4f}, {outside:.1%} of {len(gaps)} ratios above 1.2 or below 1 / 1.2"
    limit = f"at most {most:.3g} and {most_outside:.0%}: the weights are the same"
    holds = mean <= most and outside <= most_outside
    figures = {"mean": mean, "out": outside, "limits": [most, most_outside]}
    return result("learner against engine", holds, found, limit, figures)


def _outside(gaps: list[float]) -> float:
    """The share of absolute differences of log-probs by which a ratio leaves 1 / 1.2 to 1.2."""
    return sum(math.exp(gap) > 1.2 for gap in gaps) / len(gaps)


def checkpointing(target: Target) -> Check:
    """`model.gradient_checkpointing` recomputes: attention runs twice a layer, the gradient is the
    same, and on a GPU less memory is used."""
    is_gpu = target.device.type == "cuda"
    if is_gpu:  # a few layers show it, and leave room for their activations
        target = replace(target, path=None, sizes=replace(target.sizes, num_layers=8, vocab=32_000))
    runs = {}
    with TemporaryDirectory() as folder:
        target.theirs(torch.float32).save_pretrained(folder)
        for recompute in (False, True):
            runs[recompute] = _optimizer_step(target, folder, recompute)
    layers = target.sizes.num_layers
    calls = [runs[recompute]["calls"] / layers for recompute in (False, True)]
    norms = [runs[recompute]["grad_norm"] for recompute in (False, True)]
    same = math.isclose(*norms, rel_tol=1e-2 if is_gpu else 1e-4)
    found = f"attention runs {calls[0]:g} and {calls[1]:g} times a layer"
    falls = True
    if is_gpu:
        peaks = [runs[recompute]["peak"] / 1e9 for recompute in (False, True)]
        falls = peaks[1] < 0.8 * peaks[0]
        found += f", peak {peaks[0]:.2f} and {peaks[1]:.2f} GB"
    holds = calls == [1, 2] and same and falls
    limit = "1 and 2 times, the same gradient norm, and on a GPU a fifth less memory"
    return result(
        "checkpointing", holds, found, limit, {"without": runs[False], "with": runs[True]}
    )


def _optimizer_step(target: Target, folder: str, recompute: bool) -> dict[str, float]:
    """An optimizer step as train_rl.py takes it: calls of attention, gradient norm, peak bytes."""
    is_gpu = target.device.type == "cuda"
    accelerator = Accelerator(cpu=not is_gpu, mixed_precision="bf16" if is_gpu else "no")
    learner = make_learner(accelerator, folder, recompute)
    num_samples, length = (15, 1000) if is_gpu else (3, 9)
    samples = random_samples(target.sizes.vocab, num_samples, length)
    calls = 0
    attend = PackedContext.attend

    def counted(self: PackedContext, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return attend(self, *args)

    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    with patch.object(PackedContext, "attend", counted):
        stats = learner.optimizer_step(samples, 1e-6)
    peak = torch.cuda.max_memory_allocated() if is_gpu else 0
    accelerator.free_memory()
    return {"calls": calls, "grad_norm": stats["grad_norm"], "peak": peak}


def make_learner(accelerator: Accelerator, folder: str, recompute: bool = False) -> Learner:
    """A learner of the model in the folder, as train_rl.py makes it."""
    policy = load_policy(ModelConfig(path=folder, gradient_checkpointing=recompute))
    loss = LossConfig(kl_coef=0)
    return Learner(
        policy, accelerator, OptimConfig(lr=1e-6), max_batch_tokens=MAX_TOKENS, loss=loss
    )


def random_samples(vocab: int, num: int, length: int) -> list[Sample]:
    """Samples of one prompt of 20 tokens; half of them have a negative advantage."""
    [prompt] = random_ids(vocab, 20)
    old = -math.log(vocab)
    return [
        Sample(prompt, ids, [1] * length, [1.0 - i % 2 * 2] * length, [old] * length)
        for i, ids in enumerate(random_ids(vocab, *[length] * num, seed=2))
    ]


def two_ranks(target: Target) -> Check:
    """Two GPUs, with DDP and with FSDP2, against one."""
    is_gpu = target.device.type == "cuda"
    two = ["--num_processes", "2", "--num_machines", "1"]
    if is_gpu and torch.cuda.device_count() < 2:
        return Check("two GPUs", "skip", "there is one GPU")
    small = Sizes(2, 256, 512, 4, 2, 64, 1000)
    with TemporaryDirectory() as folder:
        replace(target, path=None, sizes=small).theirs(torch.float32).save_pretrained(folder)
        alone = _launch(folder, ["--num_processes", "1", "--num_machines", "1"])
        found = {
            "DDP": _launch(folder, [*two, "--multi_gpu"] if is_gpu else two),
            "FSDP2": _launch(folder, [*two, "--use_fsdp", "--fsdp_version", "2"]),
        }
    gaps = {}
    for name, steps in found.items():
        pairs = zip(sum(alone, []), sum(steps, []), strict=True)
        gaps[name] = max(abs(a - b) / max(abs(a), 0.1) for a, b in pairs)
    text = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
    limit = "losses and gradient norms of two steps within 2 %: ranks sum in another order"
    return result("two GPUs", max(gaps.values()) <= 0.02, f"relative gaps {text}", limit, gaps)


def _launch(folder: str, flags: list[str]) -> list[list[float]]:
    """Steps of gpu_ranks.py as several ranks. RuntimeError with its last line if it fails."""
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *flags]
    done = _run(*launcher, str(RANKS), folder, cwd=folder)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _run(*words: str, cwd: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words. It imports the trainer of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def recipe_memory(target: Target) -> Check:
    """Peak memory of two optimizer steps of a whole micro-batch, against the memory plan."""
    name = "memory of learning"
    if importlib.util.find_spec("mtsql.plan.memory") is None:
        return Check(name, "skip", "there is no memory plan to compare with")
    from mtsql.plan.memory import peak_bytes, plan

    with TemporaryDirectory() as folder:
        target.theirs(torch.float32).save_pretrained(folder)
        torch.cuda.empty_cache()
        learner = make_learner(Accelerator(mixed_precision="bf16"), folder, recompute=True)
        vocab = learner.policy.config.vocab_size
        samples = random_samples(vocab, MAX_TOKENS // 1000 - 1, 1000)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            learner.optimizer_step(samples, 1e-6)
        measured = torch.cuda.max_memory_allocated()
        learner.accelerator.free_memory()
    parts = plan(
        learner.policy.config,
        num_ranks=1,
        is_sharded=False,
        dtype=DTYPE,
        lora_rank=0,
        checkpointing=True,
        max_batch_tokens=MAX_TOKENS,
        cache_bytes=0,
        has_reference=False,
        offload=False,
    )
    planned = peak_bytes(parts, "learning")
    found = f"{measured / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB"
    limit = "0.75 to 1.1 of the plan, which must not promise too little"
    figures = {"measured": measured, "planned": planned, **parts}
    return result(name, 0.75 <= measured / planned <= 1.1, found, limit, figures)


def quick_start(target: Target) -> Check:
    """Two updates of train_rl.py on the embedded world, shortened."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "rl"
        done = _run(str(ROOT / "train_rl.py"), "--run", str(run), *QUICK_START, cwd=folder)
        file = run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        updates = [json.loads(line) for line in lines if '"stage": "rl"' in line]
    last = (done.stderr.strip().splitlines() or [""])[-1]
    found = f"{len(updates)} updates, exit code {done.returncode}" + (f": {last}" if last else "")
    holds = done.returncode == 0 and len(updates) == 2
    return result("quick start", holds, found, "2 updates, exit code 0")


GPU_CHECKS = [learner_and_engine]
"""They run on the pretended GPU, too."""
CPU_CHECKS = [packed_kernels, checkpointing]
"""The pretended GPU has no gradients: without a GPU these run on the CPU."""
PROCESS_CHECKS = [two_ranks, recipe_memory, quick_start]
"""They need a real GPU, or minutes."""
