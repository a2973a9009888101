"""train_rl.py with a model that the second rank cannot read."""

import os

import train_rl

import mtsql.session
from mtsql.run.launch import run_script


def refuse(*arguments, **options):
    raise ValueError("model.path x: this rank cannot read it")


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        mtsql.session.set_up = refuse
    run_script(train_rl.main, train_rl.Config, "")
