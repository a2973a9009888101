"""How long a run takes on GPUs, by arithmetic: a roofline of its steps, and drawn lengths.

    clock = Clock(shape, gpu_named("H100"), Lengths(), Shares(), num_ranks=8, ...)
    clock.rollout_secs(num_groups=256, group_size=5)

A decode step takes the time to read the weights and the keys and values of its rows, plus that of
its matmuls, and at least the time to start its kernels. Learning takes the time of its matmuls.
Drafts, prompts that share a schema in the cache, compiling and saving are not counted. Nothing here
was measured on a GPU: replace the shares by what benchmarks/gpu.py finds.
"""

import heapq
import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from transformers import PreTrainedConfig

from mtsql.engine.config import cache_shape
from mtsql.model.flops import GPU_PEAKS, ModelFlops, Work, pairs

BANDWIDTHS = {
    "A100": 2.039e12,
    "A100-40GB": 1.555e12,
    "B200": 8.0e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "L40S": 0.864e12,
    "RTX 4090": 1.008e12,
}
"""Bytes per second of a GPU's memory, by data sheet (A100 and H100: SXM, 80 GB)."""
NUM_DRAWN = 2000
"""Trajectories that are drawn for the mean."""
BYTES = 2
"""Of a number in bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU."""

    name: str
    peak: float
    """Operations per second of dense bfloat16 matmuls."""
    bandwidth: float
    """Bytes per second of its memory."""


def gpu_named(name: str) -> Gpu:
    """The GPU of this name. ValueError that lists the known ones."""
    for known, bandwidth in BANDWIDTHS.items():
        if known.lower().replace(" ", "") == name.lower().replace(" ", ""):
            return Gpu(known, GPU_PEAKS[known.removesuffix("-40GB")], bandwidth)
    raise ValueError(f"gpu is {name}: expected one of {', '.join(BANDWIDTHS)}")


@dataclass(frozen=True)
class Lengths:
    """What is assumed of the trajectories."""

    prompt_tokens: int = 700
    """Mean tokens of a prompt (CoSQL and SParC with the tokenizer of Qwen3: 609 to 709)."""
    sampled_tokens: int = 1800
    """Mean sampled tokens of a trajectory. The paper's responses have 2,070 to 2,700 tokens,
    observations included."""
    observation_tokens: int = 400
    """Mean tokens of a trajectory's observations."""
    spread: float = 0.5
    """Standard deviation of the logarithm of a trajectory's sampled tokens."""
    replies: float = 3.0
    """Mean replies of a trajectory."""

    demonstration_tokens: int = 150
    """Mean tokens of the replies of a demonstration (`source: gold`), in place of
    `sampled_tokens`."""

    def of_episodes(self, max_replies: int, is_demonstrated: bool) -> "Lengths":
        """The lengths of episodes with at most so many replies. Replies and observations stay as
        long as they are, and there are fewer of them."""
        replies = min(self.replies, max_replies)
        sampled = self.demonstration_tokens if is_demonstrated else self.sampled_tokens
        between = self.replies - 1
        observed = self.observation_tokens * (replies - 1) / between if between else 0
        return replace(
            self,
            sampled_tokens=round(sampled * replies / self.replies),
            observation_tokens=round(observed),
            replies=replies,
        )


@dataclass(frozen=True)
class Shares:
    """What is assumed of the machine."""

    bandwidth_frac: float = 0.75
    """Share of the memory's bandwidth that decoding reaches."""
    matmul_frac: float = 0.6
    """Share of the peak that the matmuls of a decode step reach."""
    learn_frac: float = 0.4
    """Share of the peak that learning reaches, recomputed activations included."""
    layer_us: float = 53.0
    """Microseconds of a layer in a decode step, at least (24 kernels of 2.2 microseconds)."""
    eager_layer_us: float = 550.0
    """The same in a step that also computes a prompt or an observation, without a CUDA graph."""
    host_row_us: float = 3.0
    """Microseconds on the host for each row of a decode step."""
    gather_bandwidth: float = 150e9
    """Bytes per second at which a rank receives weights or gradients of the others."""
    wait_secs: float = 0.1
    """Seconds between a reply and the next one: the query, and steps until the observation
    joins."""
    other_secs: float = 3.0
    """Seconds of an update for judging the last answers, packing and logging."""


