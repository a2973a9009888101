"""Several samples of a turn: pass@k, and the vote by execution result.

Neither the gold query nor a verdict has any influence on a vote.
"""

import hashlib
from collections.abc import Sequence
from math import comb
from typing import Protocol

from mtsql.sql.query import QueryResult


class Voter(Protocol):
    """What a sample brings into a vote."""

    @property
    def result(self) -> str | None: ...

    @property
    def mean_logprob(self) -> float | None: ...

    @property
    def has_answer(self) -> bool: ...


def numbers_of_samples(num_samples: int) -> list[int]:
    """The k of pass@k and vote@k: 1, 2, 4, ... and the number of samples itself."""
    powers = [1 << power for power in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """The chance that at least one of k samples is right, drawn without replacement from
    `num_samples` of which `num_right` are.

    It is the unbiased estimator of Chen et al. (2021), "Evaluating Large Language Models Trained on
    Code". ValueError if k is not between 1 and num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs {k} samples, and there are {num_samples}")
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def vote(samples: Sequence[Voter]) -> int:
    """The place of the sample whose answer is chosen.

    Answers with the same result on the database form a group, and the largest group wins. Of equal
    groups the one with the higher mean log-prob wins, then the one with the first sample. The
    group's answer is that of its first sample. An answer that does not run has no vote. If none
    runs, the first answer is chosen, and without any answer the first sample.
    """
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        if sample.result is not None:
            groups.setdefault(sample.result, []).append(place)
    if not groups:
        answered = [place for place, sample in enumerate(samples) if sample.has_answer]
        return answered[0] if answered else 0

    def weight(group: list[int]) -> tuple[int, float, int]:
        logprobs = [samples[place].mean_logprob or 0.0 for place in group]
        return len(group), sum(logprobs) / len(group), -group[0]

    return max(groups.values(), key=weight)[0]


def result_key(result: QueryResult, is_ordered: bool, is_set: bool = False) -> str | None:
    """A short hash that two results have in common if they hold the same rows. None for a query
    that did not run.

    Like EX it takes 1 and 1.0 as equal and allows another order of the columns. The order of the
    rows counts if `is_ordered`. is_set: as BIRD's EX, neither the order of the rows nor how often
    one is repeated counts, but the order of the columns does.
    """
    if not result.is_ok:
        return None
    rows = [tuple(map(_text, row)) for row in result.rows]
    has_order = is_ordered and not is_set and len(rows) > 1
    if is_set:
        rows = list(set(rows))
    else:
        # Columns with the same values differ in the order of their rows only, if that counts.
        columns = sorted(zip(*rows, strict=True), key=lambda one: (sorted(one), has_order and one))
        rows = list(zip(*columns, strict=True))
    if not has_order:
        rows.sort()
    return hashlib.blake2b(repr((has_order, rows)).encode(), digest_size=6).hexdigest()


def _text(cell: object) -> str:
    is_whole = isinstance(cell, float) and cell.is_integer()
    return repr(int(cell) if is_whole else cell)  # type: ignore[call-overload]
