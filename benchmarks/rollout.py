"""Generation speed on multi-turn trajectories: our engine against a loop around `model.generate`.

    python benchmarks/rollout.py                     # SmolLM2-135M's shape, 8 prompts x 4 samples
    python benchmarks/rollout.py --num_layers 6 --width 192 --vocab 4096 --num_samples 16
    python benchmarks/rollout.py --num_layers 6 --width 192 --vocab 4096 --curve "[1, 2, 4, 8, 16]"
    python benchmarks/rollout.py --num_layers 6 --with_trl true --trl_python /path/to/python
    python benchmarks/rollout.py --dtype bfloat16    # all contestants by autocast

    python benchmarks/rollout.py --recorded benchmarks/recorded/quick_start.json

Prints JSON. Both play the dialogues of workload.py on the same random weights. The loop does what
tool-calling trainers without an inference server do. For each reply it computes the whole
conversation again, in a left-padded batch, until the longest reply of the batch is done. Useful
tokens are the sampled ones.

Our engine plays them with drafts (`engine`) and without (`engine_without_drafts`). Random text, the
default, is the worst case for drafts. With `--recorded` all play the text of recorded trajectories,
which repeats itself as real ones do; record.py makes such files.

It also prints

- the share of our time without drafts that matmuls alone would take on this machine, at the batch
  sizes of our engine iterations: `linear_frac` counts matmuls with weights, and `matmul_frac` also
  counts those of attention (keys and values are read once per row, those of a prompt once per
  group);
- the time of an engine iteration with a single row, and of reading the weights once;
- the speed of the engine with a model that costs nothing.

With `--with_trl true` the tool loop of TRL's GRPOTrainer plays them too, in a process of its own:
see trl_rollout.py.
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import HEAD_DIM, autocast, make_model, matmul_speeds
from flags import (
    ModelFlags,
    PeerFlags,
    as_words,
    print_json,
    run_benchmark,
    run_contestant,
    trl_version,
)
from torch import Tensor, nn
from transformers import LlamaConfig
from workload import ForcedLengths, Workload, WorkloadFlags, make_workload, read_workload

from mtsql.choices import NumBytes
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.model.decoder import CausalLM
from mtsql.run.launch import keep_freed_memory


@dataclass(frozen=True)
class Flags(PeerFlags, WorkloadFlags, ModelFlags):
    """Flags of benchmarks/rollout.py."""

    cache_bytes: NumBytes = 1536 << 20
    """Bytes of memory for keys and values."""
    block_size: int = 32
    """Number of tokens in a block of the key/value cache."""
    curve: list[int] | None = None
    """Measure only our engine's time, for each of these numbers of replies. null: off."""
    recorded: str | None = None
    """A file of record.py: force its text instead of random text. It sets the numbers of prompts,
    samples and replies. null: random text."""
    max_draft: int = 8
    """Maximum length of a draft."""
    with_generate: bool = True
    """Compare with the loop around generate."""
    only_generate: bool = False
    """Measure only the loop around generate, in this process."""
    keep_memory: bool = True
    """malloc keeps freed memory, as in our scripts. In a comparison, the loop around generate runs
    without this, as it does for its users."""

    @property
    def num_rows(self) -> int:
        """Rows that decode together."""
        return self.num_prompts * self.num_samples

    def engine_config(self, max_rows: int, max_draft: int) -> EngineConfig:
        """An engine that schedules what train_rl.py would schedule for this many rows."""
        return EngineConfig(
            max_rows,
            self.block_size,
            self.cache_bytes,
            max_scheduled_tokens=max(1024, 4 * self.num_rows),
            max_draft=max_draft,
        )

    def workload(self, num_replies: int) -> Workload:
        """The dialogues to play."""
        if self.recorded is not None:
            return read_workload(self.recorded, self.vocab)
        return make_workload(self.num_prompts, self.num_samples, num_replies, self.vocab)