@dataclass(frozen=True)
class Clock:
    """Seconds of the phases of a run on one of `num_ranks` GPUs of a kind."""

    shape: PreTrainedConfig
    gpu: Gpu
    lengths: Lengths
    shares: Shares
    num_ranks: int
    is_sharded: bool
    is_adapted: bool
    checkpointing: bool
    cache_bytes: int
    max_rows: int
    max_tokens: int
    """Budget of a trajectory after its prompt."""
    seed: int = 0

    @property
    def flops(self) -> ModelFlops:
        """Operations of the model."""
        return ModelFlops.of_config(self.shape, self.is_adapted)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights that a decode step reads, in bfloat16."""
        return BYTES * (self.flops.per_token + self.flops.per_predicted) / 2

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token in bfloat16."""
        num_layers, num_heads, head = cache_shape(self.shape)
        return 2 * num_layers * num_heads * head * BYTES

    @cached_property
    def sampled(self) -> int:
        """Mean sampled tokens of a trajectory that ends at the budget."""
        lengths = self._draw_lengths(NUM_DRAWN)
        return round(sum(lengths) / NUM_DRAWN)

    @property
    def trajectory(self) -> int:
        """Mean tokens after the prompt."""
        return self.sampled + self.lengths.observation_tokens

    def num_rows(self, group_size: int) -> int:
        """Trajectories of mean length that decode together: `max_rows`, or what fits in the cache.
        A group stores its prompt once. A row is on average half as long as it becomes."""
        row = self.lengths.prompt_tokens / group_size + self.trajectory / 2
        return max(1, min(self.max_rows, int(self.cache_bytes / (row * self.token_bytes))))

    def rollout_secs(self, num_groups: int, group_size: int) -> float:
        """Seconds in which the ranks play `num_groups` groups together. All rows that fit decode at
        the same time; when one ends, the next begins."""
        num_mine = -(-num_groups // self.num_ranks)
        if not num_mine:
            return 0.0
        lengths = self.lengths
        num_rows = self.num_rows(group_size)
        todo = iter(self._draw_lengths(num_mine * group_size))
        ends = list(islice(todo, num_rows))  # the step at which each decoding row ends
        heapq.heapify(ends)
        context = lengths.prompt_tokens + self.trajectory / 2
        now = 0
        secs = 0.0
        while ends:
            num_live = len(ends)
            end = heapq.heappop(ends)
            secs += (end - now) * self._step_secs(num_live, context)
            now = end
            length = next(todo, None)
            if length is not None:
                heapq.heappush(ends, now + length)
        num_joins = num_mine * (1 + group_size * (lengths.replies - 1))
        secs += self._eager_secs(secs, now, num_joins)
        prompts = Work(
            num_mine * lengths.prompt_tokens, num_mine * pairs(0, lengths.prompt_tokens), num_mine
        )
        joined = num_mine * group_size * lengths.observation_tokens
        prefill = prompts + Work(joined, round(joined * context), 0)
        secs += self.flops.forward(prefill) / self.gpu.peak / self.shares.matmul_frac
        # Rows that wait for a query leave their place to others, except at the end.
        return secs + lengths.replies * self.shares.wait_secs + self._gather_secs()

    def _draw_lengths(self, num: int) -> list[int]:
        """Sampled tokens of trajectories: log-normal, up to the budget."""
        rng = random.Random(self.seed)
        lengths = self.lengths
        middle = math.log(lengths.sampled_tokens) - lengths.spread**2 / 2
        longest = max(1, self.max_tokens - lengths.observation_tokens)
        return [
            max(1, min(longest, round(rng.lognormvariate(middle, lengths.spread))))
            for _ in range(num)
        ]

    def _step_secs(self, num_rows: int, context: float) -> float:
        """Seconds of a step that draws a token for each of `num_rows` rows."""
        shares = self.shares
        read = num_rows * context
        work = Work(num_rows, round(read), num_rows)
        secs = (self.weight_bytes + read * self.token_bytes) / self.gpu.bandwidth
        secs = secs / shares.bandwidth_frac
        secs += self.flops.forward(work) / self.gpu.peak / shares.matmul_frac
        num_layers: int = self.shape.num_hidden_layers
        return max(secs, num_layers * shares.layer_us / 1e6) + num_rows * shares.host_row_us / 1e6

    def _eager_secs(self, secs: float, num_steps: int, num_joins: float) -> float:
        """What steps without a CUDA graph cost more, of `num_steps` in `secs`: those in which one
        of `num_joins` prompts and observations is computed, if these come at random."""
        least = self.shape.num_hidden_layers * self.shares.eager_layer_us / 1e6
        eager_frac = 1 - math.exp(-num_joins / num_steps)
        slower: float = eager_frac * num_steps * max(0.0, least - secs / num_steps)
        return slower

    def _gather_secs(self) -> float:
        """Seconds to gather the weights to generate with."""
        if not self.is_sharded:
            return 0.0
        return self.weight_bytes * (1 - 1 / self.num_ranks) / self.shares.gather_bandwidth

    def learn_secs(self, num_groups: int, group_size: int, num_forward: int = 0) -> float:
        """Seconds in which the ranks learn from so many groups, each with `group_size` trajectories
        on one prompt. `num_forward` further passes score the samples first."""
        lengths = self.lengths
        num_mine = -(-num_groups // self.num_ranks)
        own = group_size * self.trajectory
        work = Work(
            num_mine * (lengths.prompt_tokens + own),
            num_mine
            * (
                pairs(0, lengths.prompt_tokens)
                + group_size * pairs(lengths.prompt_tokens, self.trajectory)
            ),
            num_mine * group_size * self.sampled,
        )
        flops = self.flops.training(work)
        flops += (num_forward + self.checkpointing) * self.flops.forward(work)
        return flops / self.gpu.peak / self.shares.learn_frac

    def sync_secs(self) -> float:
        """Seconds of an optimizer step in which ranks exchange gradients. DDP sends them in
        float32 as a ring, and FSDP2 the weights besides."""
        if self.num_ranks == 1:
            return 0.0
        if self.is_adapted:
            return 0.0  # adapters are small
        num_bytes = 2 * 4 * self.weight_bytes / BYTES * (1 - 1 / self.num_ranks)
        return num_bytes / self.shares.gather_bandwidth + self._gather_secs()
