"""What rollouts have cost, counted by the engine and the sandbox, summed over ranks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mtsql.engine.counts import EngineCounts
from mtsql.model.flops import FlopMeter, ModelFlops, Work
from mtsql.rl.sweep import Swept
from mtsql.run.ranks import Ranks
from mtsql.sql.sandbox import sandbox_counts

Metric = float | int | None


@dataclass
class RolloutCounts:
    """What this rank has done since the start of an update, to be summed over ranks."""

    sandbox_before: dict[str, int] = field(default_factory=sandbox_counts)
    engine: EngineCounts = field(default_factory=EngineCounts)
    with_signal: int = 0

    def add(self, counts: EngineCounts, num_with_signal: int) -> None:
        """Count a rollout."""
        self.engine += counts
        self.with_signal += num_with_signal

    def values(self) -> dict[str, float]:
        """All counts by name, with those of the sandbox since the start."""
        values = {**asdict(self.engine), "with_signal": self.with_signal}
        for name, count in sandbox_counts().items():
            values[name] = count - self.sandbox_before[name]
        return {name: float(value) for name, value in values.items()}


def engine_metrics(
    counts: EngineCounts, meter: FlopMeter, ranks: Ranks, secs: float
) -> dict[str, Metric]:
    """The metrics of rollouts that took `secs` and whose engine counted `counts` on this rank. All
    ranks must call this."""
    total = ranks.sum({name: float(value) for name, value in asdict(counts).items()})
    metrics = rollout_metrics(total, meter.model, ranks.count)
    metrics["num_sampled"] = int(total["sampled"])
    return metrics | rollout_rates(metrics, meter, secs)


def sweep_metrics(swept: Swept, meter: FlopMeter, ranks: Ranks, secs: float) -> dict[str, Metric]:
    """The metrics of a sweep: counts of all chunks, and rates and seconds of those that were played
    in the `secs` since the run was started or resumed. All ranks must call this."""
    played = engine_metrics(swept.played, meter, ranks, secs)
    counts = rollout_metrics(asdict(swept.work), meter.model, ranks.count)
    counts["num_sampled"] = swept.work.sampled
    return played | {name: count for name, count in counts.items() if not name.endswith("_secs")}


def rollout_rates(row: Mapping[str, Any], meter: FlopMeter, secs: float) -> dict[str, Metric]:
    """What follows from the metrics of rollouts and the seconds that they took."""
    secs = max(secs, 1e-9)
    return {
        "rollout_tokens_per_sec": round(row["num_sampled"] / secs, 1),
        "rollout_mfu": meter.utilisation(row["rollout_flops"], secs),
        "sql_wait_frac": round(row["sql_wait_secs"] / secs, 4),
    }


def rollout_metrics(
    total: Mapping[str, float], flops: ModelFlops, num_ranks: int
) -> dict[str, Metric]:
    """The metrics of rollouts, from the sums over ranks of their `EngineCounts` by name.

    Fractions are None where there was nothing to take them of; `eager_frac` is None if no step ran
    as a CUDA graph.
    """
    sampled = total["sampled"]
    work = Work(int(total["distinct"]), int(total["attended"]), int(sampled))
    has_graphs = total["eager_steps"] < total["steps"]
    return {
        "rollout_flops": flops.forward(work),
        "rollout_computed_per_distinct": total["computed"] / max(1.0, total["distinct"]),
        "prefix_hit_frac": _share(total["prefix_hits"], total["prompt"]),
        "drafted": int(total["drafted"]),
        "accepted_frac": _share(total["accepted"], total["drafted"]),
        "tokens_per_row_step": _share(sampled, total["row_steps"]),
        "preemptions": int(total["preemptions"]),
        "eager_frac": _share(total["eager_steps"], total["steps"]) if has_graphs else None,
        "sql_wait_secs": round(total["sql_wait_secs"] / num_ranks, 3),
        "judge_wait_secs": round(total["judge_wait_secs"] / num_ranks, 3),
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
