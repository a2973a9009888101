"""train_sft.py on the small world of the tests."""

import train_sft

from helpers.small_world import use_small_world
from mtsql.run.launch import run_script

if __name__ == "__main__":
    use_small_world()
    run_script(train_sft.main, train_sft.Config, "")
