"""Checks of a GPU: what runs there, its kernels, and the engine.

Each check is a function of the target that returns a `Check`. tests/test_gpu.py runs them on a real
GPU (`pytest -m gpu`) and, those that need no speed, on the pretended one.
"""

import operator
import re
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_target import (
    BLOCK,
    DTYPE,
    Check,
    Target,
    counted_waits,
    play,
    random_ids,
    result,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtsql.engine import engine as engine_module
from mtsql.engine.blocks import BlockPool
from mtsql.engine.engine import Engine
from mtsql.engine.paged_attention import Chunk, new_tokens, step_context
from mtsql.engine.uploads import upload
from mtsql.learner.packing import Sample
from mtsql.model.attention_path import describe_path, path_for

PACKAGES = ("torch", "transformers", "accelerate", "flash-attn")
PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LENGTHS = (1, 255, 256, 257, 1000)
"""Lengths of contexts: a single token, and both sides of the edge of a block."""
MAX_GAP = 0.02
"""Mean absolute difference of log-probs in bfloat16, or twice what bfloat16 changes in this model's
log-probs if that is more. Two correct implementations of the same model differ by rounding only."""
WARM_UP = 6
"""Steps of an engine before it only decodes, with all its graphs captured."""
STEPS = 4
"""Steps that are looked at."""


def environment(target: Target) -> Check:
    """The versions, the GPU and the attention that runs."""
    facts = {name: version_of(name) for name in PACKAGES}
    needed = accepted()
    wrong = [name for name, wanted in needed.items() if not is_accepted(facts[name], wanted)]
    facts["attention"] = attention_path(target)
    if target.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts["GPU"] = torch.cuda.get_device_name()
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["memory"] = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    found = ", ".join(f"{name} {value}" for name, value in facts.items())
    limit = ", ".join(f"{name}{wanted}" for name, wanted in needed.items())
    return result("environment", not wrong, found, f"{limit}; an installed flash-attn works", facts)


def version_of(package: str) -> str:
    """The version of a package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def accepted() -> dict[str, str]:
    """The versions of torch and transformers that pyproject.toml accepts, such as `>=5.23,<6`."""
    lines = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    pairs = [re.fullmatch(r"(torch|transformers)([=<>].*)", line) for line in lines]
    return {pair[1]: pair[2] for pair in pairs if pair}


def is_accepted(found: str, wanted: str) -> bool:
    """Whether a version such as `2.13.0+cpu` is one of `==2.13.0` or of `>=5.23,<6`."""
    holds = {"==": operator.eq, ">=": operator.ge, "<": operator.lt}
    numbers = re.findall(r"\d+", found.partition("+")[0])[:3]
    for sign, text in re.findall(r"(==|>=|<)([\d.]+)", wanted):
        bound = [int(number) for number in text.split(".")]
        if not numbers or not holds[sign]([*map(int, numbers)][: len(bound)], bound):
            return False
    return True


def attention_path(target: Target) -> str:
    """Which attention runs in bfloat16 on this device, and why. ValueError for a flash-attn that is
    installed and cannot be imported."""
    if target.pretended and engine_module.uses_flash(target.device, DTYPE):
        return "the tests' double of flash-attn"
    path = path_for(target.device, DTYPE)
    return describe_path(path, DTYPE).removeprefix("attention: ")


def paged_kernels(target: Target) -> Check:
    """Attention over the cache at the edges of blocks, against float64: rows that decode one token,
    rows with drafts, and chunks."""
    figures = {}
    for num_rows in (7, 33) if target.pretended else (1, 7, 33, 256):
        lengths = np.resize(LENGTHS, num_rows) if num_rows > 1 else np.array([LENGTHS[-1]])
        figures[f"{num_rows} rows"] = _paged_errors(target, lengths, np.ones_like(lengths))
    lengths = np.array(LENGTHS[1:])
    figures["drafts"] = _paged_errors(target, lengths, np.array([3, 1, 4, 2]))
    figures["chunks"] = _paged_errors(target, lengths[:1], np.array([1]), chunks=True)
    return against_reference("paged kernels", figures, 2)


def against_reference(name: str, figures: dict[str, tuple[float, float]], times: int) -> Check:
    """A check of errors: (ours, that of plain bfloat16 attention) by case."""
    worst = max(figures, key=lambda case: figures[case][0] / (figures[case][1] + 1e-4))
    ours, plain = figures[worst]
    holds = all(ours <= times * plain + 1e-4 for ours, plain in figures.values())
    found = f"largest error {ours:.1e}, plain {plain:.1e} ({worst})"
    limit = f"at most {times} times the error of plain bfloat16 attention, as in flash-attn's tests"
    return result(name, holds, found, limit, figures)


def _paged_errors(
    target: Target, lengths: np.ndarray, num_new: np.ndarray, chunks: bool = False
) -> tuple[float, float]:
    """The largest error of a step, and that of plain attention in bfloat16."""
    heads, kv_heads, head_dim = _head_sizes(target)
    blocks_each = -(-int(lengths.max()) // BLOCK)
    num_blocks = len(lengths) * blocks_each + 4
    is_flash = engine_module.uses_flash(target.device, DTYPE)
    pool = BlockPool(1, num_blocks, BLOCK, kv_heads, head_dim, DTYPE, target.device, is_flash)
    torch.manual_seed(0)
    pool.data.normal_()
    order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = order[:-4].reshape(len(lengths), blocks_each)
    at = int(num_new.sum())
    sequences = [
        Chunk(end - num, end, length, table)
        for end, num, length, table in zip(np.cumsum(num_new), num_new, lengths, tables)
    ]
    given = []
    if chunks:
        given = [Chunk(at, at + 300, 300, order[-4:-2]), Chunk(at + 300, at + 309, 265, order[-2:])]
        at += 309
    query, key, value = (
        torch.randn(1, number, at, head_dim, device=target.device, dtype=DTYPE)
        for number in (heads, kv_heads, kv_heads)
    )
    context = step_context(pool, heads, tables, lengths, num_new, given)
    out = context.attend(0, query, key, value, head_dim**-0.5)[0]
    errors = []
    for one in [*sequences, *given]:
        inside = slice(int(one.start), int(one.stop))
        used = [int(block) for block in one.blocks[: -(-int(one.length) // BLOCK)]]
        keys, values = (
            torch.cat([cache[0][block] for block in used], dim=1)[:, : int(one.length)]
            for cache in (pool.keys, pool.values)
        )
        exact = plain_attention(*(x.double() for x in (query[0, :, inside], keys, values)))
        plain = plain_attention(query[0, :, inside], keys, values)
        mine = out[inside].transpose(0, 1)
        errors.append(torch.stack([(x.double() - exact).abs().max() for x in (mine, plain)]))
    return tuple(torch.stack(errors).amax(0).tolist())


def _head_sizes(target: Target) -> tuple[int, int, int]:
    sizes = target.sizes
    return sizes.num_heads, sizes.num_kv_heads, sizes.head_dim


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention in the dtype of its inputs: query (H, n, D), which belongs to the last n of
    keys and values (K, L, D) -> (H, n, D)."""
    per_kv_head = len(query) // len(keys)
    keys = keys.repeat_interleave(per_kv_head, dim=0)
    values = values.repeat_interleave(per_kv_head, dim=0)
    scores = query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    n, length = scores.shape[1:]
    is_hidden = torch.ones(n, length, dtype=torch.bool, device=query.device).triu(length - n + 1)
    return scores.masked_fill(is_hidden, -torch.inf).softmax(-1) @ values


def engine_against_transformers(target: Target) -> Check:
    """The engine's log-probs of what it sampled, against a forward pass of transformers."""
    reference, exact = target.theirs(DTYPE), target.theirs(torch.float32)
    gaps: list[float] = []
    rounding: list[float] = []
    for temperature in (0.0, 1.0):  # at both, log-probs are those of the model itself
        engine = target.engine(target.policy(DTYPE), temperature=temperature)
        with torch.no_grad():
            for sample in play(engine, random_ids(engine.num_embeddings, 5, 260)):
                theirs = _logprobs(reference, sample)
                gaps += differences(sample, theirs, sample.old_logprobs)
                rounding += differences(sample, theirs, _logprobs(exact, sample))
    mean, limit = sum(gaps) / len(gaps), max_gap(rounding)
    found = f"mean gap {mean:.4f}, largest {max(gaps):.3f}, {len(gaps)} tokens"
    why = f"mean at most {limit:.3g}: both round to bfloat16, in another order"
    figures = {"mean": mean, "largest": max(gaps), "tokens": len(gaps), "limit": limit}
    return result("engine against transformers", mean <= limit, found, why, figures)


def max_gap(rounding: list[float]) -> float:
    """See MAX_GAP. `rounding`: differences between log-probs in bfloat16 and in float32."""
    return max(MAX_GAP, 2 * sum(rounding) / len(rounding))


def differences(sample: Sample, some: list[float], others: list[float]) -> list[float]:
    """|some - others| at each sampled token, from log-probs of all tokens of the sample."""
    tokens = zip(some, others, sample.loss_mask, strict=True)
    return [abs(one - other) for one, other, is_sampled in tokens if is_sampled]


def _logprobs(model: torch.nn.Module, sample: Sample) -> list[float]:
    """Log-probs of the tokens after the prompt by a model of transformers."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*sample.prompt_ids, *sample.ids]], device=device)
    first = len(sample.prompt_ids) - 1
    logp = _distribution(model(ids).logits[0, first:-1])
    return logp.gather(1, ids[0, first + 1 :, None])[:, 0].tolist()


def graphs_on_and_off(target: Target) -> Check:
    """The log-probs of each step that decodes, with CUDA graphs and without."""
    name = "graphs on and off"
    if not engine_module.uses_flash(target.device, DTYPE):
        return Check(name, "skip", "graphs are captured with flash-attn only")
    engine = target.engine(target.policy(DTYPE))
    graphs = engine.graphs
    assert graphs is not None
    run = graphs.run
    gaps: list[Tensor] = []  # mean and largest of each step

    def run_twice(ids: Any, tables: Any, lengths: Any, num_new: Any) -> Tensor:
        hidden = run(ids, tables, lengths, num_new)
        _, positions = new_tokens(lengths, num_new)
        context = step_context(engine.pool, engine.num_heads, tables, lengths, num_new, [])
        eager = engine.decoder(*upload([np.array(ids), positions], target.device), context)
        gap = (_distribution(engine.head(hidden)) - _distribution(engine.head(eager))).abs()
        gaps.append(torch.stack([gap.mean(), gap.max()]))
        return hidden

    with patch.object(graphs, "run", run_twice):
        play(engine, random_ids(engine.num_embeddings, 40, 230))
    means, largest = torch.stack(gaps).t().tolist()
    mean, limit = sum(means) / len(means), max(MAX_GAP, 2 * _rounding(target))
    sizes = [str(tuple(size)) for size in graphs.captured]
    found = f"mean gap {mean:.4f}, largest {max(largest):.3f}; captured {', '.join(sizes)}"
    why = f"mean at most {limit:.3g}: a graph pads its batch, and other sizes round differently"
    figures = {"mean": mean, "largest": max(largest), "limit": limit, "captured": sizes}
    return result(name, mean <= limit and bool(sizes), found, why, figures)


def _distribution(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


@torch.no_grad()
def _rounding(target: Target) -> float:
    """By how much bfloat16 changes the log-probs of this model in the mean."""
    found = []
    for dtype in (DTYPE, torch.float32):
        model = target.theirs(dtype)
        ids = torch.tensor(random_ids(model.config.vocab_size, 40))
        found.append(_distribution(model(ids.to(model.device)).logits))
    return float((found[0] - found[1]).abs().mean())


def waits_of_a_step(target: Target) -> Check:
    """How often a decode step waits for the device, with graphs and without. On the pretended GPU
    uploads are counted, too."""
    figures: dict[str, Any] = {}
    texts = []
    for name, graphs in (("graphs", True), ("eager", False)):
        model = target.policy(DTYPE)
        # Drafts would need graphs of other sizes, and a capture waits.
        made = target.engine(model, graphs=graphs, reply_tokens=64, drafts=False)
        engine = _decoding(made)
        with counted_waits(target) as waits:
            for _ in range(STEPS):
                engine.step()
        figures[name] = {place: number / STEPS for place, number in waits.items()}
        text = f"{name} {sum(figures[name].values()):g}"
        if target.pretended:
            uploads = figures[f"{name}: uploads"] = target.pretended.uploads.total() / STEPS
            text += f" and {uploads:g} uploads"
        texts.append(text)
    places = sorted({*figures["graphs"], *figures["eager"]})
    found = f"{', '.join(texts)} ({'; '.join(places)})"
    holds = all(sum(figures[name].values()) <= 1 for name in ("graphs", "eager"))
    return result("waits of a step", holds, found, "1 a step: the ids that were drawn", figures)


def _decoding(engine: Engine, num_samples: int = 2) -> Engine:
    """The engine with rows that decode."""
    for turn, prompt in enumerate(random_ids(engine.num_embeddings, 40, 90)):
        engine.open_group(prompt, [(0, 0, turn, i) for i in range(num_samples)])
    for _ in range(WARM_UP):
        engine.step()
    return engine


CASTS = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.to.dtype,  # in inference mode, where it is not yet taken apart
    torch.ops.aten.to.dtype_layout,
}


class CastsOfWeights(TorchDispatchMode):
    """A context that counts the casts of a module's weights to another type."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {weight.data_ptr() for weight in module.parameters()}
        self.num = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CASTS and args[0].data_ptr() in self.weights:
            wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
            self.num += wanted != [] and wanted != [args[0].dtype]
        return func(*args, **kwargs)


def casts_of_a_step(target: Target) -> Check:
    """How many weights a decode step casts under autocast, as it is when whole weights are
    trained."""
    policy = target.policy(torch.float32)
    with torch.autocast(target.device.type, DTYPE):
        engine = _decoding(target.engine(policy, graphs=False, reply_tokens=64))
        with CastsOfWeights(policy) as casts:
            for _ in range(STEPS):
                engine.step()
    number = casts.num / STEPS
    limit = "0: a cast reads and writes the whole weight"
    return result("casts of weights", number == 0, f"{number:g} a step", limit, {"casts": number})


CHECKS = [
    environment,
    paged_kernels,
    engine_against_transformers,
    graphs_on_and_off,
    waits_of_a_step,
]
"""They run on the pretended GPU, too. That has no autocast, which `casts_of_a_step` needs."""
