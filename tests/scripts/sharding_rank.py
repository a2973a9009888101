"""One of several ranks: plays every plan, one after the other, and writes what `play` returns.

sharding_rank.py PLANS FOLDER PRECISION, where PLANS is a JSON list of keyword arguments.
"""

import json
import sys
from pathlib import Path

from helpers.sharding import play
from mtsql.run.launch import leave_group, make_accelerator, start_missing_ranks


def main(plans: str, folder: str, precision: str) -> None:
    start_missing_ranks()
    accelerator = make_accelerator(precision)
    results = [play(accelerator, **plan) for plan in json.loads(plans)]
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(results))
    leave_group()  # `play` has freed what it prepared


if __name__ == "__main__":
    main(*sys.argv[1:])
