"""train_rl.py on the small world, which also prints whether the process group still exists when a
wrapped policy is freed."""

import sys
import weakref

import torch
import train_rl
from accelerate import Accelerator

from helpers.small_world import use_small_world
from mtsql.run.launch import run_script

prepare = Accelerator.prepare


def watched(self, *things):
    prepared = prepare(self, *things)
    weakref.finalize(prepared[0], say)
    return prepared


def say():
    # In one piece, because two ranks write at the same time.
    sys.stdout.write(f"freed inside the group: {torch.distributed.is_initialized()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    use_small_world()
    Accelerator.prepare = watched
    run_script(train_rl.main, train_rl.Config, "")
