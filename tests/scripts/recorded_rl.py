"""train_rl.py on the small world, which also writes every rollout of a training update to
`RUN-played-RANK`."""

import json
import os
import sys
from pathlib import Path

import train_rl

from helpers.small_world import use_small_world
from mtsql.rl.collect import PROBE_UPDATE, Collector
from mtsql.run.launch import run_script

play = Collector.play
flag = "--run" if "--run" in sys.argv else "--resume"
run = Path(sys.argv[sys.argv.index(flag) + 1])
file = run.with_name(f"{run.name}-played-{os.environ.get('RANK', '0')}")


def recorded(self, engine, turns, split, *, num_samples, update, show):
    groups, counts = play(
        self, engine, turns, split, num_samples=num_samples, update=update, show=show
    )
    if update < PROBE_UPDATE:
        with open(file, "a") as lines:
            for trajectory in [scored.trajectory for group in groups for scored in group]:
                print(json.dumps([update, trajectory.turn.turn_id, trajectory.ids]), file=lines)
    return groups, counts


if __name__ == "__main__":
    use_small_world()
    Collector.play = recorded
    run_script(train_rl.main, train_rl.Config, "", train_rl.PRESETS)
