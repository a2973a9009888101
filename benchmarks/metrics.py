"""Seconds per 1,000 pairs for exact set match and execution match, in one process; prints JSON.

    python benchmarks/metrics.py --examples metrics_examples.jsonl --data data

Baseline: taoyds/test-suite-sql-eval, whole program, Spider dev (spec: metrics, section 13): 1.4 s and 7.4 s.
Golds are parsed, and their results kept, before the clock starts; no prediction is seen twice. The processor's own
seconds are given too, of all threads of this process; the queries themselves run in SQL workers, which are not in them.
"""

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.sql.schema import load_schemas

OFFICIAL_SECS = {"exact_match": 1.4, "execution_match": 7.4}
TARGET_SPEEDUP = {"exact_match": 15, "execution_match": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--examples", type=Path, required=True, help="JSON lines with db_id, db, gold, pred"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of tables.json and the files in `db`"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="for execution match"
    )
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    schemas = load_schemas(given.data / "tables.json")
    pairs = [json.loads(line) for line in given.examples.read_text(encoding="utf-8").splitlines()]

    def exact(pair: dict, pred: str) -> bool:
        return exact_match(pred, pair["gold"], schemas[pair["db_id"]])

    def execution(pair: dict, pred: str) -> bool:
        return execution_match(pred, pair["gold"], given.data / pair["db"])

    for pair in pairs:
        exact(pair, pair["gold"])
        execution(pair, pair["gold"])
    results = {
        "num_pairs": len(pairs),
        "threads": given.threads,
        "python": platform.python_version(),
    }
    with ThreadPoolExecutor(given.threads) as pool:
        for name, judge, run in (
            ("exact_match", exact, map),
            ("execution_match", execution, pool.map),
        ):
            secs, cpu_secs = [], []
            for number in range(1, given.passes + 1):
                preds = [
                    pair["pred"] + " " * number for pair in pairs
                ]  # a text that no cache has seen
                start, cpu_start = time.perf_counter(), time.process_time()
                verdicts = list(run(judge, pairs, preds))
                secs.append(1000 * (time.perf_counter() - start) / len(pairs))
                cpu_secs.append(1000 * (time.process_time() - cpu_start) / len(pairs))
            results[name] = {
                "secs_per_1000": round(min(secs), 4),
                "worst_secs_per_1000": round(max(secs), 4),
                "official_secs_per_1000": OFFICIAL_SECS[name],
                "speedup": round(OFFICIAL_SECS[name] / min(secs), 1),
                "cpu_secs_per_1000": round(min(cpu_secs), 4),
                "cpu_speedup": round(OFFICIAL_SECS[name] / min(cpu_secs), 1),
                "target_speedup": TARGET_SPEEDUP[name],
                "num_matches": sum(verdicts),
            }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
