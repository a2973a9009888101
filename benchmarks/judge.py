"""Seconds per 1,000 pairs for exact set match and execution match, in one process. Prints JSON.

    python benchmarks/judge.py --examples metrics_examples.jsonl --data data

The official figures are those of the whole program taoyds/test-suite-sql-eval on Spider dev. Gold
queries are parsed and run before the clock starts, and their results are kept. No prediction is
seen twice. The processor time of all threads of this process is printed too. It does not contain
the queries themselves, which run in SQL workers.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flags import print_json, run_benchmark

from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.sql.schema import load_schemas

OFFICIAL_SECS = {"exact_match": 1.4, "execution_match": 7.4}
TARGET_SPEEDUP = {"exact_match": 15, "execution_match": 5}


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/judge.py."""

    examples: str
    """JSON lines with db_id, db, gold and pred."""
    data: str
    """Folder with tables.json and the database files that `db` names."""
    threads: int = os.cpu_count() or 1
    """Threads that ask for execution matches."""
    num_passes: int = 5
    """Number of passes over the examples. The fastest one counts."""


def measure(
    judge: Callable[[dict, str], bool],
    pairs: list[dict],
    each: Callable[..., Iterable[bool]],
    num_passes: int,
) -> dict[str, float]:
    """Measure the seconds per 1,000 calls of the judge. `each` is map, or a thread pool's map."""
    secs = []
    cpu_secs = []
    for number in range(1, num_passes + 1):
        # With some spaces at its end, a prediction is a text that no cache has seen.
        predictions = [pair["pred"] + " " * number for pair in pairs]
        start = time.perf_counter()
        cpu_start = time.process_time()
        verdicts = list(each(judge, pairs, predictions))
        secs.append(1000 * (time.perf_counter() - start) / len(pairs))
        cpu_secs.append(1000 * (time.process_time() - cpu_start) / len(pairs))
    return {
        "secs_per_1000": min(secs),
        "worst_secs_per_1000": max(secs),
        "cpu_secs_per_1000": min(cpu_secs),
        "num_matches": sum(verdicts),
    }


def main(flags: Flags) -> None:
    """Measure both judges."""
    folder = Path(flags.data)
    schemas = load_schemas(folder / "tables.json")
    lines = Path(flags.examples).read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]

    def exact(pair: dict, prediction: str) -> bool:
        return exact_match(prediction, pair["gold"], schemas[pair["db_id"]])

    def execution(pair: dict, prediction: str) -> bool:
        return execution_match(prediction, pair["gold"], folder / pair["db"])

    for pair in pairs:
        exact(pair, pair["gold"])
        execution(pair, pair["gold"])
    with ThreadPoolExecutor(flags.threads) as pool:
        results = {
            "exact_match": measure(exact, pairs, map, flags.num_passes),
            "execution_match": measure(execution, pairs, pool.map, flags.num_passes),
        }
    for name, result in results.items():
        official = OFFICIAL_SECS[name]
        result["official_secs_per_1000"] = official
        result["speedup"] = official / result["secs_per_1000"]
        result["cpu_speedup"] = official / result["cpu_secs_per_1000"]
        result["target_speedup"] = TARGET_SPEEDUP[name]
    setting = {
        "num_pairs": len(pairs),
        "threads": flags.threads,
        "python": platform.python_version(),
    }
    print_json({**results, "setting": setting})


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
