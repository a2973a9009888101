"""Generation speed on multi-turn trajectories: our engine against a loop around `model.generate`. Prints JSON.

    python benchmarks/rollout.py                     # SmolLM2-135M's shape, 8 prompts x 4 samples
    python benchmarks/rollout.py --num_layers 6 --width 192 --vocab 4096 --num_samples 16 --num_replies 8
    python benchmarks/rollout.py --num_layers 6 --width 192 --vocab 4096 --curve "[1, 2, 4, 8, 16]"
    python benchmarks/rollout.py --num_layers 6 --with_trl true --trl_python /path/to/python

Both play the same dialogues on the same random weights: prompts of about 600 tokens, replies of 20 to 120
tokens whose lengths are forced (weights and text do not matter for speed), observations of about 80 tokens
between them. No SQL. The loop is what tool-calling trainers without an inference server do: at each reply the
whole conversation again, in a left-padded batch, until its longest reply is done. Useful tokens are the
sampled ones. Also printed: the share of our time that the matrix products alone would take on this machine at
the batch sizes of our steps (the weights', and with those of attention: keys and values are read once per row,
a prompt's once per group); the step of a single row against reading the weights once; the engine with a model
that costs nothing.

With `--with_trl true` the tool loop of TRL's GRPOTrainer plays them too, in a process of its own run by the
interpreter `trl_python` (default: this one): see benchmarks/trl_rollout.py.
"""

import json
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import HEAD_DIM, make_model, matmul_speeds, run_contestant, trl_version
from jsonargparse import auto_cli
from torch import nn
from transformers import LlamaConfig

from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig, StopReason
from mtsql.model.decoder import CausalLM
from mtsql.run.launch import keep_freed_memory


@dataclass(frozen=True)
class Workload:
    """What is generated."""

    prompts: list[list[int]]
    lengths: np.ndarray  # (rows, replies) forced length of each reply
    observations: list[list[list[int]]]  # per row, between its replies

    @property
    def useful(self) -> int:
        return int(self.lengths.sum())


def make_workload(num_prompts: int, num_samples: int, num_replies: int, vocab: int) -> Workload:
    rng = np.random.default_rng(0)
    rows = num_prompts * num_samples
    ids = lambda low, high: rng.integers(0, vocab, rng.integers(low, high + 1)).tolist()  # noqa: E731
    prompts = [ids(550, 650) for _ in range(num_prompts)]
    lengths = np.clip(rng.exponential(45, (rows, num_replies)).astype(int) + 20, 20, 120)
    return Workload(
        prompts, lengths, [[ids(60, 100) for _ in range(num_replies - 1)] for _ in range(rows)]
    )


