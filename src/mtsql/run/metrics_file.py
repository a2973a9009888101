"""Read the metrics.jsonl of a run, whoever has written or edited it: what figures and lists need is
there and has its type."""

import json
import math
from pathlib import Path
from typing import Any

from mtsql.files import read_rows

Row = dict[str, Any]
NEEDED = {"rl": ("update", "curriculum_stage", "reward"), "eval": ("update",)}
"""Keys of a row by its stage. The rows of eval.py, which have `data`, belong to no update."""
WHOLE = ("update", "curriculum_stage")
NUMBERS = ("reward", "reward_std", "response_tokens", "wall_secs", "time")


def read_metrics(file: Path) -> list[Row]:
    """The rows of a metrics.jsonl. ValueError that names the file, the line and the key for a
    damaged one."""
    rows = read_rows(file)
    for number, row in enumerate(rows, 1):
        fault = _fault(row)
        if fault:
            raise ValueError(f"{file}, line {number}: {fault}")
    return rows


def _fault(row: Row) -> str | None:
    """What is wrong with a row; None if nothing is."""
    stage = row.get("stage")
    if not isinstance(stage, str):
        return _of("stage", row, "a text")
    for key in () if "data" in row else NEEDED.get(stage, ()):
        if row.get(key) is None:
            return _of(key, row, "a number")
    for key, value in row.items():
        if key in WHOLE and (type(value) is not int or value < 0):
            return _of(key, row, "a whole number")
        is_number = key in NUMBERS or key.endswith(("_ex", "_em"))
        if is_number and value is not None and not _is_finite(value):
            return _of(key, row, "a finite number")
    return None


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _of(key: str, row: Row, expected: str) -> str:
    if key not in row:
        return f"the key {key} is missing"
    return f"{key} is {json.dumps(row[key]):.40}: expected {expected}"
