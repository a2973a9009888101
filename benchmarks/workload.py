"""The dialogues that benchmarks play: prompts, replies of forced lengths, observations, no SQL.

Prompts have about 600 tokens, replies 20 to 120 and observations about 80. Token ids are random:
weights do not matter for speed, and random text is the worst case for drafts. `read_workload` reads
recorded trajectories (record.py), which repeat themselves as real ones do; their tokens are forced.
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import Tensor

from mtsql.engine.completions import StopReason
from mtsql.engine.engine import Engine
from mtsql.engine.sampling import hash_key
from mtsql.engine.scheduler import Plan, Row


@dataclass(frozen=True)
class WorkloadFlags:
    """The size of a workload."""

    num_prompts: int = 8
    """Number of prompts of a rollout."""
    num_samples: int = 4
    """Number of trajectories of each prompt."""
    num_replies: int = 4
    """Number of replies of each trajectory."""


@dataclass(frozen=True)
class Workload:
    """The ids of a rollout. A row is one trajectory; the rows of one prompt are consecutive."""

    prompts: list[list[int]]
    lengths: np.ndarray  # (rows, replies) forced length of each reply; 0: the row has no such reply
    observations: list[list[list[int]]]  # per row, between its replies
    texts: list[list[int]] | None = None
    """All ids of each row after its prompt, which are forced. None: ids are sampled."""

    @property
    def num_sampled(self) -> int:
        """Number of tokens of all replies."""
        return int(self.lengths.sum())

    @property
    def num_observed(self) -> int:
        """Number of tokens of all observations."""
        return sum(len(ids) for row in self.observations for ids in row)

    @property
    def num_tokens(self) -> int:
        """Number of distinct tokens: each prompt once, all replies and observations."""
        return sum(map(len, self.prompts)) + self.num_sampled + self.num_observed

    @property
    def row_tokens(self) -> list[tuple[int, int]]:
        """(tokens after the prompt, sampled tokens) of each row."""
        counts = []
        for lengths, observations in zip(self.lengths, self.observations, strict=True):
            num_sampled = int(lengths.sum())
            counts.append((num_sampled + sum(map(len, observations)), num_sampled))
        return counts

    @property
    def budget(self) -> int:
        """A number of tokens after the prompt that no row reaches."""
        return 1 + max(num_tokens for num_tokens, _ in self.row_tokens)

    def shortened(self) -> "Workload":
        """A workload of the same shape with a few tokens everywhere, to warm up."""
        return Workload(
            [prompt[:8] for prompt in self.prompts],
            np.full_like(self.lengths, 4),
            [[ids[:4] for ids in row] for row in self.observations],
        )


def make_workload(num_prompts: int, num_samples: int, num_replies: int, vocab: int) -> Workload:
    """Make a workload. The same arguments always give the same workload."""
    rng = np.random.default_rng(0)
    num_rows = num_prompts * num_samples

    def random_ids(low: int, high: int) -> list[int]:
        return rng.integers(0, vocab, rng.integers(low, high + 1)).tolist()

    # In the order in which a rollout opens them, so that a row's handle is its place.
    prompts = sorted(random_ids(550, 650) for _ in range(num_prompts))
    lengths = np.clip(rng.exponential(45, (num_rows, num_replies)).astype(int) + 20, 20, 120)
    observations = [[random_ids(60, 100) for _ in range(num_replies - 1)] for _ in range(num_rows)]
    return Workload(prompts, lengths, observations)


def read_workload(path: str, vocab: int) -> Workload:
    """Recorded trajectories as a workload. ValueError if the file cannot be read, or holds an id
    that is not below `vocab`."""
    try:
        groups = json.loads(Path(path).read_text())["groups"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--recorded {path}: no file of record.py ({error})") from error
    rows = [row for group in groups for row in group["rows"]]
    highest = max(max(ids) for ids in [group["prompt_ids"] for group in groups] + _ids(rows))
    if highest >= vocab:
        raise ValueError(f"--recorded {path}: holds token {highest}, but --vocab is {vocab}")
    replies: list[list[int]] = []
    observations: list[list[list[int]]] = []
    for row in rows:
        parts = groupby(zip(row["ids"], row["loss_mask"], strict=True), lambda pair: pair[1])
        spans = [(is_sampled, [id for id, _ in pairs]) for is_sampled, pairs in parts]
        replies.append([len(ids) for is_sampled, ids in spans if is_sampled])
        observations.append([ids for is_sampled, ids in spans if not is_sampled])
    lengths = np.zeros((len(rows), max(map(len, replies))), dtype=int)
    for line, row_lengths in zip(lengths, replies, strict=True):
        line[: len(row_lengths)] = row_lengths
    return Workload([group["prompt_ids"] for group in groups], lengths, observations, _ids(rows))


def _ids(rows: list[dict]) -> list[list[int]]:
    return [row["ids"] for row in rows]


class ForcedLengths(Engine):
    """An engine that ends replies where the workload says, and counts what attention reads."""

    texts: dict[int, list[int]] | None = None
    """The forced ids of each row after its prompt, by its hashed noise key. None: not forced."""

    num_own_tokens = 0
    """Number of cached tokens that decoding read, without those of prompts."""
    num_shared_tokens = 0
    """Number of cached tokens of prompts that decoding read, once per group and iteration."""
    num_pairs = 0
    """Number of pairs of a query and a key in chunks of prompts and observations."""

    def force(self, lengths: np.ndarray) -> None:
        """Force these lengths, (rows, replies); a row is known by its handle."""
        self.lengths = lengths
        self.num_done = np.zeros(len(lengths), dtype=int)  # replies that ended, per row

    def play(self, work: Workload) -> Counter:
        """Play the whole workload. Returns how many iterations had each number of tokens."""
        self.force(work.lengths)
        num_samples = len(work.lengths) // len(work.prompts)
        texts = iter(work.texts or [])
        self.texts = None if work.texts is None else {}
        for turn, prompt in enumerate(work.prompts):
            keys = [(0, 0, turn, sample) for sample in range(num_samples)]
            if self.texts is not None:
                self.texts.update((hash_key(key), next(texts)) for key in keys)
            self.open_group(prompt, keys)
        steps: Counter = Counter()
        while self.has_work:
            num_before = self.counts.computed
            for completion in self.step():
                row = completion.handle
                self.num_done[row] += 1
                if self.num_done[row] < np.count_nonzero(work.lengths[row]):
                    self.extend(row, work.observations[row][self.num_done[row] - 1])
                else:
                    self.close(row)
            steps[self.counts.computed - num_before] += 1
        return steps

    def _compute(self, plan: Plan) -> Tensor:
        prompts = {id(row.prompt): len(row.prompt.ids) for row in plan.decoding}
        self.num_own_tokens += sum(len(row.ids) for row in plan.decoding)
        self.num_shared_tokens += sum(prompts.values())
        self.num_pairs += sum(n * owner.cached + n * (n + 1) // 2 for owner, n in plan.chunks)
        return super()._compute(plan)

    def _sample(
        self, hidden: Tensor, keys: np.ndarray, positions: np.ndarray
    ) -> tuple[list[int], list[float]]:
        """Sample as always, then put the forced ids in the place of the sampled ones."""
        ids, logprobs = super()._sample(hidden, keys, positions)
        if self.texts is not None:
            places = zip(keys.tolist(), positions.tolist(), strict=True)
            ids = [self._forced(self.texts[key], position) for key, position in places]
        return ids, logprobs

    def _forced(self, text: list[int], position: int) -> int:
        """The forced id of a position. Behind the end of the text, where a draft may reach: 0."""
        return text[position] if position < len(text) else 0

    def _stop_reason(self, row: Row) -> StopReason | None:
        is_done = len(row.logprobs) == self.lengths[row.handle, self.num_done[row.handle]]
        return StopReason.REPLY_TOKENS if is_done else None


class StopsAsPolicy(ForcedLengths):
    """The same engine, but replies end by a stop id, because `rollout` answers no others."""

    def _stop_reason(self, row: Row) -> StopReason | None:
        if super()._stop_reason(row) is None:
            return None
        self.num_done[row.handle] += 1
        return StopReason.STOP_ID