class FreeDecoder(nn.Module):
    """A decoder that costs nothing, to measure what everything else costs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, positions: Tensor, context: object, wanted: Tensor) -> Tensor:
        return torch.zeros(len(wanted), self.width)


def generate_loop(model: nn.Module, work: Workload) -> None:
    """Generate each reply after a fresh prefill of the conversation so far."""
    num_rows, num_replies = work.lengths.shape
    samples_per_prompt = num_rows // len(work.prompts)
    contexts = [list(work.prompts[row // samples_per_prompt]) for row in range(num_rows)]
    num_done = [0] * num_rows  # ids of each row after its prompt
    for reply in range(num_replies):
        rows = np.flatnonzero(work.lengths[:, reply]).tolist()  # those that have such a reply
        width = max(len(contexts[row]) for row in rows)
        padding = [width - len(contexts[row]) for row in rows]
        ids = [[0] * pad + contexts[row] for pad, row in zip(padding, rows, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=True,
            top_k=0,
            max_new_tokens=int(work.lengths[:, reply].max()),
            pad_token_id=0,
        )
        for line, row in zip(out[:, width:].tolist(), rows, strict=True):
            new = line[: work.lengths[row, reply]]
            if work.texts is not None:
                new = work.texts[row][num_done[row] : num_done[row] + len(new)]
            if reply < len(work.observations[row]):
                new = new + work.observations[row][reply]
            contexts[row] += new
            num_done[row] += len(new)


def fastest(run: Callable[[], object], num_runs: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    secs = []
    for _ in range(num_runs):
        start = time.perf_counter()
        run()
        secs.append(time.perf_counter() - start)
    return min(secs)


def linear_secs(model: nn.Module, steps: Counter, max_rows: int) -> float:
    """Seconds that the matmuls with the model's weights alone take in these engine iterations.

    They are measured at batch sizes that are powers of two, and interpolated between these.
    """
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]

    def measure(num_tokens: int, modules: list[nn.Module]) -> float:
        inputs = {m.in_features: torch.randn(num_tokens, m.in_features) for m in modules}
        return fastest(lambda: [module(inputs[module.in_features]) for module in modules])

    grid = [1 << i for i in range(max(steps).bit_length() + 1)]
    body_secs = [measure(num_tokens, layers) for num_tokens in grid]
    head_secs = [measure(num_tokens, [model.lm_head]) for num_tokens in grid]
    total = 0.0
    for num_tokens, num_steps in steps.items():
        body = np.interp(num_tokens, grid, body_secs)
        head = np.interp(min(num_tokens, max_rows), grid, head_secs)
        total += num_steps * (body + head)
    return float(total)


def attention_secs(engine: ForcedLengths, config: LlamaConfig, num_samples: int) -> float:
    """Seconds that attention's matmuls alone take.

    The matmuls of decoding are measured, as a batched matmul over 400 MB of keys and values. The
    matmuls of chunks are counted, at the speed of a large matmul.
    """
    block_size = engine.pool.block_size
    num_blocks = (400 << 20) // (block_size * HEAD_DIM * 4)
    keys = torch.randn(num_blocks, HEAD_DIM, block_size)
    values = torch.randn(num_blocks, block_size, HEAD_DIM)

    def secs_per_token(num_queries: int) -> float:
        queries = torch.randn(num_blocks, num_queries, HEAD_DIM)
        weights = torch.randn(num_blocks, num_queries, block_size)
        scores = torch.empty_like(weights)
        outputs = torch.empty_like(queries)

        def both_matmuls() -> None:
            torch.bmm(queries, keys, out=scores)
            torch.bmm(weights, values, out=outputs)

        return fastest(both_matmuls) * config.num_key_value_heads / (num_blocks * block_size)

    group = config.num_attention_heads // config.num_key_value_heads
    own = engine.num_own_tokens * secs_per_token(group)
    shared = engine.num_shared_tokens * secs_per_token(group * num_samples)
    num_operations = engine.num_pairs * 4 * config.num_attention_heads * HEAD_DIM
    chunks = num_operations / median(matmul_speeds())
    return config.num_hidden_layers * (own + shared + chunks)


def single_row(engine: ForcedLengths, model: nn.Module) -> dict[str, float]:
    """Measure a decode iteration of a single row, and one pass over the weights."""
    engine.force(np.full((1, 1), 999))
    (handle,) = engine.open_group(list(range(100)), [(0, 0, 0, 0)])
    step_secs = []
    for _ in range(20):
        start = time.perf_counter()
        engine.step()
        step_secs.append(time.perf_counter() - start)
    engine.close(handle)

    def read_weights() -> None:
        for weight in model.parameters():
            weight.sum()

    return {
        "step_secs": median(step_secs[2:]),  # the first iterations compute the prompt
        "read_weights_secs": fastest(read_weights, num_runs=5),
    }


def model_free(config: LlamaConfig, max_draft: int) -> dict[str, float]:
    """Measure the speed at which 256 rows decode 64 random tokens each, with a decoder, a head and
    a cache of one layer that cost next to nothing."""
    values = config.to_dict() | {"num_hidden_layers": 1}
    model = CausalLM(LlamaConfig(**values)).eval()
    limits = EngineConfig(256, 64, 256 << 20, max_draft=max_draft)
    engine = ForcedLengths(model, (), SamplingConfig(), limits)
    engine.decoder = FreeDecoder(config.hidden_size)
    engine.head = nn.Linear(config.hidden_size, 8, bias=False)
    texts = np.random.default_rng(0).integers(0, config.vocab_size, (256, 64)).tolist()
    nothing: list[list[list[int]]] = [[] for _ in texts]
    work = Workload([[1] * 100] * 32, np.full((256, 1), 64), nothing, texts)
    start = time.perf_counter()
    engine.play(work)
    return {"row_tokens_per_sec": work.num_sampled / (time.perf_counter() - start)}


def play_ours(
    flags: Flags, model: nn.Module, num_replies: int, max_draft: int
) -> tuple[dict[str, float], Counter, ForcedLengths]:
    """Play the workload with our engine. Returns its figures, the number of iterations by scheduled
    tokens, and the engine."""
    work = flags.workload(num_replies)
    config = flags.engine_config(len(work.lengths), max_draft)
    engine = ForcedLengths(model, (), sampling_config(work), config)
    start = time.perf_counter()
    steps = engine.play(work)
    secs = time.perf_counter() - start
    counts = engine.counts
    figures = {
        "num_replies": num_replies,
        "secs": secs,
        "useful_tokens": work.num_sampled,
        "useful_tokens_per_sec": work.num_sampled / secs,
        "computed_over_distinct": counts.computed / counts.distinct,
        "tokens_computed_per_sec": counts.computed / secs,
        "steps": counts.steps,
        "drafted_tokens": counts.drafted,
        "accepted_frac": counts.accepted / max(1, counts.drafted),
    }
    return figures, steps, engine


def sampling_config(work: Workload) -> SamplingConfig:
    """Budgets that no reply and no trajectory of the workload reaches."""
    return SamplingConfig(max_reply_tokens=1 << 10, max_trajectory_tokens=work.budget + 16)


def play_generate(flags: Flags, model: nn.Module) -> dict[str, float | bool]:
    """Play the workload with the loop around generate."""
    work = flags.workload(flags.num_replies)
    start = time.perf_counter()
    generate_loop(model, work)
    secs = time.perf_counter() - start
    return {
        "secs": secs,
        "useful_tokens_per_sec": work.num_sampled / secs,
        "keep_memory": flags.keep_memory,
    }


def measure_engine(flags: Flags, model: nn.Module) -> dict[str, dict]:
    """Measure our engine on the workload with drafts and without, on a single row, and without the
    cost of the model."""
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    figures, _, _ = play_ours(flags, model, flags.num_replies, flags.max_draft)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["peak_bytes_over_weights_and_cache"] = peak_bytes - weight_bytes - flags.cache_bytes
    plain, steps, engine = play_ours(flags, model, flags.num_replies, max_draft=0)
    work = flags.workload(flags.num_replies)
    linear = linear_secs(model, steps, len(work.lengths))
    attention = attention_secs(engine, model.config, len(work.lengths) // len(work.prompts))
    plain["linear_secs"] = linear
    plain["attention_matmul_secs"] = attention
    plain["linear_frac"] = linear / plain["secs"]
    plain["matmul_frac"] = (linear + attention) / plain["secs"]
    one_row = ForcedLengths(model, (), SamplingConfig(), flags.engine_config(1, max_draft=0))
    return {
        "engine": figures,
        "engine_without_drafts": plain,
        "single_row": single_row(one_row, model),
        "model_free": {
            "with_drafts": model_free(model.config, flags.max_draft),
            "without_drafts": model_free(model.config, 0),
        },
    }


def main(flags: Flags) -> None:
    """Measure one workload, or with `curve` our time for several numbers of replies."""
    if flags.with_trl:
        trl_version(flags.trl_python)
    if flags.with_trl and flags.recorded:
        raise ValueError("--recorded and --with_trl: TRL's loop plays random text only")
    torch.set_num_threads(flags.threads)
    if flags.keep_memory:
        keep_freed_memory()
    attention = "sdpa" if flags.only_generate else "ours"
    model = make_model(None, flags.num_layers, flags.width, flags.vocab, attention).eval()
    # Not inference_mode: in it, autocast casts all weights again in every step.
    with torch.no_grad(), autocast(flags.dtype):
        if flags.only_generate:
            print_json(play_generate(flags, model), is_one_line=True)
            return
        play_ours(flags, model, 1, flags.max_draft)  # warm up
        if flags.curve:
            curve = [play_ours(flags, model, n, flags.max_draft)[0] for n in flags.curve]
            print_json({"curve": curve})
            return
        result = measure_engine(flags, model)

    secs = result["engine"]["secs"]
    result["speedup_by_drafts"] = result["engine_without_drafts"]["secs"] / secs
    names = [*ModelFlags.__dataclass_fields__, *WorkloadFlags.__dataclass_fields__]
    words = as_words({name: getattr(flags, name) for name in names})
    if flags.with_generate:
        alone = ["--only_generate=true", "--keep_memory=false"]
        if flags.recorded:
            alone.append(f"--recorded={flags.recorded}")
        result["generate_loop"] = run_contestant(sys.executable, __file__, words + alone)
        result["speedup"] = result["generate_loop"]["secs"] / secs
    if flags.with_trl:
        script = Path(__file__).with_name("trl_rollout.py")
        result["trl"] = run_contestant(flags.trl_python, script, words)
        result["speedup_trl"] = result["trl"]["secs"] / secs
    result["setting"] = asdict(flags)
    print_json(result)


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
