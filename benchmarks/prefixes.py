"""Evaluation with prompts that share their beginnings in the cache, and without.

    python benchmarks/prefixes.py --model.path MODEL --data.dev dev.json \\
        --data.tables tables.json --data.databases database
    python benchmarks/prefixes.py --model.path MODEL ... --count_only true    # tokens, no seconds

Plays the first `num_turns` turns of a split as eval.py does, with one engine each time, and prints
JSON. `with_sharing` is the engine as it is. In `without_sharing` a prompt finds no block of another
one, so each prompt is computed as a whole. A reply has at most `sampling.max_reply_tokens` tokens,
by default 24: the seconds are those of an evaluation with short replies, in which prompts weigh
more than usual. The numbers of prompt tokens do not depend on the replies.

- `prompt_tokens` are the tokens of all prompts, `prompt_tokens_computed` those of them that ran
  through the model, without what preempted rows compute again. `prompt_frac` divides the latter of
  the two engines.
- `tokens_computed` counts all tokens that ran through the model: prompts, observations and replies.
- `same_predictions` counts the turns with the same prediction. Rounding depends on the tokens that
  are computed together, so a near tie may come out differently in float32.
- `secs` is the shorter of `num_rounds` runs, the two engines in turn.
"""

import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from flags import print_json, run_benchmark
from torch import Tensor, nn

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.rl.evaluate import evaluate
from mtsql.run.launch import keep_freed_memory
from mtsql.sql.datasets import DataConfig
from mtsql.sql.sandbox import clear_result_cache
from mtsql.workbench import Workbench, set_up


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/prefixes.py."""

    split: Literal["dev", "train"] = "dev"
    """Split whose turns are played."""
    num_turns: int = 300
    """Number of turns, from the first on."""
    num_rounds: int = 1
    """Number of runs of each engine."""
    count_only: bool = False
    """Count tokens with a decoder that computes nothing and ends every reply at once or at its
    budget. The seconds are left out."""
    threads: int = 2
    """Threads that torch may use."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, full."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_reply_tokens=24)


class FreeDecoder(nn.Module):
    """A decoder that computes nothing: its hidden states are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, positions: Tensor, context: object, wanted: Tensor) -> Tensor:
        return torch.zeros(len(wanted), self.width)


def play(flags: Flags, workbench: Workbench, has_sharing: bool) -> tuple[dict, list[str]]:
    """One evaluation with a new engine: its figures and its predictions."""
    turns = workbench.corpora[flags.split].turns[: flags.num_turns]
    clear_result_cache()
    start = time.perf_counter()
    with generation_weights(workbench.policy, flags.model.compute_dtype) as model:
        engine = Engine(model, workbench.renderer.stop_ids, flags.sampling, flags.engine)
        engine.scheduler.prefixes.is_shared = has_sharing
        if flags.count_only:
            engine.decoder = FreeDecoder(model.config.hidden_size)
        scores, _ = evaluate(
            engine,
            workbench.renderer,
            turns,
            workbench.env_maker(flags.split),
            max_prompt_tokens=flags.max_prompt_tokens,
        )
    counts = engine.counts
    figures = {
        "prompt_tokens": counts.prompt,
        "prompt_tokens_computed": counts.prompt - counts.prefix_hits,
        "tokens_computed": counts.computed,
        "tokens_distinct": counts.distinct,
    }
    if not flags.count_only:
        figures["secs"] = time.perf_counter() - start
    return figures, [score.prediction for score in scores]


def main(flags: Flags) -> None:
    """Compare the two and print the figures."""
    if flags.num_turns < 1 or flags.num_rounds < 1:
        raise ValueError("num_turns and num_rounds must be at least 1")
    keep_freed_memory()
    torch.set_num_threads(flags.threads)
    print_json({"settings": asdict(flags), **compare(flags)})


def compare(flags: Flags) -> dict:
    """The figures of both engines, and how they compare."""
    max_tokens = flags.max_prompt_tokens + flags.sampling.max_trajectory_tokens
    workbench = set_up(
        flags.model, flags.data, flags.env, flags.style, (flags.split,), 0, max_tokens
    )
    best: dict[bool, dict] = {}
    predictions: dict[bool, list[str]] = {}
    for _ in range(flags.num_rounds):
        for has_sharing in (False, True):
            figures, predictions[has_sharing] = play(flags, workbench, has_sharing)
            if has_sharing not in best or figures.get("secs", 0) < best[has_sharing].get("secs", 0):
                best[has_sharing] = figures
    pairs = zip(predictions[False], predictions[True], strict=True)
    shared, single = best[True], best[False]
    return {
        "with_sharing": shared,
        "without_sharing": single,
        "prompt_frac": shared["prompt_tokens_computed"] / single["prompt_tokens_computed"],
        "turns": len(predictions[True]),
        "same_predictions": sum(a == b for a, b in pairs),
    }


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
