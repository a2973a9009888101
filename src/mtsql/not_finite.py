"""A loss or a gradient that is not finite stops a training. What the optimizer step learned from is
kept in a file, so that the fault can be found:

    from mtsql.not_finite import read_batch
    samples, about = read_batch("runs/rl/not_finite/update-00007.jsonl")

The first line of the file says what happened, each other line is a sample. The weights from before
the step are those of the newest checkpoint; the step has spoilt those in memory.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mtsql.files import read_rows, write_text
from mtsql.learner.packing import Sample
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite

FOLDER = "not_finite"
"""In the run folder."""
INPUTS = {field.name for field in fields(Sample)} - {"scores"}
"""What a step reads of a sample. It writes `scores`, so these are not kept."""
PER_TOKEN = ("advantages", "old_logprobs", "ref_logprobs", "sampled_logprobs")


def require_finite(
    stats: Mapping[str, float], samples: Sequence[Sample], ranks: Ranks, run: Path, update: int
) -> None:
    """NotFinite if a result of an optimizer step is infinite or not a number, after the samples of
    all ranks were written to the run folder. All ranks call this after each step.

    stats: what the step returned; the same on all ranks. samples: this rank's part of the step.
    update: counts from 1.
    """
    bad = [name for name, value in stats.items() if not math.isfinite(value)]
    if not bad:
        return
    everyones = ranks.gather(list(samples))
    faulty = [place for place, sample in enumerate(everyones) if _has_fault(sample)]
    file = run / FOLDER / f"update-{update:05d}.jsonl"
    about = {"update": update, "not_finite": bad, "stats": dict(stats), "faulty_samples": faulty}
    if ranks.is_main:
        write_text(file, "".join(_lines(about, everyones)))
    inputs = "all numbers of its samples are finite"
    if faulty:
        inputs = f"sample {faulty[0]} has a number that is not finite itself"
        inputs += f" ({len(faulty)} samples in all)" if len(faulty) > 1 else ""
    raise NotFinite(
        f"{', '.join(bad)} is not finite in the optimizer step of update {update}; {inputs}; they "
        f"are in {file} (docs/warnings.md)"
    )


def read_batch(file: Path | str) -> tuple[list[Sample], dict[str, Any]]:
    """-> (the samples of the step, what happened: update, not_finite, stats, faulty_samples).
    ValueError that names the file and the line if it is no such file."""
    rows = read_rows(Path(file))
    if not rows or "not_finite" not in rows[0]:
        raise ValueError(f"{file}, line 1: expected the keys of a file of {FOLDER}/")
    about = {**rows[0], "stats": {k: float(v) for k, v in rows[0]["stats"].items()}}
    samples = []
    for number, row in enumerate(rows[1:], 2):
        if row.keys() != INPUTS:
            raise ValueError(
                f"{file}, line {number}: expected the keys {', '.join(sorted(INPUTS))}"
            )
        numbers = {
            key: None if row[key] is None else [float(value) for value in row[key]]
            for key in PER_TOKEN
        }
        samples.append(Sample(**{**row, **numbers}))
    return samples, about


def _has_fault(sample: Sample) -> bool:
    values = (getattr(sample, key) or () for key in PER_TOKEN)
    return any(not math.isfinite(value) for one in values for value in one)


def _lines(about: dict[str, Any], samples: Sequence[Sample]) -> Iterator[str]:
    yield json.dumps(_plain(about), allow_nan=False) + "\n"
    for sample in samples:
        inputs = {name: getattr(sample, name) for name in sorted(INPUTS)}
        yield json.dumps(_plain(inputs), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value with `nan`, `inf` and `-inf` as texts, because JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
