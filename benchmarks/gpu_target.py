"""What the checks of benchmarks/gpu.py run on (a device, a model, dialogues) and what they return.

A target is a GPU, or the pretended one of the tests (`tests/helpers/pretended_gpu.py`), which shows
that a check itself works on a machine without a GPU.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mtsql.engine.config import EngineConfig, block_bytes
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import SamplingConfig
from mtsql.learner.packing import Sample
from mtsql.model.decoder import CausalLM, from_transformers

BLOCK = 256
"""Tokens in a block of the cache: flash-attn wants a multiple of this."""
DTYPE = torch.bfloat16
WAIT = "called a synchronizing"
"""What torch warns of at a wait. Switching these warnings on gives another one, once."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a random Qwen3 model."""

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int


QWEN3_06B = Sizes(28, 1024, 3072, 16, 8, 128, 151_936)
TINY = Sizes(2, 64, 96, 4, 2, 16, 97)


@dataclass(frozen=True)
class Target:
    """A device and a model. `path`: a Hugging Face folder; without one, random weights of `sizes`.
    `pretended`: the pretended GPU, or None for a real device."""

    device: torch.device
    sizes: Sizes = QWEN3_06B
    path: str | None = None
    pretended: Any = None

    def theirs(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model of transformers: always the same weights, rounded to `dtype`. It stays on the
        CPU where the GPU is a pretended one."""
        device = torch.device("cpu") if self.pretended else self.device
        if self.path:
            model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=torch.float32, attn_implementation="sdpa"
            )
        else:
            torch.manual_seed(0)
            with device:
                model = Qwen3ForCausalLM._from_config(
                    self.config(), attn_implementation="sdpa", dtype=torch.float32
                )
        for weight in model.parameters():  # `model.to(dtype)` would round the rotation, too
            weight.data = weight.data.to(dtype)
        return model.to(device).eval()

    def config(self) -> Qwen3Config:
        """The configuration of the random model. The spread of its logits does not depend on its
        width."""
        sizes = self.sizes
        return Qwen3Config(
            vocab_size=sizes.vocab,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            initializer_range=0.64 / sizes.width**0.5,
            bos_token_id=None,
            eos_token_id=None,
        )

    def policy(self, dtype: torch.dtype) -> CausalLM:
        """Our decoder with the same weights, on the device."""
        model = from_transformers(self.theirs(dtype))
        return self.pretended.move(model) if self.pretended else model.to(self.device)

    def engine(
        self,
        model: CausalLM,
        *,
        graphs: bool = True,
        rows: int = 16,
        blocks: int = 64,
        scheduled: int = 2048,
        reply_tokens: int = 8,
        drafts: bool = True,
        **sampling: Any,
    ) -> Engine:
        """An engine with a cache of `blocks` blocks that stops replies by their length only."""
        num_bytes = blocks * block_bytes(model.config, BLOCK, DTYPE)
        limits = EngineConfig(
            max_rows=rows,
            block_size=BLOCK,
            cache_bytes=num_bytes,
            max_scheduled_tokens=scheduled,
            cuda_graphs=graphs,
            max_draft=EngineConfig.max_draft if drafts else 0,
        )
        settings = SamplingConfig(
            max_reply_tokens=reply_tokens, max_trajectory_tokens=2048, **sampling
        )
        return Engine(model, (), settings, limits)


def random_ids(vocab: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Lists of random ids, one of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def play(
    engine: Engine, prompts: list[list[int]], *, num_samples: int = 2, num_replies: int = 2
) -> list[Sample]:
    """Play `num_samples` rows of each prompt, with an observation of 7 tokens between their
    replies. Returns the trajectories, sorted by prompt; `old_logprobs` are those of the engine."""
    rows: dict[int, Sample] = {}
    for turn, prompt in enumerate(prompts):
        keys = [(0, 0, turn, i) for i in range(num_samples)]
        for handle in engine.open_group(prompt, keys):
            rows[handle] = Sample(prompt, [], [], [], [])
    left = dict.fromkeys(rows, num_replies)
    [observation] = random_ids(engine.num_embeddings, 7, seed=1)
    while engine.has_work:
        for done in engine.step():
            row = rows[done.handle]
            _add(row, done.ids, done.logprobs)
            left[done.handle] -= 1
            if left[done.handle]:
                engine.extend(done.handle, observation)
                _add(row, observation)
            else:
                engine.close(done.handle)
    return list(rows.values())


def _add(row: Sample, ids: list[int], logprobs: list[float] | None = None) -> None:
    row.ids.extend(ids)
    row.loss_mask.extend([int(logprobs is not None)] * len(ids))
    row.old_logprobs.extend(logprobs or [0.0] * len(ids))
    row.advantages.extend([1.0] * len(ids))


@dataclass(frozen=True)
class Check:
    """The result of a check."""

    name: str
    status: Literal["pass", "fail", "skip"]
    found: str
    """What was found, for a reader."""
    limit: str = ""
    """What was required, or wanted, and why."""
    figures: dict[str, Any] = field(default_factory=dict)


def result(
    name: str, holds: bool, found: str, limit: str, figures: dict[str, Any] | None = None
) -> Check:
    """A check that passes if `holds`."""
    return Check(name, "pass" if holds else "fail", found, limit, figures or {})


def run_checks(target: Target, checks: list[Callable[[Target], Check]]) -> Iterator[Check]:
    """Run the checks one after the other."""
    for check in checks:
        yield guarded(target, check.__name__.replace("_", " "), partial(check, target))


def guarded(target: Target, name: str, run: Callable[[], Check]) -> Check:
    """The result of a check. One that ends in an error has failed."""
    try:
        return run()
    except (RuntimeError, ValueError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return Check(name, "fail", lines[0], "no error")
    finally:
        if target.device.type == "cuda":
            gc.collect()  # Accelerate's wrapped models refer to themselves
            torch.cuda.empty_cache()


@contextmanager
def counted_waits(target: Target) -> Iterator[Counter[str]]:
    """Counts by place how often the host waits for the device inside the `with`."""
    waits: Counter[str] = Counter()
    if target.pretended:
        target.pretended.reset()
        yield waits
        waits.update(target.pretended.waits)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if WAIT in str(warning.message):
            waits[f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"] += 1