class ForcedLengths(Engine):
    """Ends replies where the workload says, and counts what attention has to look at."""

    own_tokens = shared_tokens = pairs = 0
    """Cached tokens read while decoding, of the rows' own and of prompts (once per group and step);
    pairs of a query and a key in chunks."""

    def play(self, work: Workload) -> Counter:
        """Play the whole workload; how often a step computed so many tokens."""
        self.lengths, done = work.lengths, np.zeros(len(work.lengths), dtype=int)
        self.done, steps = done, Counter()
        samples = len(work.lengths) // len(work.prompts)
        for turn, prompt in enumerate(work.prompts):
            self.open_group(prompt, [(0, 0, turn, i) for i in range(samples)])
        while self.has_work:
            before = self.tokens_computed
            for completion in self.step():
                handle = completion.handle
                done[handle] += 1
                if done[handle] < work.lengths.shape[1]:
                    self.extend(handle, work.observations[handle][done[handle] - 1])
                else:
                    self.close(handle)
            steps[self.tokens_computed - before] += 1
        return steps

    def _compute(self, plan):
        prompts = {id(row.prompt): len(row.prompt.ids) for row in plan.decoding}
        self.own_tokens += sum(len(row.ids) for row in plan.decoding)
        self.shared_tokens += sum(prompts.values())
        self.pairs += sum(num * owner.cached + num * (num + 1) // 2 for owner, num in plan.chunks)
        return super()._compute(plan)

    def _stop_reason(self, row):
        is_done = len(row.logprobs) == self.lengths[row.handle, self.done[row.handle]]
        return StopReason.REPLY_TOKENS if is_done else None


class FreeDecoder(nn.Module):
    """A model that costs nothing, to see what everything around it costs."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, ids, positions, context, wanted):
        return torch.zeros(len(wanted), self.width)


def generate_loop(model: nn.Module, work: Workload) -> None:
    """Every reply from a fresh prefill of the conversation so far."""
    rows, num_replies = work.lengths.shape
    contexts = [list(work.prompts[row * len(work.prompts) // rows]) for row in range(rows)]
    for reply in range(num_replies):
        longest, new = max(map(len, contexts)), int(work.lengths[:, reply].max())
        ids = torch.tensor([[0] * (longest - len(c)) + c for c in contexts])
        mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts])
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0
        )
        for row, context in enumerate(contexts):
            context += out[row, longest : longest + work.lengths[row, reply]].tolist()
            if reply + 1 < num_replies:
                context += work.observations[row][reply]


def fastest(run, times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def linear_secs(model: nn.Module, steps: Counter, max_rows: int) -> float:
    """Seconds of the products with the model's weights alone in these steps; powers of two are
    measured."""
    layers = [m for m in model.model.modules() if isinstance(m, nn.Linear)]

    def measure(num_tokens: int, modules: list[nn.Module]) -> float:
        inputs = {m.in_features: torch.randn(num_tokens, m.in_features) for m in modules}
        return fastest(lambda: [module(inputs[module.in_features]) for module in modules])

    grid = [1 << i for i in range(max(steps).bit_length() + 1)]
    body, head = [measure(n, layers) for n in grid], [measure(n, [model.lm_head]) for n in grid]
    secs = lambda n: np.interp(n, grid, body) + np.interp(min(n, max_rows), grid, head)  # noqa: E731
    return sum(times * secs(n) for n, times in steps.items())


def attention_secs(engine: ForcedLengths, config: LlamaConfig, num_samples: int) -> float:
    """Seconds of attention's products alone: those of decoding at the speed of a batched product
    over 400 MB of keys and values, those of chunks at the speed of a large one."""
    heads, num_kv, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        engine.pool.block_size,
    )
    blocks = (400 << 20) // (size * HEAD_DIM * 4)
    keys, values = torch.randn(blocks, HEAD_DIM, size), torch.randn(blocks, size, HEAD_DIM)

    def per_token(queries: int) -> float:
        query, weight = torch.randn(blocks, queries, HEAD_DIM), torch.randn(blocks, queries, size)
        out = torch.empty_like(weight), torch.empty_like(query)
        both = fastest(
            lambda: (torch.bmm(query, keys, out=out[0]), torch.bmm(weight, values, out=out[1]))
        )
        return both * num_kv / (blocks * size)

    group = heads // num_kv
    secs = engine.own_tokens * per_token(group) + engine.shared_tokens * per_token(
        group * num_samples
    )
    return config.num_hidden_layers * (
        secs + engine.pairs * 4 * heads * HEAD_DIM / median(matmul_speeds())
    )


def main(
    num_prompts: int = 8,
    num_samples: int = 4,
    num_replies: int = 4,
    num_layers: int = 30,
    width: int = 576,
    vocab: int = 49152,
    cache_bytes: int = 1536 << 20,
    block_size: int = 32,
    with_generate: bool = True,
    curve: list[int] | None = None,
    with_trl: bool = False,
    trl_python: str = sys.executable,
    threads: int = 2,
    only_generate: bool = False,
    keep_memory: bool = True,
) -> None:
    """Measure one point, or with `curve` our time for several numbers of replies.

    `keep_memory`: malloc keeps what is freed, as in our scripts. The loop around generate runs
    without, as its users have it, unless it is asked for alone (`only_generate`).
    """
    if with_trl:
        trl_version(trl_python)
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    attention = "sdpa" if only_generate else "ours"
    model = make_model(None, num_layers, width, vocab, attention).eval()
    config = model.config
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = num_prompts * num_samples
    sampling = SamplingConfig(
        max_reply_tokens=1 << 10, max_trajectory_tokens=220 * max(curve or [num_replies])
    )

    def engine(max_rows: int = rows) -> ForcedLengths:
        limits = EngineConfig(max_rows, block_size, cache_bytes, max(1024, 4 * rows))
        return ForcedLengths(model, (), sampling, limits)

    def ours(replies: int) -> tuple[dict, Counter, ForcedLengths]:
        work, played = make_workload(num_prompts, num_samples, replies, vocab), engine()
        start = time.perf_counter()
        steps = played.play(work)
        secs = time.perf_counter() - start
        result = {
            "num_replies": replies,
            "secs": secs,
            "useful_tokens": work.useful,
            "useful_tokens_per_sec": work.useful / secs,
            "computed_over_distinct": played.tokens_computed / played.tokens_distinct,
            "tokens_computed_per_sec": played.tokens_computed / secs,
        }
        return result, steps, played

    sizes = {
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "num_replies": num_replies,
        "num_layers": num_layers,
        "width": width,
        "vocab": vocab,
        "threads": threads,
    }
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    with torch.inference_mode():
        if only_generate:
            work = make_workload(num_prompts, num_samples, num_replies, vocab)
            start = time.perf_counter()
            generate_loop(model, work)
            secs = time.perf_counter() - start
            print(
                json.dumps(
                    {
                        "secs": secs,
                        "useful_tokens_per_sec": work.useful / secs,
                        "keep_memory": keep_memory,
                    }
                )
            )
            return
        ours(1)  # warm up
        if curve:
            print(json.dumps({"curve": [ours(replies)[0] for replies in curve]}, indent=1))
            return
        result, steps, played = ours(num_replies)
        result["peak_bytes_over_weights_and_cache"] = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - weight_bytes - cache_bytes
        )
        result["linear_secs"] = linear_secs(model, steps, rows)
        result["attention_product_secs"] = attention_secs(played, config, num_samples)
        result["linear_frac"] = result["linear_secs"] / result["secs"]
        result["product_frac"] = (
            result["linear_secs"] + result["attention_product_secs"]
        ) / result["secs"]
        out = {"engine": result, "single_row": single_row(engine(1), model)}
        out["model_free"] = model_free(config, sampling)
    if with_generate:
        alone = ["--only_generate=true", "--keep_memory=false"]
        out["generate_loop"] = run_contestant(sys.executable, __file__, flags + alone)
        out["speedup"] = out["generate_loop"]["secs"] / result["secs"]
    if with_trl:
        out["trl"] = run_contestant(
            trl_python, str(Path(__file__).with_name("trl_rollout.py")), flags
        )
        out["speedup_trl"] = out["trl"]["secs"] / result["secs"]
    out["workload"] = {"prompts": num_prompts, "samples": num_samples, "replies": num_replies}
    out["threads"] = threads
    out["model"] = {
        "layers": num_layers,
        "width": width,
        "vocab": vocab,
        "weight_bytes": weight_bytes,
    }
    out["limits"] = asdict(EngineConfig(rows, block_size, cache_bytes, max(1024, 4 * rows)))
    print(json.dumps(out, indent=1))


def single_row(engine: ForcedLengths, model: nn.Module) -> dict:
    """A decode step of one row, and one pass over the weights."""
    engine.lengths, engine.done = np.full((1, 1), 999), np.zeros(1, dtype=int)
    (handle,) = engine.open_group(list(range(100)), [(0, 0, 0, 0)])
    secs = []
    for _ in range(20):
        start = time.perf_counter()
        engine.step()
        secs.append(time.perf_counter() - start)
    engine.close(handle)
    reads = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in model.parameters():
            weight.sum()
        reads.append(time.perf_counter() - start)
    return {"step_secs": float(np.median(secs[2:])), "read_weights_secs": min(reads)}


def model_free(config: LlamaConfig, sampling: SamplingConfig) -> dict:
    """256 rows decode 64 tokens each with a decoder, a head and a cache of one layer: they cost
    next to nothing."""
    config = LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1})
    engine = ForcedLengths(CausalLM(config).eval(), (), sampling, EngineConfig(256, 64, 256 << 20))
    engine.decoder = FreeDecoder(config.hidden_size)
    engine.head = nn.Linear(config.hidden_size, 8, bias=False)
    work = Workload([[1] * 100] * 32, np.full((256, 1), 64), [[] for _ in range(256)])
    start = time.perf_counter()
    engine.play(work)
    return {"row_tokens_per_sec": work.useful / (time.perf_counter() - start)}


if __name__ == "__main__":
    auto_cli(main)
