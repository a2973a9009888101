"""One of several ranks of benchmarks/gpu.py: two optimizer steps on its share of eight samples.

The main rank prints the loss and the gradient norm of each step as JSON.
"""

import json
import sys

import torch
from gpu_learning import make_learner, random_samples

from mtsql.run.launch import leave_group, make_accelerator, start_missing_ranks


def main(folder: str) -> None:
    """`folder`: the model, with a vocabulary of 1,000."""
    start_missing_ranks()
    learner = make_learner(make_accelerator("bf16" if torch.cuda.is_available() else "no"), folder)
    mine = learner.ranks.share(random_samples(1000, 8, 40))
    steps = []
    for _ in range(2):
        stats = learner.optimizer_step(mine, 1e-4)
        steps.append([stats["loss"], stats["grad_norm"]])
    if learner.ranks.index == 0:
        print(json.dumps(steps))
    learner.accelerator.free_memory()
    leave_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
