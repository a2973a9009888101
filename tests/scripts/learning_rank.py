"""One of several ranks: calls functions of the helpers and writes what they return.

learning_rank.py WORK FOLDER, where WORK is JSON: name -> (function, its keyword arguments).
"""

import json
import sys
from pathlib import Path

from helpers.collecting import resampled
from helpers.learning import one_update, several_steps
from mtsql.run.launch import leave_group, make_accelerator, start_missing_ranks

FUNCTIONS = {"one_update": one_update, "several_steps": several_steps, "resampled": resampled}


def main(work: str, folder: str) -> None:
    start_missing_ranks()
    accelerator = make_accelerator("no")
    results = {}
    for name, (function, inputs) in json.loads(work).items():
        results[name] = FUNCTIONS[function](**inputs, accelerator=accelerator)
        accelerator.free_memory()
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(results))
    leave_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
