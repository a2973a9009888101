"""train_sft.py on the small world, with rollouts of which a script says what is right."""

import pytest
import train_sft

from helpers.rounds import ScriptedRounds
from helpers.small_world import use_small_world
from mtsql.run.launch import run_script


def is_solved(turn_id: str, number: int) -> bool:
    """About a third of the turns in each round, by the digits of their ids."""
    return sum(map(ord, turn_id)) % 3 == number


if __name__ == "__main__":
    use_small_world()
    with pytest.MonkeyPatch.context() as patch:
        ScriptedRounds(patch, is_solved)
        run_script(train_sft.main, train_sft.Config, "")
