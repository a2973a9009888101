"""train_rl.py on the small world of the tests."""

import train_rl

from helpers.small_world import use_small_world
from mtsql.run.launch import run_script

if __name__ == "__main__":
    use_small_world()
    run_script(train_rl.main, train_rl.Config, "", train_rl.PRESETS)
